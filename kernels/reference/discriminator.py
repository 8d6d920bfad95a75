"""The latent discriminator, forward and input gradient: specification in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.kernels.reference.precision import give, wide
from acs_fast.kernels.reference.step import guided_step
from acs_fast.kernels.structures import Block, Head, HeadResult, Saved


def conv_norm_act_pool(
    x: Tensor,
    block: Block,
    *,
    groups: int,
    activation: str,
    eps: float = 1e-5,
    out: tuple[Tensor, Saved] | None = None,
) -> tuple[Tensor, Saved]:
    """One block of N networks: (pool(act(gamma xhat + beta)), what the backward needs).

    x: [B, C_in, H, W], the same for all networks (the first block), or [N, B, C_in, H, W]; H, W even.
    Returns [N, B, C_out, H / 2, W / 2] and Saved, in x's dtype (rstd fp32).
    """
    n, c_out = block.weight.shape[:2]
    x = x.expand(n, *x.shape) if x.dim() == 4 else x
    b, _, h, w = x.shape[1:]
    conv = torch.stack(
        [
            F.conv2d(wide(a), wide(f), wide(c), padding=1)
            for a, f, c in zip(x, block.weight, block.bias, strict=True)
        ]
    )
    grouped = conv.view(n, b, groups, -1)
    rstd = (grouped.var(dim=-1, correction=0) + eps).rsqrt()
    xhat = ((grouped - grouped.mean(dim=-1, keepdim=True)) * rstd[..., None]).view(n, b, c_out, h, w)
    pooled = F.avg_pool2d(_act(_affine(xhat, block), activation).flatten(0, 1), 2)
    pooled = pooled.view(n, b, c_out, h // 2, w // 2)
    if out is None:
        return pooled.to(x.dtype), Saved(xhat.to(x.dtype), rstd)
    y, saved = out
    return y.copy_(pooled), Saved(saved.xhat.copy_(xhat), saved.rstd.copy_(rstd))


def conv_norm_act_pool_backward_input(
    grad: Tensor, saved: Saved, block: Block, *, groups: int, activation: str, out: Tensor | None = None
) -> Tensor:
    """d L / d x of `conv_norm_act_pool`, without weight gradients: [N, B, C_in, H, W].

    With u = gamma xhat + beta, d = gamma act'(u) grad[p / 2] / 4, and means over each group of a sample:
    d conv = rstd (d - mean(d) - xhat mean(d xhat)), and d x is its transposed convolution with the weight.

    grad: [N, B, C_out, H / 2, W / 2], d L / d output. The result has grad's dtype.
    """
    n, b, c_out, h, w = saved.xhat.shape
    xhat = wide(saved.xhat)
    up = wide(grad).repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1) / 4.0
    d = up * _act_derivative(_affine(xhat, block), activation) * _per_channel(block.gamma)
    d, grouped = d.view(n, b, groups, -1), xhat.view(n, b, groups, -1)
    d = d - d.mean(dim=-1, keepdim=True) - grouped * (d * grouped).mean(dim=-1, keepdim=True)
    d = (saved.rstd.to(d.dtype)[..., None] * d).view(n, b, c_out, h, w)
    value = torch.stack(
        [F.conv_transpose2d(a, wide(f), padding=1) for a, f in zip(d, block.weight, strict=True)]
    )
    return give(out, value, grad.dtype)


def _per_channel(parameter: Tensor) -> Tensor:
    return wide(parameter)[:, None, :, None, None]


def _affine(xhat: Tensor, block: Block) -> Tensor:
    return xhat * _per_channel(block.gamma) + _per_channel(block.beta)


def _act(u: Tensor, activation: str) -> Tensor:
    return F.relu(u) if activation == "relu" else F.silu(u)


def _act_derivative(u: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return (u > 0).to(u.dtype)
    s = torch.sigmoid(u)
    return s * (1.0 + u * (1.0 - s))


def classifier_head_grad(
    features: Tensor,
    head: Head,
    targets: Tensor,
    *,
    objective: str,
    omega: float = 0.0,
    out: HeadResult | None = None,
) -> HeadResult:
    """Logits, objective and d L / d features of each objective of METHOD.md, in closed form.

    With m = log sum_{k != y} exp(l_k) - l_y and q the softmax over k != y, d m / d l = (q_k; -1 at y), so
      adversarial    L = softplus(m)                            d L = sigmoid(m) (q; -1)
      nonsaturating  L = -softplus(-m)                          d L = sigmoid(-m) (q; -1)
      learnability   L = softplus(m_0) - omega softplus(m_1)    network 0 is f_i, network 1 f_real
      density_ratio  L = -softplus(-l_y), D = sigmoid(l_y)      d L = sigmoid(-l_y) (0; 1)
    The gradient is divided by `scale`: it keeps its digits in half precision, and the norm of (4) removes it.

    features: [N, B, F]; N is 2 for learnability, else 1. targets: int64 [B].
    """
    x, rows = wide(features), torch.arange(features.shape[1], device=features.device)
    logits = torch.einsum("nbf,nkf->nbk", x, wide(head.weight)) + wide(head.bias)[:, None]
    own = logits[:, rows, targets]  # [N, B]
    index = targets.expand(len(features), -1)[..., None]
    others = logits.scatter(2, index, -math.inf)
    if objective == "density_ratio":
        loss = -F.softplus(-own[0])
        factor, direction = torch.sigmoid(-own), torch.zeros_like(logits).scatter(2, index, 1.0)
    else:
        m = torch.logsumexp(others, dim=2) - own
        direction = torch.softmax(others, dim=2).scatter(2, index, -1.0)
        loss, factor = F.softplus(m[0]), torch.sigmoid(m)
        if objective == "nonsaturating":
            loss, factor = -F.softplus(-m[0]), torch.sigmoid(-m)
        elif objective == "learnability":
            loss = loss - omega * F.softplus(m[1])
            factor = torch.stack((factor[0], -omega * factor[1]))
    scale = factor.abs().amax(dim=0).clamp_min(torch.finfo(factor.dtype).tiny)  # [B]
    grad = torch.einsum("nbk,nkf->nbf", direction * (factor / scale)[..., None], wide(head.weight))
    if out is None:
        return HeadResult(logits, loss, scale, grad.to(features.dtype))
    for given, value in zip(out, (logits, loss, scale, grad), strict=True):
        given.copy_(value)
    return out


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
    """`guided_step` along the sum over networks of the first block's input gradient (3), (4).

    A kernel keeps that gradient and its norm on the chip. grad, saved, block: of the first block, as in
    `conv_norm_act_pool_backward_input`; the other arguments as in `guided_step`. `out` may be x.
    """
    g = conv_norm_act_pool_backward_input(wide(grad), saved, block, groups=groups, activation=activation)
    return guided_step(
        x, denoised, class_labels, indices, seed, step, table, g.sum(dim=0),
        cfg_channels=cfg_channels, clip=clip, learned_range=learned_range, out=out,
    )  # fmt: skip
