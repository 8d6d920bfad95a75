"""The ops in CUDA C++, bound by ctypes: same names and signatures as `acs_fast.kernels.reference`.

setup.py builds the library where nvcc is found. Importing this module loads nothing and asks for no driver.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acs_fast.kernels.cuda.binding import Library

LIBRARY = Path(__file__).parent / "libacs_fast_cuda.so"
MINIMUM_CAPABILITY = (8, 0)

__all__ = ["discriminator_guidance", "guided_step", "philox_normal", "to_uint8", "why_not"]


@functools.cache
def _library() -> Library:
    return Library(LIBRARY, "cuda")


def why_not(device: torch.device) -> str | None:
    """Why the CUDA library cannot serve a device, in one phrase, or None if it can."""
    if not LIBRARY.exists():
        return "the CUDA library is not built (nvcc not found at install time)"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    try:
        _library()
    except OSError as error:
        return f"the CUDA library does not load ({error})"
    return None


@torch.compiler.disable
def philox_normal(*tensors: Tensor, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """As `reference.philox_normal`; `out` is of any dtype but float64."""
    return _library().philox_normal(*tensors, shape=shape, out=out)


@torch.compiler.disable
def to_uint8(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `reference.to_uint8`."""
    return _library().to_uint8(x, out=out)


@torch.compiler.disable
def guided_step(*tensors: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """As `reference.guided_step`, in one launch."""
    return _library().guided_step(*tensors, **options, out=out)


@torch.compiler.disable
def discriminator_guidance(*tensors: Any, out: Tensor | None = None, **options: Any) -> Tensor:
    """As `reference.discriminator_guidance`, in one launch; `binding.Library` names the shapes it takes."""
    return _library().discriminator_guidance(*tensors, **options, out=out)
