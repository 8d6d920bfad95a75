"""Device functions that kernels share: Philox noise, the scaled norm, and the guided update.

A sample's NUMEL elements are numbered c H W + p, its `offsets`. Everything is computed in fp32. Bounds of
loops are constexpr: Triton's interpreter cannot loop to a runtime bound under NumPy 2.4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from acs_fast.kernels.structures import COLUMNS as _COLUMNS
from acs_fast.kernels.structures import Column

COLUMNS = tl.constexpr(_COLUMNS)
CFG_SCALE = tl.constexpr(Column.CFG_SCALE)
INV_SQRT_ALPHA = tl.constexpr(Column.INV_SQRT_ALPHA)
EPS_TO_XSTART = tl.constexpr(Column.EPS_TO_XSTART)
FROM_XSTART = tl.constexpr(Column.FROM_XSTART)
FROM_X = tl.constexpr(Column.FROM_X)
NOISE = tl.constexpr(Column.NOISE)
MIN_LOG_VARIANCE = tl.constexpr(Column.MIN_LOG_VARIANCE)
MAX_LOG_VARIANCE = tl.constexpr(Column.MAX_LOG_VARIANCE)
PUSH = tl.constexpr(Column.PUSH)
PUSH_PER_EPS = tl.constexpr(Column.PUSH_PER_EPS)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


# --- noise ---------------------------------------------------------------------------------------------


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 (Salmon et al. 2011): four uint32 words of a counter and a key of uint32."""
    for _ in tl.static_range(10):
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low2 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        high0, high2 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def box_muller(word0, word1):
    """(z_even, z_odd) = sqrt(-2 ln u0) (cos, sin)(2 pi u1), u = word 2^-32 + 2^-33, of two uint32 words.

    The angle is reduced exactly to |r| <= 1/4 half turns, then minimax polynomials (error below 4e-9) serve:
    tl.cos would keep a table in local memory for angles that do not occur here.
    """
    u0 = word0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u1 = word1.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    quarter = tl.floor(4.0 * u1 + 0.5)
    r = 2.0 * u1 - 0.5 * quarter
    s = r * r
    sine = ((-0.58901221 * s + 2.54976105) * s - 5.16770768) * s * r + 3.14159264 * r
    cosine = (((0.23126092 * s - 1.33503591) * s + 4.05870692) * s - 4.93480216) * s + 1.0
    quadrant = quarter.to(tl.int32)
    odd = (quadrant & 1) != 0
    real, imaginary = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    real = tl.where(((quadrant + 1) & 2) != 0, -real, real)
    imaginary = tl.where((quadrant & 2) != 0, -imaginary, imaginary)
    radius = tl.sqrt(-2.0 * tl.log(u0))
    return radius * real, radius * imaginary


@triton.jit
def noise_key(class_labels, indices, seed, step, b):
    """(step, index, class, seed low, seed high) of sample b as uint32, from int64 tensors."""
    s = tl.load(seed)
    high = (s >> 32).to(tl.uint32)
    return (
        tl.load(step).to(tl.uint32),
        tl.load(indices + b).to(tl.uint32),
        tl.load(class_labels + b).to(tl.uint32),
        s.to(tl.uint32),
        high,
    )


@triton.jit
def normal_at(offsets, key):
    """The standard normal of each element: one Philox call per element, for any block of offsets."""
    step, index, label, low, high = key
    w0, w1, w2, w3 = philox_4x32((offsets // 4).to(tl.uint32), step, index, label, low, high)
    second, odd = (offsets & 2) != 0, (offsets & 1) != 0
    even_z, odd_z = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where(odd, odd_z, even_z)


@triton.jit
def normal_block(first, key, BLOCK: tl.constexpr):
    """`normal_at` of first .. first + BLOCK - 1, first a multiple of 4: one Philox call for four elements."""
    step, index, label, low, high = key
    quads = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox_4x32(quads.to(tl.uint32), step, index, label, low, high)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# --- the norm over squares scaled by the largest element -------------------------------------------------


@triton.jit
def norm_add(largest, total, g):
    """Takes a block of elements into lane-wise running norms: largest |g|, total = sum of (g / largest)^2.

    Start with zeros in the shape of g, end with `norm_of`. Squares of small gradients do not underflow.
    """
    new = tl.maximum(tl.maximum(largest, tl.abs(g)), TINY, propagate_nan=tl.PropagateNan.ALL)
    kept, added = largest / new, g / new
    return new, total * kept * kept + added * added


@triton.jit
def norm_of(largest, total):
    """(m, n) with g / m / n of unit norm, over all lanes of `norm_add`; a gradient of zeros stays zero."""
    top = tl.maximum(tl.max(largest), TINY)
    scale = largest / top
    return top, tl.maximum(tl.sqrt(tl.sum(total * scale * scale)), TINY, propagate_nan=tl.PropagateNan.ALL)


# --- the guided step -----------------------------------------------------------------------------------


@triton.jit
def table_row(table, step):
    """A pointer to the step's row of the table: tl.load(row + CFG_SCALE) and so on."""
    return table + tl.load(step) * COLUMNS


@triton.jit
def guided_eps(denoised, b, batch, offsets, mask, sample_stride, cfg_elements, cfg_scale):
    """eps = null + cfg (cond - null) on the first cfg_elements of sample b, cond on the others (1).

    Masked elements are 0. denoised: [2 batch, C or 2C, H, W], its samples sample_stride elements apart.
    """
    cond_at = denoised + b.to(tl.int64) * sample_stride
    cond = tl.load(cond_at + offsets, mask=mask, other=0.0).to(tl.float32)
    null_at = denoised + (b + batch).to(tl.int64) * sample_stride
    null = tl.load(null_at + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(offsets < cfg_elements, null + cfg_scale * (cond - null), cond)


@triton.jit
def xstart(x, eps, row, CLIP: tl.constexpr):
    """x0 = INV_SQRT_ALPHA x - EPS_TO_XSTART eps (2), clamped if CLIP."""
    value = tl.load(row + INV_SQRT_ALPHA) * x - tl.load(row + EPS_TO_XSTART) * eps
    if CLIP:
        value = tl.maximum(value, -1.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def unpushed(x, eps, noise, denoised, b, offsets, mask, sample_stride, row, NUMEL: tl.constexpr,
             CLIP: tl.constexpr, LEARNED_RANGE: tl.constexpr):  # fmt: skip
    """The step without its push: FROM_XSTART x0 + FROM_X x + NOISE std noise, of fp32 x, eps and noise."""
    deviation = tl.load(row + NOISE)
    if LEARNED_RANGE:
        variance_at = denoised + b.to(tl.int64) * sample_stride + NUMEL
        v = (tl.load(variance_at + offsets, mask=mask, other=0.0).to(tl.float32) + 1.0) * 0.5
        low, high = tl.load(row + MIN_LOG_VARIANCE), tl.load(row + MAX_LOG_VARIANCE)
        deviation = deviation * tl.exp(0.5 * (low + v * (high - low)))
    return (
        tl.load(row + FROM_XSTART) * xstart(x, eps, row, CLIP) + tl.load(row + FROM_X) * x + deviation * noise
    )


@triton.jit
def push_length(
    denoised, b, batch, sample_stride, cfg_elements, row, NUMEL: tl.constexpr, BLOCK: tl.constexpr
):
    """PUSH + PUSH_PER_EPS ||eps|| of sample b (4); eps is read only where the table asks for its norm."""
    length, per_eps = tl.load(row + PUSH), tl.load(row + PUSH_PER_EPS)
    if per_eps != 0.0:
        cfg_scale = tl.load(row + CFG_SCALE)
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, NUMEL, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            eps = guided_eps(
                denoised, b, batch, offsets, offsets < NUMEL, sample_stride, cfg_elements, cfg_scale
            )
            squares += eps * eps
        length += per_eps * tl.sqrt(tl.sum(squares))
    return length
