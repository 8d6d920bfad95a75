"""How a classifier is trained fast on its device: dtype, memory format, and norms, in parts of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LARGE = 64  # px: from here on convolutions and memory bound a CPU's training, not the number of operators
PART_BYTES = 32 * 2**20  # of a feature map of a part of a batch


def resolve_dtype(name: str, device: torch.device, size: int) -> torch.dtype:
    """`fp32`, `bf16`, or `auto`: bf16 for images of at least 64 px on a CPU that multiplies it, else fp32.

    bf16 is PyTorch's autocast: convolutions and linears in bf16, weights, gradients and sums in fp32.
    """
    if name == "auto":
        fast = device.type == "cpu" and size >= LARGE and _multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare(network: nn.Module, device: torch.device, size: int) -> tuple[nn.Module, int | None]:
    """The network on its device, and how many images at a time; None: a batch at once.

    On a CPU, large images: channels last, with `InstanceNorm` for each instance norm, since PyTorch's
    backward pass is slow there; and a few images at a time, whose memory is used again. No image of such a
    network sees another, so that the parts' gradients add up to the batch's. Small images: contiguous, where
    PyTorch's norms are faster than the convolutions lose.
    """
    if device.type == "cpu" and size < LARGE:
        return network.to(device), None
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type != "cpu" or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        return network, None
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    for norm in norms:
        norm.__class__ = InstanceNorm
    # freed at once: from then on glibc keeps blocks of up to this size instead of mapping each anew
    torch.empty(PART_BYTES - 2**20, dtype=torch.uint8)
    return network, max(1, PART_BYTES // (4 * norms[0].num_channels * size**2))


class InstanceNorm(nn.GroupNorm):
    """GroupNorm(C, C), affine, for channels-last images on a CPU: the same values, another backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return _InstanceNorm.apply(x, self.weight, self.bias, self.eps)


class _InstanceNorm(torch.autograd.Function):
    """y = w (x - m) r + b, m and r = 1 / sqrt(v + eps) of each image and channel; x [B, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        b, c, h, w = x.shape
        own = x.dtype
        y, mean, rstd = torch.native_group_norm(x, weight.to(own), bias.to(own), b, c, h * w, c, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """dx = w r (g - mean(g) - xhat mean(g xhat)), as a g + k x + d with numbers of the channel."""
        x, mean, rstd, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        exact = torch.promote_types(x.dtype, torch.float32)
        mean, rstd = mean.view(b, c).to(exact), rstd.view(b, c).to(exact)
        grad, pixels = (t.permute(0, 2, 3, 1).reshape(b, h, w, c) for t in (g, x))
        db = grad.sum(2).to(exact).sum(1)  # [B, C]; in two steps: no wider copy of the maps
        dw = ((grad * pixels).sum(2).to(exact).sum(1) - mean * db) * rstd
        a = rstd * weight.to(exact)
        k = -a * rstd * dw / (h * w)
        d = -a * db / (h * w) - k * mean
        a, k, d = (t.to(x.dtype).view(b, 1, 1, c) for t in (a, k, d))
        dx = torch.addcmul(d, pixels, k).addcmul_(grad, a)
        return dx.permute(0, 3, 1, 2), dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype), None
