"""What the ops pass to each other: step-table columns, stacked networks, saved activations, workspaces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "silu")
OBJECTIVES = ("adversarial", "nonsaturating", "learnability", "density_ratio")


class Column:
    """Columns of a step table, fp32 [steps, COLUMNS]; row 0 is the image end (acs_fast.diffusion.step_table).

    pred_xstart = INV_SQRT_ALPHA x - EPS_TO_XSTART eps, clamped if asked; then the step is
    FROM_XSTART pred_xstart + FROM_X x + NOISE std noise + (PUSH + PUSH_PER_EPS ||eps||) g / ||g||
    with std = exp((MIN_LOG_VARIANCE + v (MAX_LOG_VARIANCE - MIN_LOG_VARIANCE)) / 2), v = (values + 1) / 2,
    for a learned-range variance, and 1 for a fixed one, whose deviation NOISE holds.
    """

    CFG_SCALE = 0
    INV_SQRT_ALPHA = 1
    EPS_TO_XSTART = 2
    FROM_XSTART = 3
    FROM_X = 4
    NOISE = 5
    MIN_LOG_VARIANCE = 6
    MAX_LOG_VARIANCE = 7
    PUSH = 8
    PUSH_PER_EPS = 9


COLUMNS = 10


class Block(NamedTuple):
    """One block of N stacked ConvNets, conv3x3 (pad 1) -> group norm -> activation -> 2x2 average pool."""

    weight: Tensor  # [N, C_out, C_in, 3, 3]
    bias: Tensor  # [N, C_out]
    gamma: Tensor  # [N, C_out], the norm's weight
    beta: Tensor  # [N, C_out], the norm's bias


class Saved(NamedTuple):
    """What a block's backward needs of its forward."""

    xhat: Tensor  # [N, B, C_out, H, W], normalised convolution output before gamma and beta
    rstd: Tensor  # [N, B, groups] fp32, 1 / sqrt(variance + eps)


class Head(NamedTuple):
    """The linear classifiers of N stacked networks on flat features."""

    weight: Tensor  # [N, K, F]
    bias: Tensor  # [N, K]


class HeadResult(NamedTuple):
    """Logits, objective and its gradient, which is divided by `scale`, a positive number per sample."""

    logits: Tensor  # fp32 [N, B, K]
    loss: Tensor  # fp32 [B], the objective L
    scale: Tensor  # fp32 [B], the largest |d L / d logit of the class| of the networks
    grad: Tensor  # [N, B, F] in the features' dtype, d L / d features / scale


class Network(NamedTuple):
    """N stacked ConvNets of one architecture."""

    blocks: tuple[Block, ...]
    head: Head


class Workspace(NamedTuple):
    """Every intermediate tensor of one guidance step, so that it allocates nothing."""

    pred_xstart: Tensor  # [B, C, H, W]
    activations: tuple[Tensor, ...]  # per block [N, B, C_out, H / 2, W / 2] of its input's size
    saved: tuple[Saved, ...]  # per block
    head: HeadResult
    grads: tuple[Tensor, ...]  # per block but the last, d L / d its output


def guidance_workspace(x: Tensor, network: Network, groups: int) -> Workspace:
    """The workspace of `discriminator_guidance` for samples shaped as x, in the network's dtype."""
    n, b, (_, _, h, w) = len(network.head.bias), len(x), x.shape
    dtype, device = network.head.weight.dtype, x.device
    single = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    activations, saved, grads = [], [], []
    for block in network.blocks:
        c = block.bias.shape[1]
        saved.append(Saved(empty(n, b, c, h, w), empty(n, b, groups, dtype=single)))
        h, w = h // 2, w // 2
        activations.append(empty(n, b, c, h, w))
        grads.append(empty(n, b, c, h, w))
    k, f = network.head.weight.shape[1:]
    head = HeadResult(
        empty(n, b, k, dtype=single), empty(b, dtype=single), empty(b, dtype=single), empty(n, b, f)
    )
    return Workspace(empty(*x.shape), tuple(activations), tuple(saved), head, tuple(grads[:-1]))
