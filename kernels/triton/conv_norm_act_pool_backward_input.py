"""The input gradient of a discriminator block in Triton: one launch, d conv made on the fly.

A program owns some rows and some input channels of one sample. The group means that d conv needs are over the
whole sample. Every program takes them anew, which L2 serves: that is one evaluation of each element of xhat,
while the product needs three of those in its own rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.structures import Block, Saved
from acs_fast.kernels.triton.convolution import group_means, shift_columns, transposed_product
from acs_fast.kernels.triton.launch import cdiv, check, check_even, check_shape, next_power_of_2, options

ACCUMULATORS = 16384  # of a program's tile: 64 registers for each of 256 threads
ACCUMULATORS_FP32 = 4096  # without tensor cores both operands are held in registers too
OPERAND, OPERAND_FP32 = 4096, 2048  # of d conv in a step of the product
SUMMED = 4096  # elements that a step of the group sums takes


@triton.jit
def _kernel(grad, xhat, rstd, weight, gamma, beta, out, batch, C_IN: tl.constexpr, C_OUT: tl.constexpr,
            GROUP: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr,
            BLOCK_CO: tl.constexpr, BLOCK_CI: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
            ROWS: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    CI_BLOCKS: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    TILES: tl.constexpr = (H + ROWS - 1) // ROWS
    program = tl.program_id(0)
    sample = program // (CI_BLOCKS * TILES)  # of N B
    first_row = program // CI_BLOCKS % TILES * ROWS
    first_ci = program % CI_BLOCKS * BLOCK_CI
    n, far = sample // batch, sample.to(tl.int64)
    grad, xhat = grad + far * (C_OUT * (H // 2) * (W // 2)), xhat + far * (C_OUT * H * W)
    gamma, beta = gamma + n * C_OUT, beta + n * C_OUT
    means = tl.zeros([SLOTS, BLOCK_CO], tl.float32)
    d_means, dh_means = group_means(
        means, means, 0, grad, xhat, gamma, beta, C_OUT, GROUP, H, W, SILU, CHANNELS, BLOCK_CO, BLOCK_S, SLOTS
    )
    acc = transposed_product(
        tl.zeros([BLOCK_P, 4 * BLOCK_CI], tl.float32), d_means, dh_means, 0, grad, xhat,
        rstd + sample * (C_OUT // GROUP), weight + n * (C_OUT * C_IN * 9), gamma, beta, first_row, first_ci,
        C_IN, C_OUT, GROUP, H, W, SILU, CHANNELS, BLOCK_CO, BLOCK_CI, BLOCK_P, SLOTS,
    )  # fmt: skip
    g = shift_columns(acc, W, BLOCK_CI, BLOCK_P)
    ci, p = first_ci + tl.arange(0, BLOCK_CI), tl.arange(0, BLOCK_P)
    mask = (ci < C_IN)[:, None] & ((p < ROWS * W) & (first_row * W + p < H * W))[None, :]
    at = far * (C_IN * H * W) + ci[:, None] * (H * W) + (first_row * W + p)[None, :]
    tl.store(out + at, g.to(out.dtype.element_ty), mask=mask)


def conv_norm_act_pool_backward_input(
    grad: Tensor, saved: Saved, block: Block, *, groups: int, activation: str, out: Tensor | None = None
) -> Tensor:
    """d L / d x of `conv_norm_act_pool`, as the reference specifies it: [N, B, C_in, H, W] in grad's dtype.

    grad: [N, B, C_out, H / 2, W / 2], d L / d output. No weight gradients.
    """
    op = "conv_norm_act_pool_backward_input"
    n, b, c_out, h, w = saved.xhat.shape
    c_in = block.weight.shape[2]
    out = grad.new_empty(n, b, c_in, h, w) if out is None else out
    check(op, grad=grad, out=out)
    check_shape(op, "out", out, (n, b, c_in, h, w))
    check_backward(op, grad, saved, block, groups)
    fp32 = block.weight.dtype == torch.float32
    block_ci = max(4, min(next_power_of_2(c_in), 16 if fp32 else 64))
    budget = (ACCUMULATORS_FP32, OPERAND_FP32) if fp32 else (ACCUMULATORS, OPERAND)
    tiling = backward_tiling(h, w, block_ci, c_out, c_out // groups, *budget)
    _kernel[(n * b * cdiv(c_in, block_ci) * cdiv(h, tiling["ROWS"]),)](
        grad, *saved, block.weight, block.gamma, block.beta, out, b, C_IN=c_in, C_OUT=c_out,
        GROUP=c_out // groups, H=h, W=w, SILU=activation == "silu", **tiling, **options(8),
    )  # fmt: skip
    return out


def check_backward(op: str, grad: Tensor, saved: Saved, block: Block, groups: int) -> None:
    """Raises ValueError for a backward's tensor that is not contiguous or not of its forward's shape."""
    n, b, c_out, h, w = saved.xhat.shape
    check(op, grad=grad, xhat=saved.xhat, rstd=saved.rstd, weight=block.weight, gamma=block.gamma,
          beta=block.beta)  # fmt: skip
    check_even(op, h, w)
    check_shape(op, "weight", block.weight, (n, c_out, block.weight.shape[2], 3, 3))
    check_shape(op, "beta", block.beta, (n, c_out))
    check_shape(op, "grad", grad, (n, b, c_out, h // 2, w // 2))
    check_shape(op, "rstd", saved.rstd, (n, b, groups))
    check_shape(op, "gamma", block.gamma, (n, c_out))


def backward_tiling(
    h: int, w: int, block_ci: int, c_out: int, group: int, accumulators: int, operand: int, networks: int = 1
) -> dict[str, int]:
    """A program's tile: whole rows, and the output channels of a step of the product, whole groups.

    accumulators, operand: elements of the product and of d conv in it; an input channel has four columns.
    """
    positions = min(max(64, next_power_of_2(h * w)), accumulators // (4 * block_ci))
    most = max(16, min(64, operand // positions))
    channels = min(c_out, max(most // group, 1) * group)
    block_co = max(16, next_power_of_2(channels))
    rows = max(1, min(h, positions // w, max(accumulators, operand) // block_co // w))
    return {"CHANNELS": channels, "BLOCK_CO": block_co, "BLOCK_CI": block_ci, "ROWS": rows,
            "BLOCK_P": max(64, next_power_of_2(rows * w)),
            "BLOCK_S": max(16, SUMMED // block_co),
            "SLOTS": next_power_of_2(networks * cdiv(c_out, channels))}  # fmt: skip
