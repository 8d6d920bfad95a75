"""LayerNorm and modulation in Triton: a row is read once, kept in registers, and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, options


@triton.jit
def layer_norm(x, mask, D: tl.constexpr, eps):
    """(x - mean) / sqrt(variance + eps) of a row of D elements in a block; masked elements are 0."""
    centred = tl.where(mask, x - tl.sum(x) / D, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred) / D + eps)


@triton.jit
def _kernel(x, shift, scale, rows, out, tokens, shift_stride, scale_stride, eps, D: tl.constexpr,
            TOKENS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # A program takes TOKENS tokens of one sample: they share the modulation, which stays in registers.
    parts = tl.cdiv(tokens, TOKENS)
    b, first = tl.program_id(0) // parts, (tl.program_id(0) % parts) * TOKENS
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    row = tl.load(rows + b)
    shifted = tl.load(shift + row * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scaled = 1.0 + tl.load(scale + row * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(TOKENS):
        token = first + i
        inside = mask & (token < tokens)
        at = (b.to(tl.int64) * tokens + token) * D + columns
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = layer_norm(value, mask, D, eps) * scaled + shifted
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """LN(x) (1 + scale[rows]) + shift[rows], LayerNorm without weights (DiT, Peebles & Xie): [B, T, D].

    x: [B, T, D]. shift, scale: [R, D], rows of a table (any row stride, last stride 1). rows: int64 [B].
    """
    batch, tokens, width = x.shape
    out = torch.empty_like(x) if out is None else out
    check("adaln", x=x, rows=rows, out=out)
    check_table("adaln", width, shift=shift, scale=scale)
    check_shape("adaln", "rows", rows, (batch,))
    check_shape("adaln", "out", out, tuple(x.shape))
    per_program = tokens_per_program(batch, tokens)
    block = block_of(width, 1 << 16)
    _kernel[(batch * cdiv(tokens, per_program),)](
        x, shift, scale, rows, out, tokens, shift.stride(0), scale.stride(0), eps, D=width,
        TOKENS=per_program, BLOCK=block, **options(row_warps(block)),
    )  # fmt: skip
    return out


def check_table(op: str, width: int, **tables: Tensor) -> None:
    """Raises ValueError, naming op and argument, unless each table is [R, width] with contiguous rows."""
    for name, table in tables.items():
        check(op, **{name: table[0]})
        check_shape(op, name, table, (len(table), width))


def tokens_per_program(batch: int, tokens: int) -> int:
    """4 where that still leaves every multiprocessor several programs, else 1."""
    return 4 if batch * tokens >= 1 << 13 else 1


def row_warps(block: int) -> int:
    """Warps for a block that holds a row: 8 elements a thread, 16 bytes in half precision."""
    return max(1, min(block // 256, 16))
