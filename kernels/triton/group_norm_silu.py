"""GroupNorm and SiLU in Triton: one launch, Welford's statistics, then a pass that normalises."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.launch import MANY_PROGRAMS, block_of, cdiv, check, check_shape, options


@triton.jit
def _statistics(x, NUMEL: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and population variance: Welford (1962) in each lane, lanes merged as by Chan et al. (1983)."""
    mean, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    lanes = tl.arange(0, BLOCK)
    FULL: tl.constexpr = NUMEL // BLOCK
    for i in range(0, FULL):
        value = tl.load(x + i * BLOCK + lanes).to(tl.float32)
        delta = value - mean
        mean += delta * (1.0 / (i + 1))
        squares += delta * (value - mean)
    count = tl.full([BLOCK], FULL, tl.float32)
    if FULL * BLOCK < NUMEL:
        mask = FULL * BLOCK + lanes < NUMEL
        delta = tl.load(x + FULL * BLOCK + lanes, mask=mask, other=0.0).to(tl.float32) - mean
        delta = tl.where(mask, delta, 0.0)
        mean += delta * (1.0 / (FULL + 1))
        squares += delta * delta * (FULL / (FULL + 1))
        count += mask.to(tl.float32)
    total = tl.sum(mean * count) / NUMEL
    return total, tl.sum(squares + count * (mean - total) * (mean - total)) / NUMEL


@triton.jit
def _kernel(x, weight, bias, out, groups, eps, AREA: tl.constexpr, NUMEL: tl.constexpr, PART: tl.constexpr,
            PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # A program normalises one of the PARTS parts of a group and takes the statistics of all of it: where
    # groups are fewer than multiprocessors, reading a group several times out of L2 beats idling.
    group, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    at = group.to(tl.int64) * NUMEL
    mean, variance = _statistics(x + at, NUMEL, BLOCK)
    rstd = tl.rsqrt(variance + eps)
    first_channel = (group % groups) * (NUMEL // AREA)
    for i in range(0, PART, BLOCK):
        within = i + tl.arange(0, BLOCK)
        offsets = part * PART + within
        mask = (within < PART) & (offsets < NUMEL)
        if AREA % BLOCK == 0:  # a block lies in one channel
            channel = first_channel + (part * PART + i) // AREA
            inside = part * PART + i < NUMEL
        else:
            channel, inside = first_channel + offsets // AREA, mask
        gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value - mean) * rstd * gamma + beta
        value = value * tl.sigmoid(value)
        tl.store(out + at + offsets, value.to(out.dtype.element_ty), mask=mask)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """SiLU(GroupNorm(x)) of x [B, C, H, W] with weight, bias [C]; in x's dtype."""
    batch, channels, height, width = x.shape
    out = torch.empty_like(x) if out is None else out
    check("group_norm_silu", x=x, weight=weight, bias=bias, out=out)
    check_shape("group_norm_silu", "weight", weight, (channels,))
    check_shape("group_norm_silu", "bias", bias, (channels,))
    check_shape("group_norm_silu", "out", out, tuple(x.shape))
    numel = channels // groups * height * width
    block = block_of(numel, 8192)
    parts, most = 1, 1 if out is x else 4  # the programs of a group all read x
    while parts < most and batch * groups * parts * 2 <= MANY_PROGRAMS and cdiv(numel, parts * 2) >= block:
        parts *= 2
    _kernel[(batch * groups * parts,)](
        x, weight, bias, out, groups, eps, AREA=height * width, NUMEL=numel,
        PART=cdiv(cdiv(numel, parts), block) * block if parts > 1 else numel, PARTS=parts, BLOCK=block,
        **options(max(1, min(block // 512, 16))),
    )  # fmt: skip
    return out
