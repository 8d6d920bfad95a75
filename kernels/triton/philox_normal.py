"""Counter-based noise in Triton: one Philox call for four elements."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.device import noise_key, normal_block
from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, options


@triton.jit
def _kernel(class_labels, indices, seed, step, out, numel, blocks, BLOCK: tl.constexpr):
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    key = noise_key(class_labels, indices, seed, step, b)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    z = normal_block(block * BLOCK, key, BLOCK)
    tl.store(out + b.to(tl.int64) * numel + offsets, z.to(out.dtype.element_ty), mask=offsets < numel)


def philox_normal(
    class_labels: Tensor,
    indices: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    shape: tuple[int, ...],
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals keyed by (seed, class, index, step) and element, as the reference specifies them.

    class_labels, indices: int64 [B]; seed, step: int64 [1]. Returns fp32 [B, *shape], or fills `out` of fp32,
    bf16 or fp16. Philox: Salmon et al. 2011.
    """
    batch, numel = len(class_labels), math.prod(shape)
    if out is None:
        out = torch.empty((batch, *shape), dtype=torch.float32, device=class_labels.device)
    check("philox_normal", class_labels=class_labels, indices=indices, seed=seed, step=step, out=out)
    check_shape("philox_normal", "indices", indices, (batch,))
    check_shape("philox_normal", "out", out, (batch, *shape))
    block = block_of(numel, 1024)
    blocks = cdiv(numel, block)
    _kernel[(batch * blocks,)](
        class_labels, indices, seed, step, out, numel, blocks, BLOCK=block, **options(4)
    )
    return out
