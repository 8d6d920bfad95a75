"""The plain ACS sampling loop: one guided denoising step after another, equations (1) to (4) of METHOD.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from acs_fast import diffusion
from acs_fast.config import DistillConfig
from acs_fast.diffusion import Schedule
from acs_fast.guidance import Guidance
from acs_fast.kernels.reference import philox_normal
from acs_fast.models.dit import DiT


def denoise(
    model: DiT,
    class_labels: Tensor,
    indices: Tensor,
    config: DistillConfig,
    guidance: Guidance | None = None,
    targets: Tensor | None = None,
    schedule: Schedule | None = None,
    latents: Tensor | None = None,
) -> Iterator[Tensor]:
    """Walk the trajectory of a batch from noise to images and yield x [B, C, H, W] after every step.

    class_labels, indices: int64 [B] on the model's device; they key the noise, with config.seed and the step.
    guidance: None samples with classifier-free guidance alone (the first curriculum).
    targets: int64 [B], the discriminator's label of each sample; default the denoiser's own.
    schedule: the steps of another sampler than the configuration's. latents: [B, C, H, W], the noise to start
    from; default: the keyed one.
    The denoiser may run in another dtype; x, and what is made of the denoiser's output, stays fp32.
    """
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    channels, dtype = shape[0], next(model.parameters()).dtype
    targets = class_labels if targets is None else targets
    labels = torch.cat((class_labels, torch.full_like(class_labels, model.null_label)))
    coefficients = (
        diffusion.step_coefficients(config.num_sampling_steps) if schedule is None else schedule.coefficients
    )
    clip = bool(config.clip_denoised)

    def noise(step: int) -> Tensor:
        key = (torch.tensor([number], device=class_labels.device) for number in (config.seed, step))
        return philox_normal(class_labels, indices, *key, shape=shape)

    x = noise(diffusion.NUM_TRAIN_TIMESTEPS) if latents is None else latents.float()
    memory = torch.zeros_like(x)
    for step, c in reversed(list(enumerate(coefficients))):
        guided = guidance is not None and guidance.active(c)
        through_denoiser = guidance is not None and guided and guidance.jacobian == "full"
        with torch.set_grad_enabled(through_denoiser):
            x = x.detach().requires_grad_(through_denoiser)
            timesteps = torch.full_like(labels, c.timestep)
            denoised = model(torch.cat((x, x)).to(dtype), timesteps, labels).to(x.dtype)
            cond, null = denoised.chunk(2)
            eps = diffusion.classifier_free_guidance(  # (1)
                cond[:, :channels], null[:, :channels], config.cfg_scale, config.cfg_channels
            )
            pred_xstart = diffusion.predict_xstart(x, eps, c)  # (2)
        push = None
        if guidance is not None and guided:
            push = guidance.direction(x, pred_xstart, targets, clip)  # (3)
            push = guidance.radius(eps.detach(), c) * push
        x, raw = x.detach(), pred_xstart.detach()
        pred_xstart = raw.clamp(-1.0, 1.0) if clip else raw
        if schedule is not None:
            remembered = memory if schedule.memory == "previous" else raw
            x = diffusion.linear_step(x, pred_xstart, remembered, noise(step), schedule.updates[step])
            memory = pred_xstart
        elif config.sampler == "ddim":
            x = diffusion.ddim_step(x, pred_xstart, noise(step), c, config.eta)
        else:
            values = cond[:, channels:].detach() if use_learned_range(model, config) else None
            x = diffusion.ddpm_step(x, pred_xstart, noise(step), c, values)
        if push is not None:
            x = x + push  # (4)
        yield x


def use_learned_range(model: DiT, config: DistillConfig) -> bool:
    """Whether it is DDPM with the model's learned-range variance, which `auto` takes where there is one."""
    learned = config.variance == "learned_range" or (config.variance == "auto" and model.config.learn_sigma)
    return learned and config.sampler == "ddpm"
