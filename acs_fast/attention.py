"""One small chooser over the attention kernels that this machine has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from acs_fast.config import InputError
from acs_fast.graph import capture

SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KERNELS = (*SDPA, "xformers")
CALLS, REPEATS = 20, 5
MARGIN = 1.1


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T / sqrt(d)) v by one kernel; what `auto` measured, and what refused.

    Call it with qkv [B, T, 3, H, d] as the fused projection leaves it; returns [B, T, H d].
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)  # a call's median, of what `auto` tried
    refusals: dict[str, str] = field(default_factory=dict)

    def __call__(self, qkv: Tensor) -> Tensor:
        b, t, _, h, d = qkv.shape
        if self.name == "xformers":
            from xformers.ops import memory_efficient_attention  # deferred: an optional package

            return memory_efficient_attention(*qkv.unbind(2)).reshape(b, t, h * d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPA[self.name]):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, h * d)


def choose(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Attention:
    """The attention for qkv of `shape` (B, T, H, d): the named kernel, or the fastest measured for `auto`.

    Raises InputError for a named kernel that cannot run here, with its reason. `auto` holds each kernel
    against `math` in fp32 and drops one that is further from it than rounding allows. Among those within
    `MARGIN` of the fastest the first of `KERNELS` wins, so that a repeated run chooses the same. On a CPU,
    where `flash` and `math` are all there is, the first that is able wins without a measurement.
    """
    b, t, h, d = shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(b, t, 3, h, d, generator=generator, device=device).to(dtype)
    if name != "auto":
        if reason := _refusal(Attention(name), qkv):
            raise InputError(f"--attention {name} cannot run here: {reason}; use auto")
        return Attention(name)
    refusals = {k: reason for k in KERNELS if (reason := _refusal(Attention(k), qkv))}
    able = [k for k in KERNELS if k not in refusals]
    expected = Attention("math")(qkv.float())
    seconds = {}
    for kernel in able:
        try:
            error = (Attention(kernel)(qkv).float() - expected).abs().max().item()
            if not error <= 16 * torch.finfo(dtype).eps * expected.abs().max().item():
                refusals[kernel] = f"it is off by {error:.1e} here"
                continue
            if not _is_measured(device):
                return Attention(kernel, {}, refusals)
            seconds[kernel] = _median_seconds(partial(Attention(kernel), qkv), device)
        except RuntimeError as failure:  # at this size, or within a capture
            refusals[kernel] = " ".join(str(failure).split())[:200]
    fastest = min(seconds.values())
    return Attention(next(k for k, s in seconds.items() if s <= MARGIN * fastest), seconds, refusals)


def _is_measured(device: torch.device) -> bool:
    return device.type != "cpu"


def _refusal(attention: Attention, qkv: Tensor) -> str | None:
    """Why a kernel cannot take this input, in one phrase, or None if it can."""
    try:
        attention(qkv[:1])
    except ImportError:
        return "it is not installed"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        text = " ".join(str(error).split())
        missing = "No available kernel" in text or "No viable backend" in text
        return "it takes no such device, dtype or head size" if missing else text[:200]
    return None


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call as the engine makes it, on CUDA from a graph: what a launch costs the host does not count."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    replay = capture(calls, calls).replay
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        replay()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / CALLS
