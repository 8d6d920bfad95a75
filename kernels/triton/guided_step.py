"""The guided sampling step in Triton: one launch, the noise made inside, the norms taken inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.device import (
    CFG_SCALE,
    guided_eps,
    noise_key,
    norm_add,
    norm_of,
    normal_block,
    push_length,
    table_row,
    unpushed,
)
from acs_fast.kernels.triton.launch import MANY_PROGRAMS, block_of, cdiv, check, check_shape, options


@triton.jit
def _kernel(x, denoised, class_labels, indices, seed, step, table, gradient, out, batch, sample_stride,
            cfg_elements, NUMEL: tl.constexpr, CLIP: tl.constexpr, LEARNED_RANGE: tl.constexpr,
            BLOCK: tl.constexpr, NORM_BLOCK: tl.constexpr):  # fmt: skip
    # A program updates one block of a sample. Every program of a sample takes the norms over all of it, which
    # L2 serves; they do not depend on x, so `out` may be x.
    blocks: tl.constexpr = (NUMEL + BLOCK - 1) // BLOCK
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = table_row(table, step)
    at = b.to(tl.int64) * NUMEL
    if gradient is not None:
        largest, total = tl.zeros([NORM_BLOCK], tl.float32), tl.zeros([NORM_BLOCK], tl.float32)
        for first in range(0, NUMEL, NORM_BLOCK):
            lanes = first + tl.arange(0, NORM_BLOCK)
            g = tl.load(gradient + at + lanes, mask=lanes < NUMEL, other=0.0).to(tl.float32)
            largest, total = norm_add(largest, total, g)
        top, norm = norm_of(largest, total)
        length = push_length(denoised, b, batch, sample_stride, cfg_elements, row, NUMEL, NORM_BLOCK)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < NUMEL
    value = tl.load(x + at + offsets, mask=mask, other=0.0).to(tl.float32)
    eps = guided_eps(denoised, b, batch, offsets, mask, sample_stride, cfg_elements, tl.load(row + CFG_SCALE))
    noise = normal_block(block * BLOCK, noise_key(class_labels, indices, seed, step, b), BLOCK)
    value = unpushed(
        value, eps, noise, denoised, b, offsets, mask, sample_stride, row, NUMEL, CLIP, LEARNED_RANGE
    )
    if gradient is not None:
        g = tl.load(gradient + at + offsets, mask=mask, other=0.0).to(tl.float32)
        value += length * (g / top / norm)
    tl.store(out + at + offsets, value.to(out.dtype.element_ty), mask=mask)


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
    """x_{t-1} of equations (1), (2), (4), as the reference specifies it: [B, C, H, W] in x's dtype.

    x, gradient: [B, C, H, W]; denoised: [2B, C or 2C, H, W]; class_labels, indices: int64 [B]; seed, step:
    int64 [1]; table: fp32 [steps, COLUMNS]. `out` may be x. A sample's result does not depend on the batch.
    """
    batch, channels, height, width = x.shape
    out = torch.empty_like(x) if out is None else out
    check("guided_step", x=x, denoised=denoised, class_labels=class_labels, indices=indices, seed=seed,
          step=step, table=table, gradient=gradient, out=out)  # fmt: skip
    check_denoised("guided_step", x, denoised, learned_range)
    check_shape("guided_step", "class_labels", class_labels, (batch,))
    check_shape("guided_step", "indices", indices, (batch,))
    check_shape("guided_step", "out", out, tuple(x.shape))
    if gradient is not None:
        check_shape("guided_step", "gradient", gradient, tuple(x.shape))
    numel, area = channels * height * width, height * width
    block = block_of(numel, 1024 if batch * cdiv(numel, 1024) >= MANY_PROGRAMS else 512)
    _kernel[(batch * cdiv(numel, block),)](
        x, denoised, class_labels, indices, seed, step, table, gradient, out, batch,
        denoised.shape[1] * area, cfg_channels * area, NUMEL=numel, CLIP=clip, LEARNED_RANGE=learned_range,
        BLOCK=block, NORM_BLOCK=block_of(numel, 2048), **options(4),
    )  # fmt: skip
    return out


def check_denoised(op: str, x: Tensor, denoised: Tensor, learned_range: bool) -> None:
    """Raises ValueError unless denoised is [2B, C or 2C, H, W], and 2C for a learned-range variance."""
    batch, channels, height, width = x.shape
    wide = learned_range or denoised.shape[1] != channels
    check_shape(op, "denoised", denoised, (2 * batch, 2 * channels if wide else channels, height, width))
