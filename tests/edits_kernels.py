"""Edits that break a kernel or its specification, each noticed by a few op tests (tests/mutations.py)."""

from __future__ import annotations

from tests.edits import EMULATION, SPECIFICATION, Mutation

REFERENCE, TRITON, CUDA = "kernels/reference", "kernels/triton", "kernels/cuda"
PHILOX = "philox_normal-B1-C1 and triton-fp32"
XSTART = "pred_xstart-B7 and triton-fp32"
CLIPPED = "pred_xstart-B3-C4 and True-triton-fp32"
STEP = "guided_step-B7-C3-H16-W16-ddpm-sigma-True-True-triton-fp32 and not discriminator"
ADALN = "adaln-B7-T5-D72-triton-fp32"
CONV = "conv_norm_act_pool-N1-B1-C_in4-C64-H8-W8-G64-triton-fp32"
BACKWARD = "conv_norm_act_pool_backward_input-N1-B1-C_in4-C64-H8-W8-G64-triton-fp32"
HEAD = "classifier_head_grad-B33 and triton-fp32"
GUIDANCE = "discriminator_guidance-B1-C9-H16-W16-width64-depth3-G64-K10-bf16"
SMOOTH = "discriminator_guidance-B1-C32-H8-W8-width64-depth2-G64-K1000-silu-bf16"
FUSED = "discriminator_guided_step-N2-B3-C4-H16-W16-width64-G64-triton-fp32"

KERNELS = [
    # the specification, against plain PyTorch; its noise, which has no other, against Triton's
    Mutation(
        "the noise forgets the step",
        f"{REFERENCE}/noise.py",
        "(block, step.view(1, 1),",
        "(block, 0 * step.view(1, 1),",
        PHILOX,
    ),
    Mutation(
        "the Philox key's words change places",
        f"{REFERENCE}/noise.py",
        "(seed & _MASK, (seed >> 32) & _MASK)",
        "((seed >> 32) & _MASK, seed & _MASK)",
        PHILOX,
    ),
    Mutation(
        "conditional and null branch change places",
        f"{REFERENCE}/step.py",
        "cond, null = wide(denoised)",
        "null, cond = wide(denoised)",
        "pred_xstart-B3",
        SPECIFICATION,
    ),
    Mutation(
        "guidance on one channel too many",
        f"{REFERENCE}/step.py",
        "(eps[:, :cfg_channels], cond[:, cfg_channels:])",
        "(eps[:, : cfg_channels + 1], cond[:, cfg_channels + 1 :])",
        "pred_xstart-B3",
        SPECIFICATION,
    ),
    Mutation(
        "the gradient's norm is missing",
        f"{REFERENCE}/step.py",
        "return g / torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True).clamp_min(tiny)",
        "return g",
        "guided_step-B7",
        SPECIFICATION,
    ),
    Mutation(
        "the real classifier's gradient loses its sign",
        f"{REFERENCE}/discriminator.py",
        "-omega * factor[1]",
        "omega * factor[1]",
        "classifier_head_grad-B3 and learnability",
        SPECIFICATION,
    ),
    Mutation(
        "the norm's backward forgets mean(d)",
        f"{REFERENCE}/discriminator.py",
        "d = d - d.mean(dim=-1, keepdim=True) - grouped",
        "d = d - grouped",
        "backward_input",
        SPECIFICATION,
    ),
    Mutation(
        "the guided step leaves omega out",
        "kernels/compose.py",
        "objective=objective, omega=omega, out",
        "objective=objective, omega=0.0, out",
        "discriminator_guidance and learnability",
        SPECIFICATION,
    ),
    # the kernels
    Mutation(
        "a stale step counter in the table",
        f"{TRITON}/device.py",
        "table + tl.load(step) * COLUMNS",
        "table + (tl.load(step) - 1) * COLUMNS",
        XSTART,
    ),
    Mutation(
        "a stale step counter in the noise",
        f"{TRITON}/device.py",
        "tl.load(step).to(tl.uint32)",
        "(tl.load(step) - 1).to(tl.uint32)",
        PHILOX,
    ),
    Mutation(
        "cos and sin change places",
        f"{TRITON}/device.py",
        "return radius * real, radius * imaginary",
        "return radius * imaginary, radius * real",
        PHILOX,
    ),
    Mutation(
        "guidance from the wrong branch",
        f"{TRITON}/device.py",
        "null + cfg_scale * (cond - null)",
        "cond + cfg_scale * (null - cond)",
        XSTART,
    ),
    Mutation(
        "guidance on one element too many",
        f"{TRITON}/device.py",
        "offsets < cfg_elements",
        "offsets <= cfg_elements",
        XSTART,
    ),
    Mutation(
        "x0 is clamped from below only",
        f"{TRITON}/device.py",
        "tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL)",
        "value",
        CLIPPED,
    ),
    Mutation(
        "a variance for a standard deviation", f"{TRITON}/device.py", "tl.exp(0.5 * (low", "tl.exp((low", STEP
    ),
    Mutation(
        "the push loses its sign", f"{TRITON}/guided_step.py", "value += length", "value -= length", STEP
    ),
    Mutation(
        "a row of the table for the batch index",
        f"{TRITON}/adaln.py",
        "row = tl.load(rows + b)",
        "row = b",
        ADALN,
    ),
    Mutation(
        "padding counts in the variance",
        f"{TRITON}/adaln.py",
        "tl.where(mask, x - tl.sum(x) / D, 0.0)",
        "x - tl.sum(x) / D",
        ADALN,
    ),
    Mutation(
        "the residual is not gated",
        f"{TRITON}/gated_residual_adaln.py",
        "+ gated * branch",
        "+ branch",
        f"gated_residual_{ADALN}",
    ),
    Mutation(
        "truncated, not rounded",
        f"{TRITON}/to_uint8.py",
        "(value + 12582912.0) - 12582912.0",
        "value",
        "to_uint8-B3-C3-H17 and triton-fp32",
    ),
    Mutation("an off-by-one halo below", f"{TRITON}/convolution.py", "(row < H)", "(row < H - 1)", CONV),
    Mutation(
        "an off-by-one halo in the backward",
        f"{TRITON}/convolution.py",
        "(y >= 0) & (y < H)",
        "(y > 0) & (y < H)",
        BACKWARD,
    ),
    Mutation(
        "the backward does not flip the filter",
        f"{TRITON}/convolution.py",
        "(2 - dy) * 3",
        "dy * 3",
        BACKWARD,
    ),
    Mutation(
        "the mean is not subtracted",
        f"{TRITON}/conv_norm_act_pool.py",
        "(conv - mean[:, None]) * inverse",
        "conv * inverse",
        CONV,
    ),
    Mutation(
        "one class too many",
        f"{TRITON}/classifier_head_grad.py",
        "(k < K) & (k != target)",
        "(k <= K) & (k != target)",
        f"{HEAD} and adversarial",
    ),
    Mutation(
        "the real classifier's gradient loses its sign in the kernel",
        f"{TRITON}/classifier_head_grad.py",
        "factor_1 = -omega",
        "factor_1 = omega",
        f"{HEAD} and learnability",
    ),
    Mutation(
        "the activation's scale lacks the norm's weight",
        f"{TRITON}/convolution.py",
        "g * (0.25 * gamma[:, None])",
        "g * 0.25",
        BACKWARD,
    ),
    Mutation(
        "every channel takes its group's first weight",
        f"{TRITON}/group_norm_silu.py",
        "first_channel + offsets // AREA",
        "first_channel + 0 * offsets",
        "group_norm_silu-B2 and triton-fp32",
    ),
    Mutation(
        "the gradient of one network only",
        f"{TRITON}/discriminator_guided_step.py",
        "NETWORKS=n,",
        "NETWORKS=1,",
        FUSED,
    ),
    # the CUDA sources, built for their CPU emulation
    Mutation(
        "guidance from the wrong branch",
        f"{CUDA}/step.cuh",
        "null + row.cfg_scale * (cond - null)",
        "cond + row.cfg_scale * (null - cond)",
        "guided_step-B1-C1-H8-W8-fp32",
        EMULATION,
    ),
    Mutation(
        "a stale step counter in the table",
        f"{CUDA}/step.cuh",
        "table + step * ACS_COLUMNS",
        "table + (step - 1) * ACS_COLUMNS",
        "guided_step-B1-C1-H8-W8-fp32",
        EMULATION,
    ),
    Mutation(
        "the Philox key's words change places",
        f"{CUDA}/philox.cuh",
        "static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)",
        "static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key)",
        "philox_normal-B2-C1-H5-W7-fp32",
        EMULATION,
    ),
    Mutation(
        "the real classifier's gradient loses its sign",
        f"{CUDA}/objective.cuh",
        "-omega * sigmoid(m)",
        "omega * sigmoid(m)",
        "discriminator_guidance-B3 and learnability-bf16",
        EMULATION,
    ),
    Mutation(
        "an off-by-one halo at the right edge",
        f"{CUDA}/inner_layer.cuh",
        "(last && g == 7)",
        "(last && g == 6)",
        GUIDANCE,
        EMULATION,
    ),
    Mutation(
        "the backward does not flip the filter",
        f"{CUDA}/inner_layer.cuh",
        "TRANSPOSED ? 4 - 3 * dy - dx",
        "TRANSPOSED ? 4 - 3 * dy + dx",
        GUIDANCE,
        EMULATION,
    ),
    Mutation(
        "the norm's backward forgets mean(d)",
        f"{CUDA}/first_layer.cuh",
        "(d - d_mean[k] - xhat[r] * product_mean[k])",
        "(d - 0.0f * d_mean[k] - xhat[r] * product_mean[k])",
        SMOOTH,
        EMULATION,
    ),
]
