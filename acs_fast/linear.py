"""The denoiser's linears: weights packed once on a CPU, GELU in the epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear:
    """y = x W^T + b, or tanh-GELU of it, with x [N, K], W [M, K], b [M]: [N, M] in x's dtype.

    On a CPU the weight is packed for `rows` rows, as oneDNN wants it, so that no call packs it again; with
    `pack=False` and on other devices it stays the module's own tensor. On CUDA the GELU is the epilogue of
    cuBLASLt (`_addmm_activation`, tanh-GELU there but erf-GELU on the CPU: never used on one).
    """

    def __init__(self, module: nn.Linear, rows: int, gelu: bool = False, pack: bool = True):
        self.weight, self.bias, self.gelu = module.weight.detach(), module.bias.detach(), gelu
        self.packed = pack and can_pack(self.weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`out` is where the result goes if the library can put it there; take what is returned."""
        if self.packed:
            post, algorithm = ("gelu", "tanh") if self.gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, post, [], algorithm)
        if x.is_cuda:
            if self.gelu:
                return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True, out=out)
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch packs a weight for oneDNN: on CPUs, in fp32, and bf16 if the processor has it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
