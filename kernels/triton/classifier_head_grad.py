"""Logits, objective and feature gradient of the linear classifiers in Triton: one launch.

A program holds all logits of a sample in registers and writes one slice of its gradient. Every program of a
sample takes the logits anew, for the softmax needs all of them and a launch has no barrier between programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from acs_fast.kernels.structures import OBJECTIVES, Head, HeadResult
from acs_fast.kernels.triton.launch import cdiv, check, check_shape, next_power_of_2, options

TILE = 8192  # weights that a program holds at a time
SLICE = 512  # features of a gradient slice, at least
WAVE = 132  # multiprocessors of an H100
NONSATURATING = tl.constexpr(OBJECTIVES.index("nonsaturating"))
LEARNABILITY = tl.constexpr(OBJECTIVES.index("learnability"))
DENSITY_RATIO = tl.constexpr(OBJECTIVES.index("density_ratio"))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _sigmoid(m):
    small = tl.exp(-tl.abs(m))
    return tl.where(m >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _softplus(m):
    """max(m, 0) + log(1 + e), e = exp(-|m|), with the digits of e that 1 + e drops."""
    small = tl.exp(-tl.abs(m))
    one = 1.0 + small
    rounded = tl.where(one == 1.0, 1.0, one - 1.0)
    return tl.maximum(m, 0.0) + tl.where(one == 1.0, small, tl.log(one) * (small / rounded))


@triton.jit
def _logits(features, weight, bias, F: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
            BLOCK_F: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_K] of one sample and network; 0 beyond K."""
    k = tl.arange(0, BLOCK_K)
    products = tl.zeros([BLOCK_K, BLOCK_F], tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        x = tl.load(features + f, mask=f < F, other=0.0).to(tl.float32)
        w = tl.load(weight + k[:, None] * F + f[None, :], mask=(k < K)[:, None] & (f < F)[None, :], other=0.0)
        products += w.to(tl.float32) * x[None, :]
    return tl.sum(products, axis=1) + tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _objective(logits, target, K: tl.constexpr, BLOCK_K: tl.constexpr, DENSITY: tl.constexpr):
    """The margin m and d m / d logits [BLOCK_K]; for the density ratio l_y and its unit vector."""
    k = tl.arange(0, BLOCK_K)
    own = tl.sum(tl.where(k == target, logits, 0.0))
    if DENSITY:
        m = own
        direction = tl.where(k == target, 1.0, 0.0)
    else:
        others = tl.where((k < K) & (k != target), logits, float("-inf"))
        top = tl.max(others)
        weights = tl.exp(others - top)
        total = tl.sum(weights)
        m = top + tl.log(total) - own
        direction = tl.where(k == target, -1.0, weights / total)
    return m, direction


@triton.jit
def _feature_grad(coefficients, weight, grad, start, F: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr):  # fmt: skip
    """Stores sum_k coefficients_k weight[k] for SPAN features from `start`."""
    k = tl.arange(0, BLOCK_K)
    for first in range(0, SPAN, BLOCK_F):
        f = start + first + tl.arange(0, BLOCK_F)
        w = tl.load(weight + k[None, :] * F + f[:, None], mask=(k < K)[None, :] & (f < F)[:, None], other=0.0)
        value = tl.sum(coefficients[None, :] * w.to(tl.float32), axis=1)
        tl.store(grad + f, value.to(grad.dtype.element_ty), mask=f < F)


@triton.jit
def _kernel(features, weight, bias, targets, logits_out, loss_out, scale_out, grad, batch, omega,
            F: tl.constexpr, K: tl.constexpr, OBJECTIVE: tl.constexpr, SPAN: tl.constexpr,
            BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr):  # fmt: skip
    SLICES: tl.constexpr = (F + SPAN - 1) // SPAN
    FALLING: tl.constexpr = (OBJECTIVE == NONSATURATING) | (OBJECTIVE == DENSITY_RATIO)
    b, part = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    target, k = tl.load(targets + b).to(tl.int32), tl.arange(0, BLOCK_K)
    far = b.to(tl.int64) * F
    logits = _logits(features + far, weight, bias, F, K, BLOCK_K, BLOCK_F)
    m, direction = _objective(logits, target, K, BLOCK_K, OBJECTIVE == DENSITY_RATIO)
    if FALLING:
        loss, factor = -_softplus(-m), _sigmoid(-m)
    else:
        loss, factor = _softplus(m), _sigmoid(m)
    scale = tl.maximum(factor, TINY)
    if OBJECTIVE == LEARNABILITY:
        far_1 = (batch + b).to(tl.int64) * F
        logits_1 = _logits(features + far_1, weight + K * F, bias + K, F, K, BLOCK_K, BLOCK_F)
        m_1, direction_1 = _objective(logits_1, target, K, BLOCK_K, False)
        loss -= omega * _softplus(m_1)
        factor_1 = -omega * _sigmoid(m_1)
        scale = tl.maximum(scale, tl.abs(factor_1))
        coefficients_1 = direction_1 * (factor_1 / scale)
        _feature_grad(coefficients_1, weight + K * F, grad + far_1, part * SPAN, F, K, SPAN, BLOCK_K, BLOCK_F)
        if part == 0:
            tl.store(logits_out + (batch + b) * K + k, logits_1, mask=k < K)
    _feature_grad(direction * (factor / scale), weight, grad + far, part * SPAN, F, K, SPAN, BLOCK_K, BLOCK_F)
    if part == 0:
        tl.store(logits_out + b * K + k, logits, mask=k < K)
        tl.store(loss_out + b, loss)
        tl.store(scale_out + b, scale)


def classifier_head_grad(
    features: Tensor,
    head: Head,
    targets: Tensor,
    *,
    objective: str,
    omega: float = 0.0,
    out: HeadResult | None = None,
) -> HeadResult:
    """Logits, objective, scale and gradient / scale, as the reference specifies them, in one launch.

    features: [N, B, F]; N is 2 for learnability, else 1. head: weight [N, K, F], bias [N, K].
    targets: int64 [B].
    """
    op = "classifier_head_grad"
    (n, b, f), k = features.shape, head.bias.shape[1]
    if out is None:
        logits = torch.empty((n, b, k), dtype=torch.float32, device=features.device)
        loss, scale = (torch.empty(b, dtype=torch.float32, device=features.device) for _ in range(2))
        out = HeadResult(logits, loss, scale, torch.empty_like(features))
    check(op, features=features, weight=head.weight, bias=head.bias, targets=targets, logits=out.logits,
          loss=out.loss, scale=out.scale, grad=out.grad)  # fmt: skip
    networks = 2 if objective == "learnability" else 1
    check_shape(op, "features", features, (networks, b, f))
    check_shape(op, "weight", head.weight, (networks, k, f))
    check_shape(op, "bias", head.bias, (networks, k))
    check_shape(op, "targets", targets, (b,))
    check_shape(op, "loss", out.loss, (b,))
    check_shape(op, "scale", out.scale, (b,))
    check_shape(op, "logits", out.logits, (networks, b, k))
    check_shape(op, "grad", out.grad, (networks, b, f))
    block_k = max(16, next_power_of_2(k))
    block_f = max(16, min(next_power_of_2(f), TILE // block_k))
    span = max(block_f, SLICE, next_power_of_2(cdiv(f * b, WAVE)))
    _kernel[(b * cdiv(f, span),)](
        features, *head, targets, *out, b, omega, F=f, K=k, OBJECTIVE=OBJECTIVES.index(objective), SPAN=span,
        BLOCK_K=block_k, BLOCK_F=block_f, **options(8),
    )  # fmt: skip
    return out
