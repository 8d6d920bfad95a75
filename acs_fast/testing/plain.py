"""Every op in eager PyTorch at the tensors' own dtype: what kernels' errors and speeds are held against."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.kernels import reference
from acs_fast.kernels.structures import Block, Column, Head, HeadResult, Network, Saved


def adaln(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor, *, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[rows][:, None]) + shift[rows][:, None]


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    residual = x + gate[rows][:, None] * y
    return residual, adaln(residual, shift, scale, rows, eps=eps)


philox_normal = reference.philox_normal  # PyTorch's own generators are not keyed by an image


def guided_eps(x: Tensor, denoised: Tensor, row: Tensor, cfg_channels: int) -> Tensor:
    cond, null = denoised[:, : x.shape[1]].chunk(2)
    eps = null + row[Column.CFG_SCALE] * (cond - null)
    return torch.cat((eps[:, :cfg_channels], cond[:, cfg_channels:]), dim=1)


def pred_xstart(
    x: Tensor,
    denoised: Tensor,
    step: Tensor,
    table: Tensor,
    *,
    cfg_channels: int,
    clip: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    row = table.index_select(0, step)[0].to(x.dtype)
    eps = guided_eps(x, denoised, row, cfg_channels)
    value = row[Column.INV_SQRT_ALPHA] * x - row[Column.EPS_TO_XSTART] * eps
    return value.clamp(-1, 1) if clip else value


def guided_step(
    x: Tensor,
    denoised: Tensor,
    class_labels: Tensor,
    indices: Tensor,
    seed: Tensor,
    step: Tensor,
    table: Tensor,
    gradient: Tensor | None = None,
    *,
    cfg_channels: int,
    clip: bool,
    learned_range: bool,
) -> Tensor:
    row, channels = table.index_select(0, step)[0].to(x.dtype), x.shape[1]
    eps = guided_eps(x, denoised, row, cfg_channels)
    pred = row[Column.INV_SQRT_ALPHA] * x - row[Column.EPS_TO_XSTART] * eps
    pred = pred.clamp(-1, 1) if clip else pred
    noise = philox_normal(class_labels, indices, seed, step, shape=tuple(x.shape[1:])).to(x.dtype)
    deviation = row[Column.NOISE]
    if learned_range:
        v = (denoised[: len(x), channels:] + 1) / 2
        low, high = row[Column.MIN_LOG_VARIANCE], row[Column.MAX_LOG_VARIANCE]
        deviation = deviation * torch.exp(0.5 * (v * high + (1 - v) * low))
    value = row[Column.FROM_XSTART] * pred + row[Column.FROM_X] * x + deviation * noise
    if gradient is None:
        return value
    g = gradient.to(x.dtype)
    g = g / g.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    g = g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    norm = torch.linalg.vector_norm(eps, dim=(1, 2, 3), keepdim=True)
    return value + (row[Column.PUSH] + row[Column.PUSH_PER_EPS] * norm) * g


def _act(u: Tensor, activation: str) -> Tensor:
    return F.relu(u) if activation == "relu" else F.silu(u)


def conv_norm_act_pool(
    x: Tensor, block: Block, *, groups: int, activation: str, eps: float = 1e-5
) -> tuple[Tensor, Saved]:
    n = len(block.bias)
    x = x.expand(n, *x.shape) if x.dim() == 4 else x
    outputs, xhats, rstds = [], [], []
    for a, weight, bias, gamma, beta in zip(x, *block, strict=True):
        conv = F.conv2d(a, weight, bias, padding=1)
        one, zero = torch.ones_like(gamma), torch.zeros_like(gamma)
        outputs.append(F.avg_pool2d(_act(F.group_norm(conv, groups, gamma, beta, eps), activation), 2))
        xhats.append(F.group_norm(conv, groups, one, zero, eps))
        grouped = conv.float().view(len(a), groups, -1)
        rstds.append((grouped.var(dim=-1, correction=0) + eps).rsqrt())
    return torch.stack(outputs), Saved(torch.stack(xhats), torch.stack(rstds))


def conv_norm_act_pool_backward_input(
    grad: Tensor, saved: Saved, block: Block, *, groups: int, activation: str
) -> Tensor:
    results = []
    for g, xhat, rstd, weight, _, gamma, beta in zip(grad, *saved, *block, strict=True):
        b, c, h, w = xhat.shape
        leaf = xhat.detach().requires_grad_()
        with torch.enable_grad():
            u = leaf * gamma[:, None, None] + beta[:, None, None]
            (d,) = torch.autograd.grad(F.avg_pool2d(_act(u, activation), 2), leaf, g)
        d, hat = d.view(b, groups, -1), xhat.view(b, groups, -1)
        d = d - d.mean(dim=-1, keepdim=True) - hat * (d * hat).mean(dim=-1, keepdim=True)
        d = (rstd.to(d.dtype)[..., None] * d).view(b, c, h, w)
        results.append(F.conv_transpose2d(d, weight, padding=1))
    return torch.stack(results)


def objective_value(logits: Tensor, targets: Tensor, objective: str, omega: float) -> Tensor:
    """L of METHOD.md per sample from logits [N, B, K], as a user would write it."""
    own = logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
    if objective == "density_ratio":
        return F.logsigmoid(own[0])
    cross = [F.cross_entropy(one, targets, reduction="none") for one in logits]
    if objective == "nonsaturating":
        others = logits[0].scatter(1, targets[:, None], -math.inf)
        return torch.logsumexp(others, dim=1) - torch.logsumexp(logits[0], dim=1)
    return cross[0] - omega * cross[1] if objective == "learnability" else cross[0]


def classifier_head_grad(
    features: Tensor, head: Head, targets: Tensor, *, objective: str, omega: float = 0.0
) -> HeadResult:
    leaf = features.detach().requires_grad_()
    with torch.enable_grad():
        logits = torch.baddbmm(head.bias[:, None], leaf, head.weight.transpose(1, 2))
        loss = objective_value(logits, targets, objective, omega)
        at_logits, grad = torch.autograd.grad(loss.sum(), (logits, leaf))
    own = at_logits.gather(2, targets.expand(len(logits), -1)[..., None])[..., 0]
    scale = own.abs().amax(dim=0).float().clamp_min(torch.finfo(torch.float32).tiny)
    grad = (grad.float() / scale[:, None]).to(grad.dtype)
    return HeadResult(logits.detach().float(), loss.detach().float(), scale, grad)


def discriminator_guided_step(*args: Any, groups: int, activation: str, **keywords: Any) -> Tensor:
    x, denoised, class_labels, indices, seed, step, table, grad, saved, block = args
    g = conv_norm_act_pool_backward_input(grad, saved, block, groups=groups, activation=activation).sum(dim=0)
    return guided_step(x, denoised, class_labels, indices, seed, step, table, g, **keywords)


def network_logits(x: Tensor, network: Network, groups: int, activation: str, eps: float = 1e-5) -> Tensor:
    """Logits [N, B, K] of N stacked ConvNets by PyTorch's layers."""
    found = []
    for n in range(len(network.head.bias)):
        z = x
        for block in network.blocks:
            z = F.conv2d(z, block.weight[n], block.bias[n], padding=1)
            z = _act(F.group_norm(z, groups, block.gamma[n], block.beta[n], eps), activation)
            z = F.avg_pool2d(z, 2)
        found.append(F.linear(z.flatten(1), network.head.weight[n], network.head.bias[n]))
    return torch.stack(found)


def discriminator_guidance(
    x: Tensor,
    denoised: Tensor,
    class_labels: Tensor,
    indices: Tensor,
    targets: Tensor,
    seed: Tensor,
    step: Tensor,
    table: Tensor,
    network: Network,
    *,
    groups: int,
    activation: str,
    objective: str,
    omega: float,
    cfg_channels: int,
    clip: bool,
    learned_range: bool,
) -> Tensor:
    """The guided step with autograd: about 70 launches for a ConvNet-3."""
    z = pred_xstart(x, denoised, step, table, cfg_channels=cfg_channels, clip=clip).detach().requires_grad_()
    with torch.enable_grad():
        logits = network_logits(z, network, groups, activation)
        loss = objective_value(logits, targets, objective, omega)
        (g,) = torch.autograd.grad(loss.sum(), z)
    return guided_step(
        x,
        denoised,
        class_labels,
        indices,
        seed,
        step,
        table,
        g,
        cfg_channels=cfg_channels,
        clip=clip,
        learned_range=learned_range,
    )


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float = 1e-6) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def to_uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
