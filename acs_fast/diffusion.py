"""Noise schedule, respacing and the sampling step: pure functions with the equation numbers of METHOD.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from acs_fast.kernels.structures import COLUMNS, Column

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one respaced step, in float64 (DDPM, Ho et al. 2020; IDDPM, Nichol & Dhariwal 2021)."""

    timestep: int  # t in [0, 999], what the denoiser is conditioned on
    alpha_cumprod: float  # a_t
    alpha_cumprod_prev: float  # a of the next cleaner step; 1 at the last
    posterior_mean_x0: float  # factor of x0 in the posterior mean, DDPM (7)
    posterior_mean_xt: float  # factor of x_t in the posterior mean, DDPM (7)
    sigma: float  # posterior standard deviation, DDPM (7); 0 at the last step
    min_log_variance: float  # log of the clipped posterior variance, IDDPM (15)
    max_log_variance: float  # log beta_t, IDDPM (15)


def linear_alphas_cumprod() -> np.ndarray:
    """a_t = prod_{s<=t} (1 - beta_s) for the linear betas 1e-4..0.02: float64 [1000]."""
    betas = np.linspace(BETA_START, BETA_END, NUM_TRAIN_TIMESTEPS, dtype=np.float64)
    return np.cumprod(1.0 - betas)


def step_coefficients(num_sampling_steps: int) -> list[StepCoefficients]:
    """The coefficients of every respaced step: index 0 the image end, num_sampling_steps - 1 the noise end.

    The timesteps are round(i * 999 / (num_sampling_steps - 1)); the respaced betas are 1 - a_t / a_prev.
    """
    if not 2 <= num_sampling_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_sampling_steps is {num_sampling_steps}, it must be 2 to {NUM_TRAIN_TIMESTEPS}")
    stride = (NUM_TRAIN_TIMESTEPS - 1) / (num_sampling_steps - 1)
    timesteps = [round(i * stride) for i in range(num_sampling_steps)]
    a = linear_alphas_cumprod()[timesteps]
    a_prev = np.append(1.0, a[:-1])
    beta = 1.0 - a / a_prev
    variance = beta * (1.0 - a_prev) / (1.0 - a)
    clipped = np.append(variance[1], variance[1:])
    mean_x0 = np.sqrt(a_prev) * beta / (1.0 - a)
    mean_xt = np.sqrt(1.0 - beta) * (1.0 - a_prev) / (1.0 - a)
    columns = (a, a_prev, mean_x0, mean_xt, np.sqrt(variance), np.log(clipped), np.log(beta))
    return [
        StepCoefficients(t, *map(float, row))
        for t, row in zip(timesteps, np.stack(columns, axis=1), strict=True)
    ]


def step_table(
    num_sampling_steps: int,
    *,
    cfg_scale: float,
    sampler: str,
    eta: float,
    learned_range: bool,
    guidance_scale: float,
    trust_radius: str,
    window: tuple[float, float],
    numel: int,
) -> Tensor:
    """Every respaced step's coefficients as the ops read them: fp32 [steps, COLUMNS], row 0 the image end.

    DDPM and DDIM are both linear in (x0, x, noise): DDPM (7) directly, DDIM (12) after (2) replaced its eps.
    The push of (4) is PUSH + PUSH_PER_EPS ||eps||: one of the two is zero, by the trust radius, and both are
    outside of the window. numel: elements of a sample.
    """
    rows = np.zeros((num_sampling_steps, COLUMNS), dtype=np.float64)
    for row, c in zip(rows, step_coefficients(num_sampling_steps), strict=True):
        a, a_prev = c.alpha_cumprod, c.alpha_cumprod_prev
        row[Column.CFG_SCALE] = cfg_scale
        row[Column.INV_SQRT_ALPHA] = 1.0 / math.sqrt(a)
        row[Column.EPS_TO_XSTART] = math.sqrt(1.0 - a) / math.sqrt(a)
        if sampler == "ddim":
            deviation = eta * c.sigma
            direction = math.sqrt(max(0.0, 1.0 - a_prev - deviation**2)) / math.sqrt(1.0 - a)
            row[Column.FROM_XSTART] = math.sqrt(a_prev) - direction * math.sqrt(a)
            row[Column.FROM_X], row[Column.NOISE] = direction, deviation
        else:
            row[Column.FROM_XSTART], row[Column.FROM_X] = c.posterior_mean_x0, c.posterior_mean_xt
            row[Column.NOISE] = float(a_prev != 1.0) if learned_range else c.sigma
        row[Column.MIN_LOG_VARIANCE], row[Column.MAX_LOG_VARIANCE] = c.min_log_variance, c.max_log_variance
        if window[0] <= c.timestep / NUM_TRAIN_TIMESTEPS <= window[1]:
            if trust_radius == "sigma":
                row[Column.PUSH] = guidance_scale * c.sigma * math.sqrt(numel)
            else:
                row[Column.PUSH_PER_EPS] = guidance_scale * math.sqrt(1.0 - a)
    return torch.from_numpy(rows).float()


def classifier_free_guidance(
    cond: Tensor, null: Tensor, cfg_scale: float, cfg_channels: int | None
) -> Tensor:
    """eps = null + cfg (cond - null) on the first `cfg_channels`, cond on the others (1); [B, C, H, W]."""
    eps = null + cfg_scale * (cond - null)
    if cfg_channels is None or cfg_channels >= cond.shape[1]:
        return eps
    return torch.cat((eps[:, :cfg_channels], cond[:, cfg_channels:]), dim=1)


def predict_xstart(x: Tensor, eps: Tensor, c: StepCoefficients) -> Tensor:
    """x0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t) (2)."""
    return (x - math.sqrt(1.0 - c.alpha_cumprod) * eps) / math.sqrt(c.alpha_cumprod)


def predict_eps(x: Tensor, pred_xstart: Tensor, c: StepCoefficients) -> Tensor:
    """eps = (x_t - sqrt(a_t) x0) / sqrt(1 - a_t): (2) solved for eps, needed after x0 was clamped."""
    return (x - math.sqrt(c.alpha_cumprod) * pred_xstart) / math.sqrt(1.0 - c.alpha_cumprod)


def learned_range_log_variance(values: Tensor, c: StepCoefficients) -> Tensor:
    """log variance = v log beta_t + (1 - v) log posterior variance, v = (values + 1) / 2: IDDPM (15)."""
    v = (values + 1.0) / 2.0
    return v * c.max_log_variance + (1.0 - v) * c.min_log_variance


def ddpm_step(
    x: Tensor, pred_xstart: Tensor, noise: Tensor, c: StepCoefficients, values: Tensor | None
) -> Tensor:
    """x_{t-1} = posterior mean + standard deviation * noise (DDPM (7)); no noise at the last step.

    `values`: the model's learned-range variance channels [B, C, H, W], None for the fixed posterior variance.
    """
    mean = c.posterior_mean_x0 * pred_xstart + c.posterior_mean_xt * x
    if c.alpha_cumprod_prev == 1.0:
        return mean
    if values is None:
        return mean + c.sigma * noise
    return mean + torch.exp(0.5 * learned_range_log_variance(values, c)) * noise


def ddim_step(x: Tensor, pred_xstart: Tensor, noise: Tensor, c: StepCoefficients, eta: float) -> Tensor:
    """x_{t-1} = sqrt(a_prev) x0 + sqrt(1 - a_prev - (eta sigma)^2) eps + eta sigma noise: DDIM (12), (16)."""
    deviation = eta * c.sigma
    eps = predict_eps(x, pred_xstart, c)
    direction = math.sqrt(max(0.0, 1.0 - c.alpha_cumprod_prev - deviation**2))
    return math.sqrt(c.alpha_cumprod_prev) * pred_xstart + direction * eps + deviation * noise
