"""The predicted clean sample in Triton: one pass over x and the denoiser's output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.device import CFG_SCALE, guided_eps, table_row, xstart
from acs_fast.kernels.triton.guided_step import check_denoised
from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, options


@triton.jit
def _kernel(x, denoised, step, table, out, batch, numel, sample_stride, cfg_elements, blocks,
            CLIP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = table_row(table, step)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    at = b.to(tl.int64) * numel
    value = tl.load(x + at + offsets, mask=mask, other=0.0).to(tl.float32)
    eps = guided_eps(denoised, b, batch, offsets, mask, sample_stride, cfg_elements, tl.load(row + CFG_SCALE))
    tl.store(out + at + offsets, xstart(value, eps, row, CLIP).to(out.dtype.element_ty), mask=mask)


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
    """x0 of equations (1) and (2), as the reference specifies it: [B, C, H, W] in `dtype`, default x's.

    x: [B, C, H, W]; denoised: [2B, C or 2C, H, W]; step: int64 [1]; table: fp32 [steps, COLUMNS].
    """
    batch, channels, height, width = x.shape
    out = torch.empty_like(x, dtype=dtype or x.dtype) if out is None else out
    check("pred_xstart", x=x, denoised=denoised, step=step, table=table, out=out)
    check_denoised("pred_xstart", x, denoised, False)
    check_shape("pred_xstart", "out", out, tuple(x.shape))
    numel, area = channels * height * width, height * width
    block = block_of(numel, 1024)
    blocks = cdiv(numel, block)
    _kernel[(batch * blocks,)](
        x, denoised, step, table, out, batch, numel, denoised.shape[1] * area, cfg_channels * area, blocks,
        CLIP=clip, BLOCK=block, **options(4),
    )  # fmt: skip
    return out
