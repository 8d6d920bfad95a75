"""Production shapes of every op, the bytes and FLOP it needs, and its launches in eager PyTorch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from acs_fast.kernels import reference
from acs_fast.testing import Call, Case, plain, tensors
from benchmarks.launches import Launch

# One H200: a large copy and a large dense bf16 product, both measured on such a card, not by this project.
COPY_RATE, MATRIX_RATE = 4.3e12, 790e12

LATENT = {"C": 4, "H": 32, "W": 32}  # DiT-XL/2 at 256 pixels
WIDTH = 128  # of the discriminator ConvNet-3
VAE = ((512, 32), (512, 64), (512, 128), (256, 128), (256, 256), (128, 256))  # channels, pixels of its norms


def production(batch: int) -> list[Case]:
    """Every op at the shapes of DiT-XL/2, a latent ConvNet-3 and the VAE decoder, for `batch` images."""
    tokens = {"T": 256, "D": 1152}
    cases = [
        Case(op, {"B": b, **tokens}) for op in ("adaln", "gated_residual_adaln") for b in (batch, 2 * batch)
    ]  # without and with the null branch of classifier-free guidance
    cases += [Case(op, {"B": batch, **LATENT}) for op in ("philox_normal", "pred_xstart", "guided_step")]
    for n in (1, 2):
        first = {"N": n, "B": batch, "C_in": 4, "C": WIDTH, "H": 32, "W": 32, "G": WIDTH}
        cases.append(Case("conv_norm_act_pool", first, {"shared": True}))
        cases.append(Case("conv_norm_act_pool_backward_input", first))
        for size in (16, 8):
            later = {**first, "C_in": WIDTH, "H": size, "W": size}
            cases.append(Case("conv_norm_act_pool", later))
            cases.append(Case("conv_norm_act_pool_backward_input", later))
        fused = {"N": n, "B": batch, **LATENT, "width": WIDTH, "G": WIDTH}
        cases.append(Case("discriminator_guided_step", fused))
        objective = {"objective": "adversarial" if n == 1 else "learnability"}
        for k in (10, 1000):
            cases.append(Case("classifier_head_grad", {"B": batch, "F": WIDTH * 16, "K": k}, objective))
            net = {"B": batch, **LATENT, "width": WIDTH, "depth": 3, "G": WIDTH, "K": k}
            cases.append(Case("discriminator_guidance", net, objective))
    for channels, size in VAE:
        shape = {"B": batch, "C": channels, "H": size, "W": size, "G": 32}
        cases.append(Case("group_norm_silu", shape))
    return [*cases, Case("to_uint8", {"B": batch, "C": 3, "H": 256, "W": 256})]


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    """What an op runs in: the sampler's own state may be fp32."""
    if op == "philox_normal":
        return (torch.float32,)
    state = op in ("pred_xstart", "guided_step", "to_uint8")
    return (torch.bfloat16, torch.float32) if state else (torch.bfloat16,)


def size(tree: Any) -> int:
    """Bytes of the tensors in a tree."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))


def _latent_parts(call: Call, variance: bool) -> dict[str, float]:
    """Of `denoised`, the null half counts on the guided channels alone; of the step table, one row."""
    x, denoised = call.args[:2]
    table = next(t for t in call.args if isinstance(t, Tensor) and t.dtype == torch.float32 and t.dim() == 2)
    channels, all_channels = x.shape[1], denoised.shape[1]
    read = (all_channels if variance else channels) + call.kwargs["cfg_channels"]
    return {"denoised": read / (2 * all_channels), "table": 1 / len(table)}


def required_bytes(case: Case, call: Call, result: Any) -> int:
    """The bytes that no implementation can avoid: inputs that matter read once, outputs written once.

    What lies between the stages of an op does not count, since a kernel may keep it on the chip.
    """
    names = list(inspect.signature(getattr(reference, case.op)).parameters)
    part: dict[str, float] = {}
    if case.op in ("adaln", "gated_residual_adaln"):  # of a table, a row per sample
        part = dict.fromkeys(("gate", "shift", "scale"), case.shape["B"] / len(call.args[-2]))
    elif case.op == "pred_xstart":
        part = _latent_parts(call, variance=False)
    elif case.op in ("guided_step", "discriminator_guided_step", "discriminator_guidance"):
        part = _latent_parts(call, variance=call.kwargs["learned_range"])
    total = float(size(result))
    for name, value in zip(names, call.args, strict=False):
        total += part.get(name, 1.0) * size(value)
    if case.op in ("conv_norm_act_pool_backward_input", "discriminator_guided_step"):
        total -= size(call.args[-1].bias)  # the derivative does not depend on it
    return round(total)


def flop(op: Callable[..., Any], call: Call) -> int:
    """2 x multiply-add of the matrix products and convolutions, by PyTorch's counter."""
    with FlopCounterMode(display=False) as counter:
        op(*call.args, **call.kwargs)
    return int(counter.get_total_flops())


# calls that allocate or change metadata only; views are told by their schema
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "scalar_tensor",
}


class LaunchCounter(TorchDispatchMode):
    """Counts the ATen calls that launch a kernel on a GPU, each once, though some launch several."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_LAUNCH:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def eager_launches(case: Case, call: Call) -> tuple[int, int]:
    """ATen calls with a kernel of an op in eager PyTorch, autograd's too; then with the noise as one call.

    Most of a step's calls are Philox, for which `torch.randn` is one call, though not keyed by an image.
    """
    with LaunchCounter() as counter:
        getattr(plain, case.op)(*call.args, **call.kwargs)
    total, with_noise = (
        len(counter.calls),
        "seed" in inspect.signature(getattr(reference, case.op)).parameters,
    )
    if not with_noise:
        return total, total
    keys = torch.empty(1, dtype=torch.int64, device="meta")
    with LaunchCounter() as counter:
        plain.philox_normal(keys, keys, keys, keys, shape=(4, 32, 32))
    return total, total - len(counter.calls) + 1


def roofline_seconds(number_of_bytes: float, number_of_flop: float, copy: float, matrix: float) -> float:
    """The longer of moving the bytes and of the products, at given rates; an overlap of both is assumed."""
    return max(number_of_bytes / copy, number_of_flop / matrix)


# --- what the Triton kernels move ------------------------------------------------------------------------

L2_BYTES, RESIDENT = 50e6, 264  # of an H200; programs that run at once, two for each of 132 multiprocessors


def traffic(launch: Launch) -> dict[str, float]:
    """Argument -> how often its bytes cross the memory bus in one launch, where that is not once.

    Both halves of `denoised` are read, of the null one no variance; of the step table, one row.
    `group_norm_silu` reads x for the statistics and again to normalise it: from memory where the groups in
    work overflow the L2.
    """
    times, tensors = {}, launch.tensors
    if "denoised" in tensors:
        channels = tensors["denoised"].shape[1] / tensors["x"].shape[-3]
        variance = launch.arguments.get("LEARNED_RANGE", False) and channels == 2
        times["denoised"] = (2 + variance) / (2 * channels)
    if "table" in tensors:
        times["table"] = 1 / len(tensors["table"])
    if launch.name == "group_norm_silu._kernel":
        groups = min(launch.grid[0], RESIDENT) / launch.arguments["PARTS"]
        in_work = groups * launch.arguments["NUMEL"] * tensors["x"].element_size()
        times["x"] = 2.0 if in_work > L2_BYTES else 1.0
    return times


def moved_bytes(launches: list[Launch]) -> int:
    """What a Triton op's launches move: each tensor argument once, but for the rules above.

    What programs of one launch read again (weights, tables, a sample's gradient for its norm) counts once:
    the L2 still holds it.
    """
    total = 0.0
    for launch in launches:
        times = traffic(launch)
        total += sum(times.get(name, 1.0) * size(t) for name, t in launch.tensors.items())
    return round(total)
