"""Counter-based noise: specification in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from acs_fast.kernels.reference.precision import give

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox-4x32 multipliers (Salmon et al. 2011)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_MASK = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox-4x32-10 (Salmon et al. 2011): four 32-bit words per 128-bit counter.

    `counter` holds four broadcastable int64 tensors in [0, 2^32), `key` two.
    Returns int64 in [0, 2^32) with the four words on a new last axis.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # the low 64 bits of the product are right in two's complement, so both halves are
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def philox_normal(
    class_labels: Tensor,
    indices: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    shape: tuple[int, ...],
    out: Tensor | None = None,
) -> Tensor:
    """Standard normals that depend on (seed, class, index, step) and the element alone, never on the batch.

    Element e of an image takes word pair (e mod 4) // 2 of Philox counter (e // 4, step, index, class) under
    the key (seed mod 2^32, seed div 2^32), with u = word 2^-32 + 2^-33 in fp32 and Box-Muller:
    z_even = sqrt(-2 ln u0) cos(2 pi u1), z_odd = sqrt(-2 ln u0) sin(2 pi u1).

    class_labels, indices: int64 [B], in [0, 2^32). seed, step: int64 [1], read on the device.
    Returns fp32 [B, *shape], or fills `out` of any floating dtype (float64: Box-Muller in float64).
    """
    dtype = torch.float32 if out is None or out.dtype != torch.float64 else torch.float64
    numel = math.prod(shape)
    block = torch.arange((numel + 3) // 4, device=class_labels.device)[None, :]  # [1, numel / 4]
    counter = (block, step.view(1, 1), indices.long()[:, None], class_labels.long()[:, None])
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))  # [B, numel / 4, 4]
    uniform = (words.to(torch.float32) * 2.0**-32 + 2.0**-33).to(dtype)
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    value = normal.flatten(1)[:, :numel].reshape(-1, *shape)  # from [B, numel / 4, 2, 2]
    return give(out, value, dtype)
