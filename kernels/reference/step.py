"""The guided sampling step, equations (1), (2), (4) of METHOD.md: specification in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from acs_fast.kernels.reference.noise import philox_normal
from acs_fast.kernels.reference.precision import give, wide
from acs_fast.kernels.structures import Column


def _guided_eps(x: Tensor, denoised: Tensor, row: Tensor, cfg_channels: int) -> Tensor:
    """eps = null + cfg (cond - null) on the first cfg_channels, cond on the others (1): [B, C, H, W]."""
    cond, null = wide(denoised)[:, : x.shape[1]].to(wide(x).dtype).chunk(2)
    eps = null + row[Column.CFG_SCALE] * (cond - null)
    return torch.cat((eps[:, :cfg_channels], cond[:, cfg_channels:]), dim=1)


def _row(table: Tensor, step: Tensor) -> Tensor:
    return wide(table).index_select(0, step)[0]


def _xstart(x: Tensor, eps: Tensor, row: Tensor, clip: bool) -> Tensor:
    value = row[Column.INV_SQRT_ALPHA] * wide(x) - row[Column.EPS_TO_XSTART] * eps  # (2)
    return value.clamp(-1.0, 1.0) if clip else value


def pred_xstart(
    x: Tensor,
    denoised: Tensor,
    step: Tensor,
    table: Tensor,
    *,
    cfg_channels: int,
    clip: bool,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The predicted clean sample x0 of equations (1) and (2), which the discriminator sees: [B, C, H, W].

    x: [B, C, H, W]. denoised: [2B, C or 2C, H, W], the denoiser's raw output: the B conditional samples, then
    the B null ones; channels beyond C (the variance) are not read. step: int64 [1], the row of `table`.
    table: fp32 [steps, COLUMNS]. cfg_channels: 1 to C. dtype: of the result, default x's.
    """
    row = _row(table, step)
    eps = _guided_eps(x, denoised, row, cfg_channels)
    return give(out, _xstart(x, eps, row, clip), dtype or x.dtype)


def guided_step(
    x: Tensor,
    denoised: Tensor,
    class_labels: Tensor,
    indices: Tensor,
    seed: Tensor,
    step: Tensor,
    table: Tensor,
    gradient: Tensor | None = None,
    *,
    cfg_channels: int,
    clip: bool,
    learned_range: bool,
    out: Tensor | None = None,
) -> Tensor:
    """x_{t-1} of equations (1), (2), (4): the sampler's step and the push along gradient / ||gradient||.

    The step is that of `Column`; its noise is `philox_normal` of (seed, class, index, step). A gradient of
    zeros, and None, push nothing. The norm is that of each sample, taken over squares scaled by its largest
    element, so that they do not underflow.

    Arguments as in `pred_xstart` and `philox_normal`. gradient: [B, C, H, W], any floating dtype.
    learned_range: channels C to 2C of the conditional half of `denoised` hold the variance (IDDPM (15)).
    `out` may be x.
    """
    row, channels = _row(table, step), x.shape[1]
    eps = _guided_eps(x, denoised, row, cfg_channels)
    noise = philox_normal(
        class_labels, indices, seed, step, shape=tuple(x.shape[1:]), out=torch.empty_like(wide(x))
    )
    deviation = row[Column.NOISE]
    if learned_range:
        v = (wide(denoised[: len(x), channels:]).to(eps.dtype) + 1.0) / 2.0
        low, high = row[Column.MIN_LOG_VARIANCE], row[Column.MAX_LOG_VARIANCE]
        deviation = deviation * torch.exp(0.5 * (low + v * (high - low)))
    value = row[Column.FROM_XSTART] * _xstart(x, eps, row, clip) + row[Column.FROM_X] * wide(x)
    value = value + deviation * noise
    if gradient is not None:
        norm = torch.linalg.vector_norm(eps, dim=(1, 2, 3), keepdim=True)
        value = value + (row[Column.PUSH] + row[Column.PUSH_PER_EPS] * norm) * _unit(wide(gradient))  # (4)
    return give(out, value, x.dtype)


def _unit(g: Tensor) -> Tensor:
    tiny = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
    return g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
