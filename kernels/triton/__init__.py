"""The ops as Triton kernels, one module each: for NVIDIA GPUs, and for the CPU under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from acs_fast.kernels.triton.adaln import adaln
from acs_fast.kernels.triton.classifier_head_grad import classifier_head_grad
from acs_fast.kernels.triton.conv_norm_act_pool import conv_norm_act_pool
from acs_fast.kernels.triton.conv_norm_act_pool_backward_input import conv_norm_act_pool_backward_input
from acs_fast.kernels.triton.discriminator_guidance import discriminator_guidance
from acs_fast.kernels.triton.discriminator_guided_step import discriminator_guided_step
from acs_fast.kernels.triton.gated_residual_adaln import gated_residual_adaln
from acs_fast.kernels.triton.group_norm_silu import group_norm_silu
from acs_fast.kernels.triton.guided_step import guided_step
from acs_fast.kernels.triton.philox_normal import philox_normal
from acs_fast.kernels.triton.pred_xstart import pred_xstart
from acs_fast.kernels.triton.to_uint8 import to_uint8

__all__ = [
    "adaln",
    "classifier_head_grad",
    "conv_norm_act_pool",
    "conv_norm_act_pool_backward_input",
    "discriminator_guidance",
    "discriminator_guided_step",
    "gated_residual_adaln",
    "group_norm_silu",
    "guided_step",
    "philox_normal",
    "pred_xstart",
    "to_uint8",
    "why_not",
]


def why_not(device: torch.device) -> str | None:
    """Why these kernels cannot run on a device, in one phrase, or None if they can."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"it needs Triton 3.6 or newer, this is {triton.__version__}"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 on the CPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None
