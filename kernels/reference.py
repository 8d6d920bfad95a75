"""Every op in plain PyTorch, fp32 inside: the specification that each kernel is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox-4x32 multipliers (Salmon et al. 2011)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_MASK = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10 (Salmon et al. 2011): four 32-bit words per 128-bit counter.

    `counter` holds four broadcastable int64 tensors in [0, 2^32); `key` two 32-bit integers.
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
    class_labels: Tensor, indices: Tensor, *, seed: int, step: int, shape: tuple[int, ...]
) -> Tensor:
    """Standard normals that depend on (seed, class, index, step) and the element alone, never on the batch.

    Element e of an image takes word pair (e mod 4) // 2 of Philox counter (e // 4, step, index, class) under
    the key (seed mod 2^32, seed div 2^32), with u = (word + 1/2) / 2^32 and Box-Muller:
    z_even = sqrt(-2 ln u0) cos(2 pi u1), z_odd = sqrt(-2 ln u0) sin(2 pi u1).

    class_labels, indices: int64 [B], non-negative. Returns fp32 [B, *shape] on their device.
    """
    numel = math.prod(shape)
    block = torch.arange((numel + 3) // 4, device=class_labels.device)[None, :]  # [1, N / 4]
    step_word = torch.full_like(block, step)
    counter = (block, step_word, indices.long()[:, None], class_labels.long()[:, None])
    words = philox_4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))  # [B, N / 4, 4]
    uniform = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., 0::2]))
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)  # [B, N / 4, 2, 2]
    return normal.flatten(1)[:, :numel].reshape(-1, *shape)
