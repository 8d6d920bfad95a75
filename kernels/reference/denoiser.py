"""Ops of the denoiser and of the VAE's side: specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.kernels.reference.precision import give, wide


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """LayerNorm without weights, then modulate: LN(x) (1 + scale[rows]) + shift[rows] (DiT, Peebles & Xie).

    x: [B, T, D]. shift, scale: [R, D], rows of a table (any row stride, last stride 1). rows: int64 [B].
    """
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    value = normed * (1.0 + wide(scale)[rows][:, None]) + wide(shift)[rows][:, None]
    return give(out, value, x.dtype)


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
    first, second = out or (None, None)
    residual = give(first, wide(x) + wide(gate)[rows][:, None] * wide(y), x.dtype)
    return residual, adaln(residual, shift, scale, rows, eps=eps, out=second)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """SiLU(GroupNorm(x)) of x [B, C, H, W] with weight, bias [C]."""
    return give(out, F.silu(F.group_norm(wide(x), groups, wide(weight), wide(bias), eps)), x.dtype)


def to_uint8(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Float [B, C, H, W] in [-1, 1] to bytes [B, H, W, C]: (clamp(x) + 1) 127.5, rounded half to even."""
    value = ((wide(x).clamp(-1.0, 1.0) + 1.0) * 127.5).round().permute(0, 2, 3, 1)
    return give(out, value, torch.uint8).contiguous()
