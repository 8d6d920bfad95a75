"""In which type the reference computes, and where its results go."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The type that is computed in: float64 for float64, else fp32."""
    return x.double() if x.dtype == torch.float64 else x.float()


def give(out: Tensor | None, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The result: in `dtype`, or written into `out`."""
    return value.to(dtype) if out is None else out.copy_(value)
