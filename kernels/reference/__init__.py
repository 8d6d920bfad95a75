"""Every op in plain PyTorch, fp32 inside: the specification that each kernel is tested against.

Same name, same signature in every backend: tensors, then keyword-only scalars, then `out=None`. A backend
writes into `out` where it is given, and then allocates nothing. Given float64 tensors, the functions here
compute in float64: the truth of the tests. B samples, C channels, H x W pixels, N networks, K classes.
"""

from acs_fast.kernels.reference.denoiser import adaln, gated_residual_adaln, group_norm_silu, to_uint8
from acs_fast.kernels.reference.discriminator import (
    classifier_head_grad,
    conv_norm_act_pool,
    conv_norm_act_pool_backward_input,
    discriminator_guided_step,
)
from acs_fast.kernels.reference.guidance import discriminator_guidance
from acs_fast.kernels.reference.noise import philox_normal
from acs_fast.kernels.reference.step import guided_step, pred_xstart

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
]
