"""What people give the parts, checked: whole numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from acs_fast.config import REAL_OBJECTIVES, InputError

Whole = int | Sequence[int] | Tensor
OBJECTIVES = ("adversarial", "nonsaturating")  # those that need no real images


def whole_numbers(values: Whole, name: str, end: int = 1 << 32) -> Tensor:
    """int64 [n] on the device of `values`, or the CPU; InputError unless they are whole, in [0, end)."""
    accepted = f"it must hold whole numbers from 0 to {end - 1}"
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{name} cannot be read as numbers ({error}); {accepted}") from error
    if found.dim() > 1 or found.numel() == 0:
        raise InputError(f"{name} has the shape {tuple(found.shape)}; give a number, or some in a row")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name} holds {str(found.dtype).removeprefix('torch.')}; {accepted}")
    found = found.reshape(-1).long()
    wrong = (found < 0) | (found >= end)
    if bool(wrong.any()):
        raise InputError(f"{name} holds {int(found[wrong][0])}; {accepted}")
    return found


def check_whole(value: object, name: str, low: int, high: int | None = None) -> None:
    """InputError unless `value` is a whole number from `low` to `high`."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):  # type: ignore[operator]
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise InputError(f"{name} is {value!r}, it must be a whole number, {span}")


def check_real(value: object, name: str, zero: bool) -> None:
    """InputError unless `value` is a finite number above 0, or with `zero` 0."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        raise InputError(
            f"{name} is {value!r}, it must be a finite number, {'at least' if zero else 'above'} 0"
        )


def check_objective(objective: str) -> None:
    """InputError unless a discriminator of sampled images alone can serve it."""
    accepted = " or ".join(OBJECTIVES)
    if objective in REAL_OBJECTIVES:
        raise InputError(
            f"objective {objective!r} needs a network trained on real images, which a Discriminator is not; "
            f"use {accepted}, or DistillConfig(objective={objective!r})"
        )
    if objective not in OBJECTIVES:
        raise InputError(f"objective is {objective!r}, it must be {accepted}")
