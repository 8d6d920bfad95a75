"""The first block's input gradient, its norm and the guided update in one Triton launch.

One program per sample, for the norm is over all of it. The gradient stays in registers up to KEPT elements,
those of 4x64x64; a larger one is made twice, tile by tile: for its norm, and for the update. None is ever in
device memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.structures import Block, Saved
from acs_fast.kernels.triton.conv_norm_act_pool_backward_input import (
    backward_tiling,
    check_backward,
)
from acs_fast.kernels.triton.convolution import group_means, shift_columns, transposed_product
from acs_fast.kernels.triton.device import (
    CFG_SCALE,
    guided_eps,
    noise_key,
    norm_add,
    norm_of,
    normal_at,
    push_length,
    table_row,
    unpushed,
)
from acs_fast.kernels.triton.guided_step import check_denoised
from acs_fast.kernels.triton.launch import block_of, cdiv, check, check_shape, next_power_of_2, options

KEPT = 16384  # elements of the gradient that a program can keep in registers
ACCUMULATORS = 4096  # of the product's tile
OPERAND = 4096  # of d conv in a step of the product: 16 registers for each of 256 threads; twice that spills


@triton.jit
def _elements(first_row, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_CI: tl.constexpr,
              BLOCK_P: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """(element offsets, mask) [BLOCK_CI, BLOCK_P] of a tile of rows in its sample."""
    ci, p = tl.arange(0, BLOCK_CI), tl.arange(0, BLOCK_P)
    mask = (ci < C)[:, None] & ((p < ROWS * W) & (first_row * W + p < H * W))[None, :]
    return ci[:, None] * (H * W) + (first_row * W + p)[None, :], mask


@triton.jit
def _means(grad, xhat, gamma, beta, b, batch, NETWORKS: tl.constexpr, C_OUT: tl.constexpr,
           GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
           BLOCK_CO: tl.constexpr, BLOCK_S: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """The group means of a sample's d and d xhat: of network n the rows from n STEPS on."""
    STEPS: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    d_means, dh_means = tl.zeros([SLOTS, BLOCK_CO], tl.float32), tl.zeros([SLOTS, BLOCK_CO], tl.float32)
    for n in range(0, NETWORKS):
        far = (n * batch + b).to(tl.int64)
        d_means, dh_means = group_means(
            d_means, dh_means, n * STEPS, grad + far * (C_OUT * (H // 2) * (W // 2)),
            xhat + far * (C_OUT * H * W), gamma + n * C_OUT, beta + n * C_OUT, C_OUT, GROUP, H, W, SILU,
            CHANNELS, BLOCK_CO, BLOCK_S, SLOTS,
        )  # fmt: skip
    return d_means, dh_means


@triton.jit
def _gradient(d_means, dh_means, grad, xhat, rstd, weight, gamma, beta, b, batch, first_row, mask,
              NETWORKS: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr, GROUP: tl.constexpr,
              H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
              BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_P: tl.constexpr,
              SLOTS: tl.constexpr):  # fmt: skip
    """The gradient [BLOCK_CI, BLOCK_P] of a tile of rows, summed over the networks."""
    STEPS: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    acc = tl.zeros([BLOCK_P, 4 * BLOCK_CI], tl.float32)
    for n in range(0, NETWORKS):
        sample = n * batch + b
        far = sample.to(tl.int64)
        acc = transposed_product(
            acc, d_means, dh_means, n * STEPS, grad + far * (C_OUT * (H // 2) * (W // 2)),
            xhat + far * (C_OUT * H * W), rstd + sample * (C_OUT // GROUP), weight + n * (C_OUT * C * 9),
            gamma + n * C_OUT, beta + n * C_OUT, first_row, 0, C, C_OUT, GROUP, H, W, SILU, CHANNELS,
            BLOCK_CO, BLOCK_CI, BLOCK_P, SLOTS,
        )  # fmt: skip
    return tl.where(mask, shift_columns(acc, W, BLOCK_CI, BLOCK_P), 0.0)


@triton.jit
def _update(x, denoised, out, g, offsets, mask, b, batch, sample_stride, cfg_elements, row, key,
            C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CLIP: tl.constexpr,
            LEARNED_RANGE: tl.constexpr):  # fmt: skip
    """The guided step of a block of elements, g their push."""
    NUMEL: tl.constexpr = C * H * W
    at = b.to(tl.int64) * NUMEL + offsets
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    eps = guided_eps(denoised, b, batch, offsets, mask, sample_stride, cfg_elements, tl.load(row + CFG_SCALE))
    noise = normal_at(offsets, key)
    value = unpushed(
        value, eps, noise, denoised, b, offsets, mask, sample_stride, row, NUMEL, CLIP, LEARNED_RANGE
    )
    tl.store(out + at, (value + g).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(x, denoised, class_labels, indices, seed, step, table, grad, xhat, rstd, weight, gamma, beta, out,
            batch, sample_stride, cfg_elements, NETWORKS: tl.constexpr, C: tl.constexpr, C_OUT: tl.constexpr,
            GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CLIP: tl.constexpr,
            LEARNED_RANGE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_CO: tl.constexpr,
            BLOCK_CI: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, ROWS: tl.constexpr,
            SLOTS: tl.constexpr, KEPT: tl.constexpr, NORM_BLOCK: tl.constexpr):  # fmt: skip
    TILES: tl.constexpr = (H + ROWS - 1) // ROWS
    b = tl.program_id(0)
    d_means, dh_means = _means(grad, xhat, gamma, beta, b, batch, NETWORKS, C_OUT, GROUP, H, W, SILU,
                               CHANNELS, BLOCK_CO, BLOCK_S, SLOTS)  # fmt: skip
    largest, total = tl.zeros([BLOCK_CI, BLOCK_P], tl.float32), tl.zeros([BLOCK_CI, BLOCK_P], tl.float32)
    place = tl.arange(0, KEPT)[:, None, None]
    kept = tl.zeros([KEPT, BLOCK_CI, BLOCK_P], tl.float32)
    for tile in range(0, TILES):
        offsets, mask = _elements(tile * ROWS, C, H, W, BLOCK_CI, BLOCK_P, ROWS)
        g = _gradient(d_means, dh_means, grad, xhat, rstd, weight, gamma, beta, b, batch, tile * ROWS, mask,
                      NETWORKS, C, C_OUT, GROUP, H, W, SILU, CHANNELS, BLOCK_CO, BLOCK_CI, BLOCK_P,
                      SLOTS)  # fmt: skip
        if TILES <= KEPT:
            kept = tl.where(place == tile, g[None, :, :], kept)
        else:
            largest, total = norm_add(largest, total, g)
    if TILES <= KEPT:
        top, norm = norm_of(tl.abs(kept), tl.where(kept != 0.0, 1.0, 0.0))  # as of one norm_add
    else:
        top, norm = norm_of(largest, total)
    row = table_row(table, step)
    key = noise_key(class_labels, indices, seed, step, b)
    length = push_length(denoised, b, batch, sample_stride, cfg_elements, row, C * H * W, NORM_BLOCK)
    for tile in range(0, TILES):
        offsets, mask = _elements(tile * ROWS, C, H, W, BLOCK_CI, BLOCK_P, ROWS)
        if TILES <= KEPT:
            g = tl.sum(tl.where(place == tile, kept, 0.0), axis=0)
        else:
            g = _gradient(d_means, dh_means, grad, xhat, rstd, weight, gamma, beta, b, batch, tile * ROWS,
                          mask, NETWORKS, C, C_OUT, GROUP, H, W, SILU, CHANNELS, BLOCK_CO, BLOCK_CI, BLOCK_P,
                          SLOTS)  # fmt: skip
        _update(x, denoised, out, length * (g / top / norm), offsets, mask, b, batch, sample_stride,
                cfg_elements, row, key, C, H, W, CLIP, LEARNED_RANGE)  # fmt: skip


def discriminator_guided_step(
    x: Tensor,
    denoised: Tensor,
    class_labels: Tensor,
    indices: Tensor,
    seed: Tensor,
    step: Tensor,
    table: Tensor,
    grad: Tensor,
    saved: Saved,
    block: Block,
    *,
    groups: int,
    activation: str,
    cfg_channels: int,
    clip: bool,
    learned_range: bool,
    out: Tensor | None = None,
) -> Tensor:
    """The guided step along the first block's input gradient, as the reference specifies it: [B, C, H, W].

    grad: [N, B, C_out, H / 2, W / 2], d L / d the block's output; saved, block: the first block's. The rest
    as in `guided_step`; `out` may be x.
    """
    op = "discriminator_guided_step"
    (b, c, h, w), (n, c_out) = x.shape, block.gamma.shape
    out = torch.empty_like(x) if out is None else out
    check(op, x=x, denoised=denoised, class_labels=class_labels, indices=indices, seed=seed, step=step,
          table=table, out=out)  # fmt: skip
    check_denoised(op, x, denoised, learned_range)
    check_shape(op, "class_labels", class_labels, (b,))
    check_shape(op, "indices", indices, (b,))
    check_shape(op, "out", out, tuple(x.shape))
    check_shape(op, "xhat", saved.xhat, (n, b, c_out, h, w))
    check_backward(op, grad, saved, block, groups)
    block_ci = max(4, next_power_of_2(c))
    tiling = backward_tiling(h, w, block_ci, c_out, c_out // groups, ACCUMULATORS, OPERAND, n)
    tiles = cdiv(h, tiling["ROWS"])
    _kernel[(b,)](
        x, denoised, class_labels, indices, seed, step, table, grad, *saved, block.weight, block.gamma,
        block.beta, out, b, denoised.shape[1] * h * w, cfg_channels * h * w, NETWORKS=n, C=c, C_OUT=c_out,
        GROUP=c_out // groups, H=h, W=w, SILU=activation == "silu", CLIP=clip, LEARNED_RANGE=learned_range,
        KEPT=next_power_of_2(tiles) if tiles * tiling["BLOCK_P"] * block_ci <= KEPT else 1,
        NORM_BLOCK=block_of(c * h * w, 2048), **tiling, **options(8),
    )  # fmt: skip
    return out
