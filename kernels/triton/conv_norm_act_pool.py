"""A discriminator block in Triton: convolution, group norm, activation and 2x2 average pool in one launch.

A program owns whole groups of output channels of one sample, so that the norm's reductions stay inside of it.
Where the spatial extent fits its registers it is one tile, and nothing is read back. Else a first pass keeps
the raw convolution where xhat goes, with running statistics (Chan et al. 1979); a second one normalises it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.structures import Block, Saved
from acs_fast.kernels.triton.convolution import activate, conv3x3, group_sum
from acs_fast.kernels.triton.launch import cdiv, check, check_even, check_shape, next_power_of_2, options

ACCUMULATORS = 16384  # of a program's tile: 64 registers for each of 256 threads
ACCUMULATORS_FP32 = 4096  # without tensor cores both operands are held in registers too
WAVE = 132  # multiprocessors of an H100


@triton.jit
def _position(tile, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """(index, y, column) of a tile's positions, the 4 of a pool window adjacent, windows in row order."""
    q = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    window, corner = q // 4, q % 4
    return q, window // (W // 2) * 2 + corner // 2, window % (W // 2) * 2 + corner % 2


@triton.jit
def _statistics(conv, mask, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, HW: tl.constexpr, tile,
                BLOCK_P: tl.constexpr):  # fmt: skip
    """(count, mean, sum of squared deviations) of a tile [C, P] over each channel's group: count, two [C]."""
    count = 1.0 * GROUP * tl.minimum(HW - tile * BLOCK_P, BLOCK_P)
    mean = group_sum(tl.sum(tl.where(mask, conv, 0.0), axis=1), GROUP, BLOCK_C) / count
    apart = tl.where(mask, conv - mean[:, None], 0.0)
    return count, mean, group_sum(tl.sum(apart * apart, axis=1), GROUP, BLOCK_C)


@triton.jit
def _finish(conv, mean, inverse, scale, shift, y_out, xhat, co, co_mask, tile, H: tl.constexpr,
            W: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Normalises a tile [C, P], stores xhat, and stores the pooled activations."""
    q, y, column = _position(tile, W, BLOCK_P)
    mask = co_mask[:, None] & (q < H * W)[None, :]
    h = (conv - mean[:, None]) * inverse[:, None]
    at = co[:, None] * (H * W) + tl.max_contiguous(y * W + column, 2)[None, :]
    tl.store(xhat + at, h.to(xhat.dtype.element_ty), mask=mask)
    value = activate(h * scale[:, None] + shift[:, None], SILU)
    pooled = tl.sum(tl.reshape(value, [BLOCK_C, BLOCK_P // 4, 4]), axis=2) * 0.25
    window = tile * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4)
    at = co[:, None] * ((H // 2) * (W // 2)) + window[None, :]
    mask = co_mask[:, None] & (window < (H // 2) * (W // 2))[None, :]
    tl.store(y_out + at, pooled.to(y_out.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(x, weight, bias, gamma, beta, y_out, xhat, rstd, batch, network_stride, eps, C_IN: tl.constexpr,
            C_OUT: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
            CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
            BLOCK_K: tl.constexpr):  # fmt: skip
    BLOCKS: tl.constexpr = (C_OUT + CHANNELS - 1) // CHANNELS
    TILES: tl.constexpr = (H * W + BLOCK_P - 1) // BLOCK_P
    sample = tl.program_id(0) // BLOCKS  # of N B
    n, b = sample // batch, sample % batch
    lane = tl.arange(0, BLOCK_C)
    co = tl.program_id(0) % BLOCKS * CHANNELS + lane
    co_mask = (lane < CHANNELS) & (co < C_OUT)
    x += n.to(tl.int64) * network_stride + b.to(tl.int64) * (C_IN * H * W)
    weight += n * (C_OUT * C_IN * 9)
    xhat += sample.to(tl.int64) * (C_OUT * H * W)
    y_out += sample.to(tl.int64) * (C_OUT * (H // 2) * (W // 2))
    at = n * C_OUT + co
    offset = tl.load(bias + at, mask=co_mask, other=0.0).to(tl.float32)
    scale = tl.load(gamma + at, mask=co_mask, other=0.0).to(tl.float32)
    shift = tl.load(beta + at, mask=co_mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)  # sum of squared deviations
    mean = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(0, TILES):
        q, y, column = _position(tile, W, BLOCK_P)
        conv = conv3x3(x, weight, y, column, co, co_mask, C_IN, H, W, BLOCK_P, BLOCK_C, BLOCK_K)
        conv = tl.trans(conv) + offset[:, None]
        mask = co_mask[:, None] & (q < H * W)[None, :]
        count, tile_mean, tile_total = _statistics(conv, mask, GROUP, BLOCK_C, H * W, tile, BLOCK_P)
        if TILES == 1:
            inverse = tl.rsqrt(tile_total / count + eps)
            _finish(conv, tile_mean, inverse, scale, shift, y_out, xhat, co, co_mask, tile, H, W, SILU,
                    BLOCK_C, BLOCK_P)  # fmt: skip
            tl.store(
                rstd + sample * (C_OUT // GROUP) + co // GROUP, inverse, mask=co_mask & (co % GROUP == 0)
            )
        else:
            raw_at = co[:, None] * (H * W) + tl.max_contiguous(y * W + column, 2)[None, :]
            tl.store(xhat + raw_at, conv.to(xhat.dtype.element_ty), mask=mask)
            before = 1.0 * GROUP * BLOCK_P * tile
            apart = tile_mean - mean
            mean += apart * (count / (before + count))
            total += tile_total + apart * apart * (before * count / (before + count))
    if TILES > 1:
        tl.debug_barrier()  # other threads of the program read what these stored
        inverse = tl.rsqrt(total / (GROUP * H * W) + eps)
        for tile in range(0, TILES):
            q, y, column = _position(tile, W, BLOCK_P)
            raw_at = co[:, None] * (H * W) + tl.max_contiguous(y * W + column, 2)[None, :]
            mask = co_mask[:, None] & (q < H * W)[None, :]
            conv = tl.load(xhat + raw_at, mask=mask, other=0.0).to(tl.float32)
            _finish(conv, mean, inverse, scale, shift, y_out, xhat, co, co_mask, tile, H, W, SILU,
                    BLOCK_C, BLOCK_P)  # fmt: skip
        tl.store(rstd + sample * (C_OUT // GROUP) + co // GROUP, inverse, mask=co_mask & (co % GROUP == 0))


def conv_norm_act_pool(
    x: Tensor,
    block: Block,
    *,
    groups: int,
    activation: str,
    eps: float = 1e-5,
    out: tuple[Tensor, Saved] | None = None,
) -> tuple[Tensor, Saved]:
    """One block of N networks, as the reference specifies it: (pool(act(gamma xhat + beta)), Saved).

    x: [B, C_in, H, W], the same for all networks, or [N, B, C_in, H, W]; H, W even.
    Returns [N, B, C_out, H / 2, W / 2] and Saved, in x's dtype (rstd fp32).
    """
    (n, c_out, c_in), (b, _, h, w) = block.weight.shape[:3], x.shape[-4:]
    if out is None:
        out = (
            x.new_empty(n, b, c_out, h // 2, w // 2),
            Saved(x.new_empty(n, b, c_out, h, w), x.new_empty(n, b, groups, dtype=torch.float32)),
        )
    y, saved = out
    check("conv_norm_act_pool", x=x, weight=block.weight, bias=block.bias, gamma=block.gamma, beta=block.beta,
          y=y, xhat=saved.xhat, rstd=saved.rstd)  # fmt: skip
    check_even("conv_norm_act_pool", h, w)
    if x.dtype != block.weight.dtype:
        raise ValueError(f"conv_norm_act_pool: x is {x.dtype}, the weight {block.weight.dtype}; cast one")
    for name in ("bias", "gamma", "beta"):
        check_shape("conv_norm_act_pool", name, getattr(block, name), (n, c_out))
    check_shape("conv_norm_act_pool", "x", x, (b, c_in, h, w) if x.dim() == 4 else (n, b, c_in, h, w))
    check_shape("conv_norm_act_pool", "y", y, (n, b, c_out, h // 2, w // 2))
    check_shape("conv_norm_act_pool", "xhat", saved.xhat, (n, b, c_out, h, w))
    check_shape("conv_norm_act_pool", "rstd", saved.rstd, (n, b, groups))
    tiling = _tiling(n * b, c_in, c_out, h * w, c_out // groups, x.dtype)
    large = tiling["BLOCK_P"] * tiling["BLOCK_C"] > (2048 if x.dtype == torch.float32 else 4096)
    _kernel[(n * b * cdiv(c_out, tiling["CHANNELS"]),)](
        x, *block, y, *saved, b, 0 if x.dim() == 4 else b * c_in * h * w, eps, C_IN=c_in, C_OUT=c_out,
        GROUP=c_out // groups, H=h, W=w, SILU=activation == "silu", **tiling,
        **options(8 if large else 4),
    )  # fmt: skip
    return out


def _tiling(samples: int, c_in: int, c_out: int, area: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """A program's tile: channels few enough to fill the GPU and to keep the area in registers, if can be."""
    most = ACCUMULATORS_FP32 if dtype == torch.float32 else ACCUMULATORS
    positions = max(64, next_power_of_2(area))
    block = 64
    while block > 16 and (block * positions > most or samples * cdiv(c_out, block) < WAVE):
        block //= 2
    channels = min(c_out, max(block // group, 1) * group)
    block = max(16, next_power_of_2(channels))
    if positions > most // block:  # several tiles: their statistics need registers too
        positions = max(64, most // 2 // block)
    return {"CHANNELS": channels, "BLOCK_C": block, "BLOCK_P": positions,
            "BLOCK_K": 16 if c_in < 64 or positions > 512 or dtype == torch.float32 else 64}  # fmt: skip
