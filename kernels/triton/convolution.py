"""Device functions of the discriminator's blocks: convolution, group sums, activation, input gradient.

Both products run on tensor cores: an implicit matrix product over (input channel, tap) forward, and over
(output channel, row offset) backward. Height, width and channel counts are constexpr, so indices cost shifts.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def multiply_add(a, b, acc):
    """acc + a b in fp32."""
    if INTERPRETED:  # there bf16 is stored as integers, and tl.dot would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def group_sum(v, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Each entry of v [BLOCK] replaced by the sum over its aligned group of SIZE entries."""
    if SIZE > 1:
        group = tl.arange(0, BLOCK) // SIZE
        v = tl.sum(tl.where(group[:, None] == group[None, :], v[None, :], 0.0), axis=1)
    return v


@triton.jit
def activate(u, SILU: tl.constexpr):
    """silu(u) or relu(u)."""
    return u * tl.sigmoid(u) if SILU else tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activation_slope(u, SILU: tl.constexpr):
    """The derivative of `activate`; 0 for relu at 0, as PyTorch has it."""
    if SILU:
        s = tl.sigmoid(u)
        slope = s * (1.0 + u * (1.0 - s))
    else:
        slope = tl.where(u > 0.0, 1.0, 0.0)
    return slope


@triton.jit
def conv3x3(x, weight, y, column, co, co_mask, C_IN: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """3x3 convolution, padding 1, of one sample at the positions (y, column): fp32 [P, C] of the channels co.

    x: the sample's [C_IN, H, W]; weight: the network's [C_out, C_IN, 3, 3]. With few input channels the inner
    axis is (input channel, tap); else taps come one by one, and a tap's bounds are of the positions alone.
    """
    FLAT: tl.constexpr = C_IN < BLOCK_K
    CHUNKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (9 * C_IN + BLOCK_K - 1) // BLOCK_K if FLAT else 9 * CHUNKS
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(0, STEPS):
        if FLAT:
            k = i * BLOCK_K + lane
            live = k < 9 * C_IN
            ci, dy, dx = k // 9, (k % 9 // 3)[:, None] - 1, (k % 3)[:, None] - 1
        else:
            tap = i // CHUNKS
            ci = i % CHUNKS * BLOCK_K + lane
            k, live = ci * 9 + tap, ci < C_IN
            dy, dx = tap // 3 - 1, tap % 3 - 1
        row, col = y[None, :] + dy, column[None, :] + dx
        inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
        at = ci[:, None] * (H * W) + (row * W + col)
        a = tl.load(x + at, mask=live[:, None] & inside, other=0.0)  # [K, P]: lanes along positions
        w = tl.load(weight + co[:, None] * (9 * C_IN) + k[None, :],
                    mask=co_mask[:, None] & live[None, :], other=0.0)  # fmt: skip
        acc = multiply_add(tl.trans(a), tl.trans(w), acc)
    return acc


@triton.jit
def output_gradient(grad, xhat, gamma, beta, co, y, column, mask, H: tl.constexpr, W: tl.constexpr,
                    SILU: tl.constexpr):  # fmt: skip
    """(xhat, d L / d xhat) [C, P], d = gamma act'(gamma xhat + beta) grad[p / 2] / 4; zeros where masked."""
    h = tl.load(xhat + co[:, None] * (H * W) + (y * W + column)[None, :], mask=mask, other=0.0).to(tl.float32)
    pooled = co[:, None] * ((H // 2) * (W // 2)) + (y // 2 * (W // 2) + column // 2)[None, :]
    g = tl.load(grad + pooled, mask=mask, other=0.0).to(tl.float32)
    u = gamma[:, None] * h + beta[:, None]
    return h, g * (0.25 * gamma[:, None]) * activation_slope(u, SILU)


@triton.jit
def _step(i, gamma, beta, C_OUT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_CO: tl.constexpr):
    """(channels, which of them are, gamma, beta) of the i-th step over a network's output channels."""
    lane = tl.arange(0, BLOCK_CO)
    co = i * CHANNELS + lane
    mask = (lane < CHANNELS) & (co < C_OUT)
    scale = tl.load(gamma + co, mask=mask, other=0.0).to(tl.float32)
    return co, mask, scale, tl.load(beta + co, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def group_means(d_means, dh_means, slot, grad, xhat, gamma, beta, C_OUT: tl.constexpr, GROUP: tl.constexpr,
                H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
                BLOCK_CO: tl.constexpr, BLOCK_S: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Sets mean(d) and mean(d xhat) of each channel's group: rows from `slot` on, one per step over channels.

    d_means, dh_means: [SLOTS, BLOCK_CO]. Taken once for a sample and network, however many its tiles.
    """
    STEPS: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    share: tl.constexpr = 1.0 / (GROUP * H * W)
    place = tl.arange(0, SLOTS)[:, None]
    for i in range(0, STEPS):
        co, co_mask, scale, shift = _step(i, gamma, beta, C_OUT, CHANNELS, BLOCK_CO)
        d_sum = tl.zeros([BLOCK_CO, BLOCK_S], tl.float32)
        dh_sum = tl.zeros([BLOCK_CO, BLOCK_S], tl.float32)
        for first in range(0, H * W, BLOCK_S):
            p = first + tl.arange(0, BLOCK_S)
            mask = co_mask[:, None] & (p < H * W)[None, :]
            h, d = output_gradient(grad, xhat, scale, shift, co, p // W, p % W, mask, H, W, SILU)
            d_sum += d
            dh_sum += d * h
        d_mean = group_sum(tl.sum(d_sum, axis=1), GROUP, BLOCK_CO) * share
        dh_mean = group_sum(tl.sum(dh_sum, axis=1), GROUP, BLOCK_CO) * share
        d_means = tl.where(place == slot + i, d_mean[None, :], d_means)
        dh_means = tl.where(place == slot + i, dh_mean[None, :], dh_means)
    return d_means, dh_means


@triton.jit
def transposed_product(acc, d_means, dh_means, slot, grad, xhat, rstd, weight, gamma, beta, first_row,
                       first_ci, C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUP: tl.constexpr,
                       H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
                       BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_P: tl.constexpr,
                       SLOTS: tl.constexpr):  # fmt: skip
    """acc [P, 4 CI] plus a network's product, for whole rows of a sample from first_row; see `shift_columns`.

    The transposed convolution splits. The product sums over row offsets, with d conv read from the row above,
    the own one and the row below. Column offsets are columns of the product: j CI + ci for the offset j - 1,
    j = 3 is padding. So d conv is evaluated 3 times, not 9. Positions past the image hold garbage.
    """
    STEPS: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    position, place = tl.arange(0, BLOCK_P), tl.arange(0, SLOTS)[:, None]
    column, j = position % W, tl.arange(0, 4 * BLOCK_CI) // BLOCK_CI
    ci = first_ci + tl.arange(0, 4 * BLOCK_CI) % BLOCK_CI
    for i in range(0, STEPS):
        co, co_mask, scale, shift = _step(i, gamma, beta, C_OUT, CHANNELS, BLOCK_CO)
        inverse = tl.load(rstd + co // GROUP, mask=co_mask, other=0.0)
        d_mean = tl.sum(tl.where(place == slot + i, d_means, 0.0), axis=0)
        dh_mean = tl.sum(tl.where(place == slot + i, dh_means, 0.0), axis=0)
        for dy in range(0, 3):
            y = first_row + position // W + dy - 1
            mask = co_mask[:, None] & ((y >= 0) & (y < H))[None, :]
            h, d = output_gradient(grad, xhat, scale, shift, co, y, column, mask, H, W, SILU)
            d = tl.where(mask, inverse[:, None] * (d - d_mean[:, None] - h * dh_mean[:, None]), 0.0)
            tap = (2 - dy) * 3 + (2 - j)
            w = tl.load(weight + (co * (9 * C_IN))[:, None] + (ci * 9 + tap)[None, :],
                        mask=co_mask[:, None] & ((j < 3) & (ci < C_IN))[None, :], other=0.0)  # fmt: skip
            acc = multiply_add(tl.trans(d.to(w.dtype)), w, acc)
    return acc


@triton.jit
def shift_columns(acc, W: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_P: tl.constexpr):
    """d L / d x [CI, P] of the product [P, 4 CI], each column offset read from a neighbour in the row."""
    position, j = tl.arange(0, BLOCK_P), tl.arange(0, 4 * BLOCK_CI) // BLOCK_CI
    beside = position[:, None] + j[None, :] - 1
    x = (position % W)[:, None] + j[None, :] - 1
    moved = tl.gather(acc, tl.minimum(tl.maximum(beside, 0), BLOCK_P - 1), axis=0)
    moved = tl.trans(tl.where((x >= 0) & (x < W) & (j < 3)[None, :], moved, 0.0))
    return tl.sum(tl.reshape(moved, [4, BLOCK_CI, BLOCK_P]), axis=0)
