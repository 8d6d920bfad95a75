"""What every launcher shares: checks of its arguments, block sizes, and the pinned launch options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acs_fast.kernels.structures import COLUMNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors: enough to fill a GPU of that size


def options(warps: int = 4, *, stages: int = 1, fusion: bool = True) -> dict[str, Any]:
    """Launch options of `kernel[grid](...)`, all pinned.

    fusion contracts multiply-adds; the default for it changes between Triton 3.9 and 3.10.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}


def check(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError, naming op and argument, for what no kernel takes: strides, types, another device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous, "
                f"it has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            current = torch.cuda.current_device()
            raise ValueError(f"{op}: {name} is on {tensor.device}, the current device is cuda:{current}")
        if name in ("seed", "step") and (tensor.dtype != torch.int64 or tensor.numel() != 1):
            raise ValueError(f"{op}: {name} must be one int64, it is {tensor.dtype} {tuple(tensor.shape)}")
        if name == "table" and (tensor.dtype != torch.float32 or tensor.shape[-1] != COLUMNS):
            raise ValueError(f"{op}: table must be float32 [steps, {COLUMNS}], it is {tuple(tensor.shape)}")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, it is {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError, naming op and argument, for another shape: a kernel would read beside it."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, it has {tuple(tensor.shape)}")


def check_even(op: str, height: int, width: int) -> None:
    """Raises ValueError for an odd height or width, which a 2x2 pool would cut."""
    if height % 2 or width % 2:
        raise ValueError(f"{op}: height and width must be even, they are {height} and {width}")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def block_of(numel: int, largest: int, smallest: int = 16) -> int:
    """The block for a range of `numel` elements: a power of 2 from `smallest` to `largest`."""
    return max(smallest, min(next_power_of_2(numel), largest))
