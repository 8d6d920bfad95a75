"""Images to bytes in Triton: clamp, round and NCHW to NHWC in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, options


@triton.jit
def _kernel(x, out, numel, area, blocks, C: tl.constexpr, BLOCK: tl.constexpr):
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    to = block * BLOCK + tl.arange(0, BLOCK)  # p C + c: writes are in order, reads come out of L1
    mask = to < numel
    at = b.to(tl.int64) * numel
    value = tl.load(x + at + (to % C) * area + to // C, mask=mask, other=0.0).to(tl.float32)
    value = (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1.0) * 127.5
    value = (value + 12582912.0) - 12582912.0  # 1.5 2^23: the sum's last bit is a unit, rounded half to even
    tl.store(out + at + to, value.to(tl.int32).to(tl.uint8), mask=mask)


def to_uint8(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Float [B, C, H, W] in [-1, 1] to bytes [B, H, W, C]: (clamp(x) + 1) 127.5, rounded half to even."""
    batch, channels, height, width = x.shape
    if out is None:
        out = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=x.device)
    check("to_uint8", x=x, out=out)
    check_shape("to_uint8", "out", out, (batch, height, width, channels))
    numel = channels * height * width
    block = block_of(numel, 1024)
    blocks = cdiv(numel, block)
    # without contraction: a fused multiply-add would round the product and the sum at once
    _kernel[(batch * blocks,)](
        x, out, numel, height * width, blocks, C=channels, BLOCK=block, **options(4, fusion=False)
    )
    return out
