"""The baselines' sampling loop, with nothing of the engine in it: eager steps, the gradient by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.config import DistillConfig
from acs_fast.diffusion import StepCoefficients, step_coefficients
from acs_fast.kernels.reference import philox_normal
from benchmarks.baselines.setting import Batch
from benchmarks.baselines.transformer import Denoiser

Noise = Callable[[int, tuple[int, ...]], Tensor]  # (step, shape [B, C, H, W]) -> standard normal fp32


def torch_noise(device: torch.device) -> Noise:
    """PyTorch's own generator: one call, as the baselines' users have it."""
    return lambda step, shape: torch.randn(shape, device=device)


def keyed_noise(batch: Batch, seed: int) -> Noise:
    """The engine's noise, keyed by (seed, class, index, step): for checks, where the samples must agree."""
    device = batch.class_labels.device

    def draw(step: int, shape: tuple[int, ...]) -> Tensor:
        key = (torch.tensor([number], device=device) for number in (seed, step))
        return philox_normal(batch.class_labels, batch.indices, *key, shape=shape[1:])

    return draw


@torch.no_grad()
def guided_steps(
    denoiser: Denoiser,
    discriminator: nn.Module,
    config: DistillConfig,
    batch: Batch,
    shape: tuple[int, int, int],
    null_label: int,
    dtype: torch.dtype,
    noise: Noise,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Baseline E, and C with a compiled denoiser: yields x [B, C, H, W], fp32, after every step.

    Learned-range DDPM, CFG on all channels; every step ascends CE(f(x0), y) by autograd, Jacobian identity,
    trust radius sigma, equations (1) to (4) of METHOD.md. The denoiser takes `dtype`, the discriminator that
    of its weights, the sampler's state is fp32.
    decode: the discriminator sees decode(x0) instead, and the gradient goes back through it (baseline P).
    """
    channels, device = shape[0], batch.class_labels.device
    labels = torch.cat((batch.class_labels, torch.full_like(batch.class_labels, null_label)))
    size = (len(batch.class_labels), *shape)
    x = noise(1000, size)
    for step, c in reversed(list(enumerate(step_coefficients(config.num_sampling_steps)))):
        timesteps = torch.full((len(labels),), c.timestep, device=device)
        out = denoiser(torch.cat((x, x)).to(dtype), timesteps, labels).to(x.dtype)
        cond, null = out.chunk(2)
        eps = null[:, :channels] + config.cfg_scale * (cond[:, :channels] - null[:, :channels])
        pred_xstart = (x - math.sqrt(1 - c.alpha_cumprod) * eps) / math.sqrt(c.alpha_cumprod)
        g = ascent(discriminator, pred_xstart, batch.targets, decode)
        x = posterior_sample(x, pred_xstart, cond[:, channels:], c, noise(step, size))
        x = x + config.guidance_scale * c.sigma * math.sqrt(g[0].numel()) * g / norm(g)
        yield x


def ascent(
    discriminator: nn.Module, pred_xstart: Tensor, targets: Tensor, decode: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """The gradient of the summed cross-entropy at x0: [B, C, H, W]."""
    dtype = next(discriminator.parameters()).dtype
    with torch.enable_grad():
        z = pred_xstart.detach().requires_grad_()
        seen = z if decode is None else decode(z)
        loss = F.cross_entropy(discriminator(seen.to(dtype)).to(z.dtype), targets, reduction="sum")
    (g,) = torch.autograd.grad(loss, z)
    return g


def norm(g: Tensor) -> Tensor:
    """||g|| per sample: [B, 1, 1, 1]."""
    return g.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]


def posterior_sample(
    x: Tensor, pred_xstart: Tensor, values: Tensor, c: StepCoefficients, noise: Tensor
) -> Tensor:
    """DDPM with learned-range variance (IDDPM (15)); no noise at the last step."""
    mean = c.posterior_mean_x0 * pred_xstart + c.posterior_mean_xt * x
    if c.alpha_cumprod_prev == 1.0:
        return mean
    v = (values + 1) / 2
    log_variance = v * c.max_log_variance + (1 - v) * c.min_log_variance
    return mean + torch.exp(0.5 * log_variance) * noise
