"""diffusers' schedulers as a `Schedule`: DDIM, DDPM and DPM-Solver++ are linear in x, x0 and noise."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import numpy as np

from acs_fast.config import InputError
from acs_fast.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    Schedule,
    StepCoefficients,
    Update,
    coefficients_at,
    ddim_update,
    ddpm_update,
)

ACCEPTED = "DDIMScheduler, DDPMScheduler, and DPMSolverMultistepScheduler with dpmsolver++"
# settings that are served, each with the first as diffusers' own default; others change what a step is
SERVED: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
    "prediction_type": ("epsilon",),
    "thresholding": (False,),
    "clip_sample_range": (1.0, 1),
    "rescale_betas_zero_snr": (False,),
    "use_flow_sigmas": (False,),
}
OWN: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2, 1),
    },
}
LOWER_ORDER_BELOW = 15  # steps: then diffusers ends a multistep trajectory with a step of first order


def read_schedule(scheduler: Any, num_inference_steps: int) -> Schedule:
    """The steps that a diffusers scheduler takes after `set_timesteps(num_inference_steps)`.

    scheduler: a DDIMScheduler (eta 0, as `DiTPipeline` calls it), a DDPMScheduler of fixed variance or a
    DPMSolverMultistepScheduler of `dpmsolver++` or `sde-dpmsolver++`, order 1 or 2; with any betas and
    timestep spacing, epsilon prediction and 1000 training steps. It stays as it is. Its float32 products of
    alphas are taken over, so that both sample on one schedule; what follows from them is computed in float64.
    Sources: DDPM (7) (Ho et al. 2020), DDIM (12) (Song et al. 2021), DPM-Solver++ (Lu et al. 2022, alg. 2).
    Raises InputError for any other scheduler or setting.
    """
    name = type(scheduler).__name__
    read = {
        "DDIMScheduler": _ddim,
        "DDPMScheduler": _ddpm,
        "DPMSolverMultistepScheduler": _dpm_solver,
    }.get(name)
    if read is None:
        raise InputError(f"the scheduler is a {name}; accepted are {ACCEPTED}")
    # a configuration keeps what another scheduler had: only what the class itself takes means anything
    own = inspect.signature(type(scheduler).__init__).parameters
    settings = {key: value for key, value in scheduler.config.items() if key in own}
    for key, served in {**SERVED, **OWN.get(name, {})}.items():
        if settings.get(key, served[0]) not in served:
            values = " or ".join(map(repr, served))
            raise InputError(f"the {name} has {key}={settings[key]!r}; served is {values}")
    if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= NUM_TRAIN_TIMESTEPS:
        raise InputError(
            f"num_inference_steps is {num_inference_steps!r}, it must be 1 to {NUM_TRAIN_TIMESTEPS}"
        )
    own_copy = copy.deepcopy(scheduler)
    own_copy.set_timesteps(num_inference_steps)
    return read(own_copy, num_inference_steps)


def clips(scheduler: Any) -> bool:
    """Whether the scheduler clamps x0 to [-1, 1]: DPM-Solver never does, whatever its configuration kept."""
    return not type(scheduler).__name__.startswith("DPM") and bool(scheduler.config.get("clip_sample", False))


def _coefficients(timesteps: list[int], a: np.ndarray, a_prev: np.ndarray) -> list[StepCoefficients]:
    """From the noise end, as diffusers counts, to the image end first."""
    return coefficients_at(timesteps[::-1], a[::-1], a_prev[::-1])


def _ddim(scheduler: Any, num_inference_steps: int) -> Schedule:
    timesteps = [int(t) for t in scheduler.timesteps]
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()
    previous = [t - NUM_TRAIN_TIMESTEPS // num_inference_steps for t in timesteps]
    final = float(scheduler.final_alpha_cumprod)
    a_prev = np.array([alphas[t] if t >= 0 else final for t in previous])
    coefficients = _coefficients(timesteps, alphas[timesteps], a_prev)
    if not clips(scheduler):
        return Schedule(tuple(coefficients), tuple(map(ddim_update, coefficients)))
    # x0 is clamped and the denoiser's eps is not: the update is DDIM's with x0 split into both
    updates = []
    for c in coefficients:
        _, from_x, noise = ddim_update(c)[:3]
        from_raw = -from_x * math.sqrt(c.alpha_cumprod)
        updates.append(Update(math.sqrt(c.alpha_cumprod_prev), from_x, noise, from_raw))
    return Schedule(tuple(coefficients), tuple(updates), memory="raw")


def _ddpm(scheduler: Any, num_inference_steps: int) -> Schedule:
    timesteps = [int(t) for t in scheduler.timesteps]
    alphas = scheduler.alphas_cumprod.double().cpu().numpy()
    a = alphas[timesteps]
    coefficients = _coefficients(timesteps, a, np.append(a[1:], 1.0))
    updates = []
    for c in coefficients:
        update = ddpm_update(c)
        if scheduler.config.get("variance_type") == "fixed_large":
            update = update._replace(noise=math.sqrt(1.0 - c.alpha_cumprod / c.alpha_cumprod_prev))
        updates.append(update if c.timestep > 0 else update._replace(noise=0.0))
    return Schedule(tuple(coefficients), tuple(updates))


def _dpm_solver(scheduler: Any, num_inference_steps: int) -> Schedule:
    timesteps = [int(t) for t in scheduler.timesteps]
    sigmas = scheduler.sigmas.double().cpu().numpy()  # sqrt(1 - a) / sqrt(a), one more than steps
    a = 1.0 / (1.0 + sigmas**2)
    settings, count = scheduler.config, len(timesteps)
    first_order_last = (
        settings.get("euler_at_final", False)
        or (settings.get("lower_order_final", True) and count < LOWER_ORDER_BELOW)
        or settings.get("final_sigmas_type", "zero") == "zero"
    )
    updates = []
    for i in range(count):
        second = settings.solver_order == 2 and i > 0 and not (i == count - 1 and first_order_last)
        updates.append(_dpm_update(sigmas, i, second, settings))
    coefficients = _coefficients(timesteps, a[:-1], a[1:])
    return Schedule(tuple(coefficients), tuple(updates[::-1]), memory="previous")


def _dpm_update(sigmas: np.ndarray, i: int, second: bool, settings: Any) -> Update:
    """x' = s x + alpha (1 - e^-h') (m0 + D1 / 2) + sigma' sqrt(1 - e^-2h) z, D1 = (m0 - m1) h / h_before.

    s = sigma' / sigma, h' = h; of the SDE s is e^-h times that and h' = 2 h. Without the SDE z has no share.
    The solver of type `heun` weighs D1 by alpha (1 - (1 - e^-h') / h') instead.
    """

    def parts(sigma: float) -> tuple[float, float]:
        alpha = 1.0 / math.sqrt(1.0 + sigma**2)
        return alpha, sigma * alpha

    (alpha, deviation), (_, deviation_before) = parts(sigmas[i + 1]), parts(sigmas[i])
    decay = sigmas[i + 1] / sigmas[i]  # e^-h: h is the difference of log(1 / sigma)
    stochastic = settings.algorithm_type == "sde-dpmsolver++"
    from_x = deviation / deviation_before * (decay if stochastic else 1.0)
    weight = alpha * (1.0 - (decay**2 if stochastic else decay))
    noise = deviation * math.sqrt(1.0 - decay**2) if stochastic else 0.0
    if not second:
        return Update(weight, from_x, noise)
    h, before = -math.log(decay) if decay else math.inf, math.log(sigmas[i - 1] / sigmas[i])
    half = 0.5 * weight
    if settings.solver_type == "heun":
        half = alpha - weight / (2.0 * h if stochastic else h)
    slope = half * h / before
    return Update(weight + slope, from_x, noise, -slope)
