"""Fast training on a CPU changes no value: the norm's backward pass, parts of a batch, formats; bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acs_fast.data import ImageSet
from acs_fast.evaluation import arithmetic
from acs_fast.evaluation.arithmetic import InstanceNorm, prepare, resolve_dtype
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.training import Learner, TestSet
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(2, 5, 6, 4), (1, 3, 7, 7), (3, 1, 2, 3)])
def test_the_norms_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(shape[1], shape[1]).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    scale = torch.randn(shape, dtype=torch.float64)
    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x) * scale, inputs, raise_exception=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_group_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.GroupNorm(6, 6).to(dtype)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    ours = InstanceNorm(6, 6).to(dtype)
    ours.load_state_dict(plain.state_dict())
    x = 3.0 + torch.randn(4, 6, 9, 8, dtype=dtype).to(memory_format=torch.channels_last)
    y, g = x.clone().requires_grad_(), torch.randn(4, 6, 9, 8, dtype=dtype)
    x.requires_grad_()
    for norm, values in ((plain, x), (ours, y)):
        (norm(values) * g).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    torch.testing.assert_close(ours.bias.grad, plain.bias.grad)


def examples(size: int, n: int = 12) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("network", ["convnet-4", "resnet-18", "resnetap-10"])
def test_parts_and_formats_train_the_same_network(monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    train, recipe = examples(64), make_recipe("hard-sgd", 4, 3, 3)
    monkeypatch.setattr(arithmetic, "PART_BYTES", 5 * 4 * 128 * 64**2)  # of a ConvNet 5 of the 12 images
    fast = Learner(train, network, recipe, 0, CPU)
    assert fast.part and 1 <= fast.part < 12
    assert next(iter(fast.network.parameters())).is_contiguous(memory_format=torch.channels_last)
    plain = Learner(train, network, recipe, 0, CPU)
    monkeypatch.setattr(arithmetic, "LARGE", 65)
    plain = Learner(train, network, recipe, 0, CPU)
    assert plain.part is None and not any(isinstance(m, InstanceNorm) for m in plain.network.modules())
    initial = {name: values.clone() for name, values in plain.network.state_dict().items()}
    for learner in (fast, plain):
        learner.epoch()
    for name, values in plain.network.state_dict().items():
        moved = (values - initial[name]).norm()
        if moved > 1e-6:  # else a bias before a norm, whose gradient is rounding
            assert (fast.network.state_dict()[name] - values).norm() < 0.02 * moved, name
    test = TestSet.of(train, CPU)
    assert fast.top1(test) == plain.top1(test)


def test_a_network_with_batch_norm_sees_whole_batches() -> None:
    network, part = prepare(build_classifier("resnet18", 3, 10, 64), CPU, 64)
    assert part is None and isinstance(network.get_submodule("bn1"), nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("name", "size", "fast", "expected"),
    [
        ("auto", 224, True, torch.bfloat16),
        ("auto", 64, True, torch.bfloat16),
        ("auto", 63, True, torch.float32),
        ("auto", 224, False, torch.float32),
        ("bf16", 8, False, torch.bfloat16),
        ("fp32", 224, True, torch.float32),
    ],
)
def test_dtypes(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(arithmetic, "_multiplies_bf16", lambda: fast)
    assert resolve_dtype(name, CPU, size) is expected
    if name == "auto":
        assert resolve_dtype(name, torch.device("cuda"), size) is torch.float32


def test_bf16_keeps_weights_in_fp32_and_learns() -> None:
    train = examples(64)
    train.images[train.labels == 0] //= 4  # dark
    train.images[train.labels == 1] //= 2
    learner = Learner(train, "convnet-4", make_recipe("hard-adamw", 4, 3, 30), 0, CPU, dtype=torch.bfloat16)
    kinds: set[torch.dtype] = set()
    learner.network.features[0].register_forward_hook(lambda m, args, output: kinds.add(output.dtype))
    for _ in range(12):
        learner.epoch()
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in learner.network.parameters()} == {torch.float32}
    assert learner.top1(TestSet.of(train, CPU)) > 90
