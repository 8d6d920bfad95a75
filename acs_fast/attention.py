"""One small chooser over the attention kernels that this machine has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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
NO_KERNEL = ("No available kernel", "No viable backend", "No operator found")  # PyTorch's; the last xformers'
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
    where `flash` and `math` are all there is, the first that is able wins without a measurement: tried by
    hand, `flash` was the faster one at every shape.
    """
    b, t, h, d = shape
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(b, t, 3, h, d, generator=generator, device=device).to(dtype)
    if name != "auto":
        if reason := _refusal(Attention(name), qkv):
            raise InputError(f"attention {name} cannot run here: {reason}; use auto")
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
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an import of a wheel that was built for another torch raises many kinds
        if attention.name == "xformers" and (reason := _why_no_xformers()):
            return reason
        if not isinstance(error, RuntimeError | NotImplementedError | ValueError):
            raise
        text = " ".join(str(error).split())
        missing = any(sign in text for sign in NO_KERNEL)
        return "it takes no such device, dtype or head size" if missing else text[:200]
    return None


def _why_no_xformers() -> str | None:
    """Why xformers' operators cannot be called, in one phrase; None if they can."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed"
    try:
        from xformers import _cpp_lib
        from xformers.ops import memory_efficient_attention  # noqa: F401

        # where this is set, xformers has imported without its kernels
        failure = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    except Exception as error:
        failure = error
    if failure is None:
        return None
    lines = str(failure).strip().splitlines() or [""]
    line = next((line for line in lines if "PyTorch" in line), lines[0]).strip()[:120]
    return (
        f"xformers {_version('xformers')} cannot be loaded beside torch {torch.__version__} "
        f"({type(failure).__name__}: {line}); install the release that was built for this torch"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def table(device: torch.device) -> str:
    """What `acs-fast env` prints: each kernel at a step of DiT-XL/2 of one image, `yes` or why not."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    qkv = torch.zeros(2, 256, 3, 16, 72, dtype=dtype, device=device)
    lines = []
    for name in KERNELS:
        reason = _refusal(Attention(name), qkv)
        lines.append(f"attention {name}: {'yes' if reason is None else f'no ({reason})'}")
    return "\n".join(lines)


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
