"""Inputs for every op, plain PyTorch beside it, and the comparison rule: used by tests/ and benchmarks/ only.

The rule: a kernel's error is at most twice that of plain PyTorch at the same dtype, both against the
reference in float64, plus the rounding of the output: one unit in the last place of the largest element,
eight where there are so few elements that plain PyTorch's error is luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from acs_fast.diffusion import respaced_schedule, step_table
from acs_fast.kernels import reference
from acs_fast.kernels.structures import Block, Head, Network, Saved

FEW = 16  # elements
STEPS = 10  # rows of the step table in the inputs


@dataclass(frozen=True)
class Case:
    """One op's inputs: shape and options by name; `id` is readable in a test's name."""

    op: str
    shape: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """For example `adaln-B3-T16-D128`."""
        parts = [f"{k}{v}" for k, v in self.shape.items()] + [str(v) for v in self.options.values()]
        return "-".join([self.op, *parts])


@dataclass(frozen=True)
class Call:
    """What an op is called with: tensors in order, then keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Maker:
    """Random tensors of one dtype on one device; fp32 where the op wants fp32."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers times `scale`."""
        x = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def make(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Call:
    """Fresh random inputs of a case."""
    return MAKERS[case.op](Maker(dtype, device, seed), **case.shape, **case.options)


def truth(case: Case, call: Call) -> list[Tensor]:
    """The reference in float64 on the very numbers of `call`."""
    wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, call.args)
    kwargs = dict(call.kwargs)
    if case.op == "philox_normal":
        shape = (len(call.args[0]), *kwargs["shape"])
        kwargs["out"] = torch.empty(shape, dtype=torch.float64, device=call.args[0].device)
    kwargs.pop("dtype", None)
    return tensors(getattr(reference, case.op)(*wide, **kwargs))


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result, in order."""
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]


def poisoned_out(op: Callable[..., Any], call: Call) -> Any:
    """An `out` shaped as the op's result, filled with NaN (bytes with 77)."""
    result = op(*call.args, **call.kwargs)
    return tree_map(
        lambda t: (
            torch.full_like(t, float("nan") if t.is_floating_point() else 77) if isinstance(t, Tensor) else t
        ),
        result,
    )


def excess(got: list[Tensor], plain: list[Tensor], true: list[Tensor]) -> list[float]:
    """Per output: error / allowed error, by the rule of the module's docstring; above 1 is a failure.

    The error is the largest over the elements; a NaN gives infinity.
    """
    found = []
    for a, b, t in zip(got, plain, true, strict=True):
        error, usual = ((x.double() - t.double()).abs().max().item() for x in (a, b))
        step = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0  # bytes are exact or not
        units = 1 if t.numel() >= FEW else 8
        floor = max(units * step * t.double().abs().max().item(), torch.finfo(torch.float32).tiny)
        allowed = 2.0 * (usual if usual == usual else 0.0) + floor
        found.append(error / allowed if error == error else float("inf"))
    return found


# --- inputs --------------------------------------------------------------------------------------------


def _modulation(m: Maker, rows: int, width: int, count: int) -> list[Tensor]:
    table = m.normal(rows, count, width, scale=0.5)
    return [table[:, i] for i in range(count)]  # rows of one table, as the engine has them


def make_adaln(m: Maker, B: int, T: int, D: int) -> Call:
    x = m.normal(B, T, D) + 0.3 * m.normal(1, 1, D)
    shift, scale = _modulation(m, B + 3, D, 2)
    return Call((x, shift, scale, m.integers(B + 3, B)), {})


def make_gated_residual_adaln(m: Maker, B: int, T: int, D: int) -> Call:
    gate, shift, scale = _modulation(m, B + 3, D, 3)
    return Call((m.normal(B, T, D), m.normal(B, T, D), gate, shift, scale, m.integers(B + 3, B)), {})


def make_philox_normal(m: Maker, B: int, C: int, H: int, W: int) -> Call:
    return Call(_keys(m, B), {"shape": (C, H, W)})


def _keys(m: Maker, B: int) -> tuple[Tensor, ...]:
    """class_labels, indices, seed, step."""
    seed = torch.tensor([(1 << 62) + 0x1234567_89ABCDEF], device=m.device)
    return m.integers(1000, B), m.integers(1 << 31, B), seed, torch.tensor([4], device=m.device)


def _table(m: Maker, numel: int, sampler: str, radius: str, learned_range: bool) -> Tensor:
    table = step_table(
        respaced_schedule(STEPS, sampler=sampler, eta=0.3, learned_range=learned_range),
        cfg_scale=1.7,
        guidance_scale=0.3,
        trust_radius=radius,
        window=(0.0, 1.0),
        numel=numel,
    )
    return table.to(m.device)


def make_pred_xstart(m: Maker, B: int, C: int, H: int, W: int, clip: bool = False) -> Call:
    x, denoised = m.normal(B, C, H, W), m.normal(2 * B, 2 * C, H, W)
    table = _table(m, C * H * W, "ddpm", "sigma", True)
    step = torch.tensor([4], device=m.device)
    return Call((x, denoised, step, table), {"cfg_channels": max(1, C - 1), "clip": clip, "dtype": m.dtype})


def make_guided_step(
    m: Maker,
    B: int,
    C: int,
    H: int,
    W: int,
    sampler: str = "ddpm",
    radius: str = "sigma",
    learned_range: bool = True,
    clip: bool = False,
    gradient: bool = True,
) -> Call:
    x, denoised = m.normal(B, C, H, W), m.normal(2 * B, 2 * C if learned_range else C, H, W)
    g = m.normal(B, C, H, W, scale=1e-4) if gradient else None
    keywords = {"cfg_channels": max(1, C - 1), "clip": clip, "learned_range": learned_range}
    table = _table(m, C * H * W, sampler, radius, learned_range)
    return Call((x, denoised, *_keys(m, B), table, g), keywords)


def _block(m: Maker, N: int, C_in: int, C: int) -> Block:
    return Block(
        m.normal(N, C, C_in, 3, 3, scale=(9 * C_in) ** -0.5),
        m.normal(N, C, scale=0.1),
        1.0 + m.normal(N, C, scale=0.2),
        m.normal(N, C, scale=0.2),
    )


def make_conv_norm_act_pool(
    m: Maker,
    N: int,
    B: int,
    C_in: int,
    C: int,
    H: int,
    W: int,
    G: int,
    activation: str = "relu",
    shared: bool = False,
) -> Call:
    x = m.normal(B, C_in, H, W) if shared else m.normal(N, B, C_in, H, W)
    return Call((x, _block(m, N, C_in, C)), {"groups": G, "activation": activation})


def _saved(m: Maker, N: int, B: int, C: int, H: int, W: int, G: int) -> Saved:
    raw = m.normal(N, B, G, (C // G) * H * W)
    xhat = F.layer_norm(raw.float(), raw.shape[-1:]).to(m.dtype).view(N, B, C, H, W)
    return Saved(xhat, 0.5 + m.normal(N, B, G, dtype=torch.float32).abs())


def make_conv_norm_act_pool_backward_input(
    m: Maker, N: int, B: int, C_in: int, C: int, H: int, W: int, G: int, activation: str = "relu"
) -> Call:
    grad = m.normal(N, B, C, H // 2, W // 2)
    args = (grad, _saved(m, N, B, C, H, W, G), _block(m, N, C_in, C))
    return Call(args, {"groups": G, "activation": activation})


def make_classifier_head_grad(
    m: Maker, B: int, F: int, K: int, objective: str = "adversarial", omega: float = 0.5
) -> Call:
    N = 2 if objective == "learnability" else 1
    head = Head(m.normal(N, K, F, scale=2.0 * F**-0.5), m.normal(N, K, scale=0.3))
    return Call((m.normal(N, B, F), head, m.integers(K, B)), {"objective": objective, "omega": omega})


def make_discriminator_guided_step(
    m: Maker,
    N: int,
    B: int,
    C: int,
    H: int,
    W: int,
    width: int,
    G: int,
    activation: str = "relu",
    sampler: str = "ddpm",
    radius: str = "sigma",
    learned_range: bool = True,
    clip: bool = False,
) -> Call:
    step = make_guided_step(m, B, C, H, W, sampler, radius, learned_range, clip, gradient=False)
    back = make_conv_norm_act_pool_backward_input(m, N, B, C, width, H, W, G, activation)
    return Call((*step.args[:7], *back.args), {**step.kwargs, **back.kwargs})


def make_discriminator_guidance(
    m: Maker,
    B: int,
    C: int,
    H: int,
    W: int,
    width: int,
    depth: int,
    G: int,
    K: int,
    objective: str = "adversarial",
    activation: str = "relu",
    sampler: str = "ddpm",
    radius: str = "sigma",
    learned_range: bool = True,
    clip: bool = False,
) -> Call:
    step = make_guided_step(m, B, C, H, W, sampler, radius, learned_range, clip, gradient=False)
    N = 2 if objective == "learnability" else 1
    blocks = tuple(_block(m, N, C if i == 0 else width, width) for i in range(depth))
    features = width * (H >> depth) * (W >> depth)
    head = Head(m.normal(N, K, features, scale=2.0 * features**-0.5), m.normal(N, K, scale=0.3))
    x, denoised, class_labels, indices, seed, at, table, _ = step.args
    args = (x, denoised, class_labels, indices, m.integers(K, B), seed, at, table, Network(blocks, head))
    keywords = {"groups": G, "activation": activation, "objective": objective, "omega": 0.5}
    return Call(args, {**keywords, **step.kwargs})


def make_group_norm_silu(m: Maker, B: int, C: int, H: int, W: int, G: int) -> Call:
    x = 2.0 * m.normal(B, C, H, W) + 0.5
    return Call((x, 1.0 + m.normal(C, scale=0.2), m.normal(C, scale=0.2)), {"groups": G})


def make_to_uint8(m: Maker, B: int, C: int, H: int, W: int) -> Call:
    return Call((m.normal(B, C, H, W, scale=0.7),), {})


MAKERS: dict[str, Callable[..., Call]] = {
    name.removeprefix("make_"): value for name, value in list(globals().items()) if name.startswith("make_")
}
