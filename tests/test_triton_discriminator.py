"""The discriminator's ops against autograd and finite differences of the same network; their launches."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from acs_fast import ops
from acs_fast.kernels import reference
from acs_fast.kernels.structures import OBJECTIVES, Block, Head, HeadResult, Network, guidance_workspace
from acs_fast.testing import Call, Case, make, tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    name for name in ("triton", "reference") if ops.why_not("conv_norm_act_pool", name, DEVICE) is None
]
SHAPE = {"B": 2, "C": 4, "H": 8, "W": 8, "width": 16, "depth": 2, "K": 5}
OMEGA = 0.5


def guidance_call(dtype: torch.dtype, groups: int = 16, **options: Any) -> Call:
    """Arguments of `discriminator_guidance` at the small SHAPE."""
    case = Case("discriminator_guidance", {**SHAPE, "G": groups}, options)
    return make(case, dtype, DEVICE, seed=3)


class Net(nn.Module):
    """The n-th of the stacked networks from PyTorch's layers."""

    def __init__(self, network: Network, n: int, groups: int, activation: str):
        super().__init__()
        layers: list[nn.Module] = []
        for block in network.blocks:
            c_out, c_in = block.weight.shape[1:3]
            conv, norm = nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(groups, c_out)
            for parameter, value in zip((conv.weight, conv.bias, norm.weight, norm.bias), block, strict=True):
                parameter.data = value[n].clone()
            layers += [conv, norm, nn.ReLU() if activation == "relu" else nn.SiLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.classifier = nn.Linear(*reversed(network.head.weight.shape[1:]))
        self.classifier.weight.data = network.head.weight[n].clone()
        self.classifier.bias.data = network.head.bias[n].clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def objective_loss(logits: list[Tensor], targets: Tensor, objective: str) -> Tensor:
    """L per sample as METHOD.md writes it."""
    own = [F.log_softmax(one, dim=1).gather(1, targets[:, None])[:, 0] for one in logits]
    if objective == "adversarial":
        return -own[0]
    if objective == "nonsaturating":
        return torch.log1p(-own[0].exp())
    if objective == "learnability":
        return -own[0] + OMEGA * own[1]
    return F.logsigmoid(logits[0].gather(1, targets[:, None])[:, 0])


def chain(
    backend: Any, x: Tensor, network: Network, targets: Tensor, groups: int, activation: str, objective: str
) -> tuple[HeadResult, Tensor]:
    """The head's result, and d L / d x by the ops: per network, summed, times the scale."""
    keywords = {"groups": groups, "activation": activation}
    z, saved = x, []
    for block in network.blocks:
        z, kept = backend.conv_norm_act_pool(z, block, **keywords)
        saved.append(kept)
    head = backend.classifier_head_grad(z.flatten(2), network.head, targets, objective=objective, omega=OMEGA)
    grad = head.grad.view(z.shape)
    for kept, block in zip(reversed(saved), reversed(network.blocks), strict=True):
        grad = backend.conv_norm_act_pool_backward_input(grad, kept, block, **keywords)
    return head, grad.sum(dim=0) * head.scale.view(-1, 1, 1, 1).to(grad.dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("groups", "activation"), [(16, "relu"), (4, "silu"), (1, "relu")])
def test_input_gradient_is_that_of_autograd(
    backend: str, objective: str, groups: int, activation: str
) -> None:
    call = guidance_call(torch.float32, groups, objective=objective)
    x, targets, network = call.args[0], call.args[4], call.args[8]
    head, grad = chain(ops.select(backend, DEVICE), x, network, targets, groups, activation, objective)
    leaf = x.detach().requires_grad_()
    logits = [Net(network, n, groups, activation).to(DEVICE)(leaf) for n in range(len(network.head.bias))]
    loss = objective_loss(logits, targets, objective)
    (true,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(head.logits, torch.stack(logits), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.loss, loss, rtol=1e-4, atol=1e-5)
    assert relative(grad, true) < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reference_gradient_is_that_of_finite_differences(objective: str) -> None:
    call = guidance_call(torch.float32, 4, objective=objective)
    wide = tree_map(lambda t: t.double() if t.is_floating_point() else t, call.args)
    x, targets, network = wide[0], wide[4], wide[8]
    arguments = (network, targets, 4, "silu", objective)
    grad = chain(reference, x, *arguments)[1].flatten()
    h = 1e-5
    for i in torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))[:40].tolist():
        shift = torch.zeros_like(x).flatten()
        shift[i] = h
        up, down = (chain(reference, x + s * shift.view_as(x), *arguments)[0].loss.sum() for s in (1, -1))
        assert ((up - down) / (2 * h)).item() == pytest.approx(grad[i].item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learnability_is_the_difference_of_two_networks(backend: str) -> None:
    """Its gradient is that of f_i less omega times that of f_real, each by itself under `adversarial`."""
    call = guidance_call(torch.float32, objective="learnability")
    x, targets, both = call.args[0], call.args[4], call.args[8]
    chosen, alone = ops.select(backend, DEVICE), []
    for n in range(2):
        one = tree_map(lambda t, n=n: t[n : n + 1].contiguous(), both)
        alone.append(chain(chosen, x, one, targets, 16, "relu", "adversarial")[1])
    together = chain(chosen, x, both, targets, 16, "relu", "learnability")[1]
    assert relative(together, alone[0] - OMEGA * alone[1]) < 1e-5


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched since, by module."""
    seen: list[str] = []
    for kind in (InterpretedFunction, JITFunction):
        run = kind.run

        def counted(self: Any, *args: Any, run: Any = run, **kwargs: Any) -> Any:
            seen.append(self.fn.__module__.rpartition(".")[2])
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", counted)
    return seen


@pytest.fixture
def triton_backend() -> ModuleType:
    return importlib.import_module("acs_fast.kernels.triton")


def test_a_convnet_3_takes_8_launches(triton_backend: ModuleType, launches: list[str]) -> None:
    shape = {"B": 1, "C": 4, "H": 8, "W": 8, "width": 16, "depth": 3, "G": 16, "K": 10}
    call = make(Case("discriminator_guidance", shape), torch.bfloat16, DEVICE)
    triton_backend.discriminator_guidance(*call.args, **call.kwargs)
    backward = ["conv_norm_act_pool_backward_input"] * 2
    expected = ["pred_xstart", *["conv_norm_act_pool"] * 3, "classifier_head_grad", *backward]
    assert launches == [*expected, "discriminator_guided_step"]


def test_results_live_in_the_workspace(triton_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = guidance_call(torch.float32, objective="learnability")
    x, targets, network = call.args[0], call.args[4], call.args[8]
    fresh = triton_backend.discriminator_guidance(*call.args, **call.kwargs)
    work = guidance_workspace(x, network, 16)
    for tensor in tensors(work):
        tensor.fill_(float("nan"))
    out = torch.full_like(x, float("nan"))
    for name in ("empty", "empty_like", "zeros"):
        monkeypatch.setattr(torch, name, None)  # nothing may be allocated
    got = triton_backend.discriminator_guidance(*call.args, **call.kwargs, workspace=work, out=out)
    monkeypatch.undo()
    assert got is out and torch.equal(out, fresh)
    assert not any(tensor.isnan().any() for tensor in tensors(work))
    found, _ = chain(triton_backend, work.pred_xstart, network, targets, 16, "relu", "learnability")
    assert torch.equal(work.head.logits, found.logits)


def test_update_in_place_is_the_same(triton_backend: ModuleType) -> None:
    call = guidance_call(torch.float32)
    apart = triton_backend.discriminator_guidance(*call.args, **call.kwargs)
    x = call.args[0].clone()
    triton_backend.discriminator_guidance(x, *call.args[1:], **call.kwargs, out=x)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("argument", ["x", "weight"])
def test_non_contiguous_input_is_refused(triton_backend: ModuleType, argument: str) -> None:
    x, weight = torch.randn(1, 3, 4, 8, 8, device=DEVICE), torch.randn(1, 16, 4, 3, 3, device=DEVICE)
    if argument == "x":
        x = x.transpose(3, 4)
    else:
        weight = weight.transpose(3, 4)
    block = Block(weight, *torch.randn(3, 1, 16, device=DEVICE))
    with pytest.raises(ValueError, match=f"conv_norm_act_pool: {argument} must be contiguous"):
        triton_backend.conv_norm_act_pool(x, block, groups=16, activation="relu")


def test_kept_and_recomputed_gradients_agree(
    triton_backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample too large to keep is made twice: the same result where it would have fitted."""
    shape = {"N": 2, "B": 2, "C": 4, "H": 16, "W": 16, "width": 16, "G": 16}
    call = make(Case("discriminator_guided_step", shape), torch.float32, DEVICE)
    module = importlib.import_module("acs_fast.kernels.triton.discriminator_guided_step")
    monkeypatch.setattr(module, "ACCUMULATORS", 1024)  # four tiles
    kept = triton_backend.discriminator_guided_step(*call.args, **call.kwargs)
    monkeypatch.setattr(module, "KEPT", 0)
    again = triton_backend.discriminator_guided_step(*call.args, **call.kwargs)
    true = reference.discriminator_guided_step(*call.args, **call.kwargs)
    assert relative(kept, again) < 1e-6 and relative(kept, true) < 1e-5


def test_head_takes_many_features_and_classes(triton_backend: ModuleType) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 1100, generator=generator).to(DEVICE)
    weight = 0.02 * torch.randn(1, 100, 1100, generator=generator).to(DEVICE)
    head = Head(weight, torch.zeros(1, 100, device=DEVICE))
    targets = torch.tensor([99, 0], device=DEVICE)
    got = triton_backend.classifier_head_grad(x, head, targets, objective="adversarial")
    for a, b in zip(
        got, reference.classifier_head_grad(x, head, targets, objective="adversarial"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
