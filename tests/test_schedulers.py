"""Schedules read from diffusers' schedulers take the steps that these take."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor

from acs_fast import InputError
from acs_fast.diffusion import linear_step, predict_xstart
from acs_fast.schedulers import clips, read_schedule

SPACINGS = ("leading", "linspace", "trailing")
DPM = [
    {"algorithm_type": algorithm, "solver_type": solver, **others}
    for algorithm, solver, others in itertools.product(
        ("dpmsolver++", "sde-dpmsolver++"),
        ("midpoint", "heun"),
        (
            {},
            {"solver_order": 1},
            {"final_sigmas_type": "sigma_min", "lower_order_final": False},
            {"final_sigmas_type": "sigma_min"},
            {"use_karras_sigmas": True},
            {"euler_at_final": True},
        ),
    )
]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *(
        (DDIMScheduler, {"clip_sample": clip, "timestep_spacing": s})
        for clip in (False, True)
        for s in SPACINGS
    ),
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    (DDIMScheduler, {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085}),
    *(
        (DDPMScheduler, {"clip_sample": clip, "timestep_spacing": s})
        for clip in (False, True)
        for s in SPACINGS
    ),
    *(
        (DDPMScheduler, {"variance_type": v, "clip_sample": False})
        for v in ("fixed_large", "fixed_small_log")
    ),
    *((DPMSolverMultistepScheduler, settings) for settings in DPM),
    *((DPMSolverMultistepScheduler, {"timestep_spacing": s}) for s in SPACINGS),
]
SHAPE = (2, 4, 8, 8)


def drawn(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))


def by_diffusers(scheduler: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """x after every step, with eps and noise drawn by the step's number."""
    x, result = drawn(0), []
    scheduler.set_timesteps(steps)
    for number, t in enumerate(scheduler.timesteps):
        noise = drawn(2000 + number)
        for module in ("ddpm", "dpmsolver_multistep"):
            name = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            monkeypatch.setattr(name, lambda *args, noise=noise, **keywords: noise)
        x = scheduler.step(drawn(1000 + number), t, x).prev_sample
        result.append(x)
    return result


def by_schedule(scheduler: Any, steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    schedule, x = read_schedule(scheduler, steps), drawn(0).to(dtype)
    memory, result = torch.zeros_like(x), []
    for number, step in enumerate(reversed(range(steps))):
        raw = predict_xstart(x, drawn(1000 + number).to(dtype), schedule.coefficients[step])
        x0 = raw.clamp(-1.0, 1.0) if clips(scheduler) else raw
        remembered = memory if schedule.memory == "previous" else raw
        x = linear_step(x, x0, remembered, drawn(2000 + number).to(dtype), schedule.updates[step])
        memory = x0
        result.append(x)
    return result


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("kind", "settings"), CASES, ids=lambda v: v.__name__[:4] if isinstance(v, type) else str(v)
)
def test_every_step_is_the_schedulers(kind, settings, steps, monkeypatch) -> None:
    scheduler = kind(**settings)
    expected = by_diffusers(kind(**settings), steps, monkeypatch)
    got = by_schedule(scheduler, steps)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_what_a_configuration_keeps_of_another_scheduler_means_nothing(monkeypatch) -> None:
    other = DDIMScheduler(clip_sample=True, clip_sample_range=2.0).config
    kept = DPMSolverMultistepScheduler.from_config(other)
    assert kept.config["clip_sample"] and not clips(kept)
    expected = by_diffusers(DPMSolverMultistepScheduler.from_config(other), 7, monkeypatch)
    for ours, theirs in zip(by_schedule(kept, 7), expected, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_the_scheduler_stays_as_it_is() -> None:
    scheduler = DPMSolverMultistepScheduler()
    before = scheduler.timesteps.clone()
    read_schedule(scheduler, 5)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler; accepted are DDIMScheduler, DDPMScheduler"),
        (
            DDIMScheduler(prediction_type="v_prediction"),
            "prediction_type='v_prediction'; served is 'eps",
        ),
        (DDIMScheduler(thresholding=True), "thresholding=True; served is False"),
        (DDIMScheduler(clip_sample_range=2.0), "clip_sample_range=2.0"),
        (DDIMScheduler(num_train_timesteps=500), "num_train_timesteps=500; served is 1000"),
        (
            DDPMScheduler(variance_type="learned_range"),
            "variance_type='learned_range'; served is 'fixed",
        ),
        (DPMSolverMultistepScheduler(solver_order=3), "solver_order=3; served is 2 or 1"),
    ],
)
def test_what_cannot_be_served_is_named(scheduler, message) -> None:
    with pytest.raises(InputError, match=message):
        read_schedule(scheduler, 5)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_out_of_range_is_refused(steps) -> None:
    with pytest.raises(InputError, match=f"num_inference_steps is {steps}, it must be 1 to 1000"):
        read_schedule(DDIMScheduler(), steps)
