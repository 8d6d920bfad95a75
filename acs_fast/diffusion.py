"""Noise schedule, respacing and the sampling step: pure functions with the equation numbers of METHOD.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from acs_fast.kernels.structures import COLUMNS, Column

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02
TINY_VARIANCE = 1e-20  # diffusers' bound; no log variance of the own schedules comes near it


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


class Update(NamedTuple):
    """A step of any sampler that is linear: x' = from_xstart x0 + from_x x + from_memory m + noise z.

    z is standard normal; m is what `Schedule.memory` says. With a learned-range variance `noise` is a factor
    of its deviation.
    """

    from_xstart: float
    from_x: float
    noise: float
    from_memory: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Every step of a trajectory, index 0 the image end: its coefficients and its update.

    memory: what an update remembers. `previous`: x0 of the step before (multistep solvers); `raw`: x0 of this
    step before it was clamped (diffusers' DDIM keeps the denoiser's eps beside a clamped x0); `none`.
    """

    coefficients: tuple[StepCoefficients, ...]
    updates: tuple[Update, ...]
    memory: str = "none"


def step_coefficients(num_sampling_steps: int) -> list[StepCoefficients]:
    """The coefficients of every respaced step: index 0 the image end, num_sampling_steps - 1 the noise end.

    The timesteps are round(i * 999 / (num_sampling_steps - 1)); the respaced betas are 1 - a_t / a_prev.
    """
    if not 2 <= num_sampling_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"num_sampling_steps is {num_sampling_steps}, it must be 2 to {NUM_TRAIN_TIMESTEPS}")
    stride = (NUM_TRAIN_TIMESTEPS - 1) / (num_sampling_steps - 1)
    timesteps = [round(i * stride) for i in range(num_sampling_steps)]
    a = linear_alphas_cumprod()[timesteps]
    return coefficients_at(timesteps, a, np.append(1.0, a[:-1]))


def coefficients_at(timesteps: Sequence[int], a: np.ndarray, a_prev: np.ndarray) -> list[StepCoefficients]:
    """The coefficients of steps from a_t to a_prev, float64 [steps] each, in the order of `timesteps`."""
    beta = 1.0 - a / a_prev
    variance = beta * (1.0 - a_prev) / (1.0 - a)
    clipped = np.append(variance[1:2], variance[1:]) if len(variance) > 1 else variance
    mean_x0 = np.sqrt(a_prev) * beta / (1.0 - a)
    mean_xt = np.sqrt(1.0 - beta) * (1.0 - a_prev) / (1.0 - a)
    logs = (np.log(np.maximum(values, TINY_VARIANCE)) for values in (clipped, beta))
    columns = (a, a_prev, mean_x0, mean_xt, np.sqrt(variance), *logs)
    return [
        StepCoefficients(t, *map(float, row))
        for t, row in zip(timesteps, np.stack(columns, axis=1), strict=True)
    ]


def respaced_schedule(num_sampling_steps: int, *, sampler: str, eta: float, learned_range: bool) -> Schedule:
    """The steps of `step_coefficients` by DDPM (7), or by DDIM (12) with its eps replaced by (2)."""
    coefficients = step_coefficients(num_sampling_steps)
    updates = [ddim_update(c, eta) if sampler == "ddim" else ddpm_update(c) for c in coefficients]
    if learned_range:
        updates = [u._replace(noise=float(number > 0)) for number, u in enumerate(updates)]
    return Schedule(tuple(coefficients), tuple(updates))


def ddpm_update(c: StepCoefficients) -> Update:
    """DDPM (7) with the fixed posterior variance."""
    return Update(c.posterior_mean_x0, c.posterior_mean_xt, c.sigma)


def ddim_update(c: StepCoefficients, eta: float = 0.0) -> Update:
    """DDIM (12), its eps by (2) solved for x and x0."""
    a, a_prev, deviation = c.alpha_cumprod, c.alpha_cumprod_prev, eta * c.sigma
    direction = math.sqrt(max(0.0, 1.0 - a_prev - deviation**2)) / math.sqrt(1.0 - a)
    return Update(math.sqrt(a_prev) - direction * math.sqrt(a), direction, deviation)


def step_table(
    schedule: Schedule,
    *,
    cfg_scale: float,
    guidance_scale: float,
    trust_radius: str,
    window: tuple[float, float],
    numel: int,
) -> Tensor:
    """Every step's coefficients as the ops read them: fp32 [steps, COLUMNS], row 0 the image end.

    What an update remembers has no column: the engine adds it. The push of (4) is PUSH + PUSH_PER_EPS
    ||eps||: one of the two is zero, by the trust radius, and both are outside of the window. numel: elements
    of a sample.
    """
    rows = np.zeros((len(schedule.updates), COLUMNS), dtype=np.float64)
    for row, c, update in zip(rows, schedule.coefficients, schedule.updates, strict=True):
        a = c.alpha_cumprod
        row[Column.CFG_SCALE] = cfg_scale
        row[Column.INV_SQRT_ALPHA] = 1.0 / math.sqrt(a)
        row[Column.EPS_TO_XSTART] = math.sqrt(1.0 - a) / math.sqrt(a)
        row[Column.FROM_XSTART], row[Column.FROM_X] = update.from_xstart, update.from_x
        row[Column.NOISE] = update.noise
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


def linear_step(x: Tensor, pred_xstart: Tensor, remembered: Tensor, noise: Tensor, update: Update) -> Tensor:
    """x' = from_xstart x0 + from_x x + from_memory m + noise z: a step of any `Schedule`, [B, C, H, W]."""
    value = update.from_xstart * pred_xstart + update.from_x * x + update.noise * noise
    return value + update.from_memory * remembered if update.from_memory else value
