"""Gated residual, LayerNorm and modulation in Triton: one pass, both outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.adaln import check_table, layer_norm, row_warps, tokens_per_program
from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, options


@triton.jit
def _kernel(x, y, gate, shift, scale, rows, residual, out, tokens, gate_stride, shift_stride, scale_stride,
            eps, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    parts = tl.cdiv(tokens, TOKENS)
    b, first = tl.program_id(0) // parts, (tl.program_id(0) % parts) * TOKENS
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    row = tl.load(rows + b)
    gated = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    shifted = tl.load(shift + row * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scaled = 1.0 + tl.load(scale + row * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(TOKENS):
        token = first + i
        inside = mask & (token < tokens)
        at = (b.to(tl.int64) * tokens + token) * D + columns
        branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + gated * branch
        stored = value.to(residual.dtype.element_ty)  # the norm sees what the next block will see
        tl.store(residual + at, stored, mask=inside)
        value = layer_norm(stored.to(tl.float32), mask, D, eps) * scaled + shifted
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def gated_residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor,
    *,
    eps: float = 1e-6,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, adaln(r)) with r = x + gate[rows] y, where adaln sees r as it is stored (rounded to x's dtype).

    x, y: [B, T, D]; gate, shift, scale: [R, D] as in `adaln`; rows: int64 [B]. `out[0]` may be x.
    """
    batch, tokens, width = x.shape
    residual, normed = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    op, shape = "gated_residual_adaln", (batch, tokens, width)
    check(op, x=x, y=y, rows=rows, **{"out[0]": residual, "out[1]": normed})
    check_table(op, width, gate=gate, shift=shift, scale=scale)
    check_shape(op, "y", y, shape)
    check_shape(op, "rows", rows, (batch,))
    check_shape(op, "out[0]", residual, shape)
    check_shape(op, "out[1]", normed, shape)
    per_program = tokens_per_program(batch, tokens)
    block = block_of(width, 1 << 16)
    _kernel[(batch * cdiv(tokens, per_program),)](
        x, y, gate, shift, scale, rows, residual, normed, tokens, gate.stride(0), shift.stride(0),
        scale.stride(0), eps, D=width, TOKENS=per_program, BLOCK=block, **options(row_warps(block)),
    )  # fmt: skip
    return residual, normed
