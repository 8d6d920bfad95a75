"""ACS's push for any loop over a diffusers scheduler, as its `callback_on_step_end`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.diffusion import StepCoefficients, predict_xstart
from acs_fast.parts.checks import Whole, check_real
from acs_fast.parts.discriminator import Discriminator
from acs_fast.schedulers import clips, read_schedule

WATCHED = "_acs_fast_guided_step"  # marks a scheduler's step that is watched
PROBE_STEPS = 10  # a scheduler that cannot be served is refused before the loop, by a schedule of so many


class _Taken(NamedTuple):
    """What the scheduler was last called with."""

    model_output: Tensor
    timestep: int
    sample: Tensor


class GuidedStep:
    """Pushes x_(t-1) by s_t g / ||g|| after each step inside the window: (4) of docs/method.md.

        with GuidedStep(discriminator, labels, pipe.scheduler) as guide:
            images = pipe(prompts, callback_on_step_end=guide).images

    x0 of the step comes by (2) from what the loop gives `scheduler.step`, which is therefore watched inside
    of the `with`, and afterwards is what it was before.

    discriminator: a fitted `Discriminator` of the loop's latents. class_labels: its label of each image of
    the batch. scheduler: the loop's own, DDIMScheduler, DDPMScheduler or DPMSolverMultistepScheduler as
    `read_schedule` takes them. objective: `adversarial` or `nonsaturating`. scale, trust_radius, window:
    s_t = scale r_t while t / T is in the closed window, else 0; r_t as docs/method.md has it, `sigma` or
    `eps`. InputError for what cannot be served.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        class_labels: Whole,
        scheduler: Any,
        *,
        objective: str = "adversarial",
        scale: float = 0.15,
        trust_radius: str = "sigma",
        window: tuple[float, float] = (0.1, 0.7),
    ):
        given: object = discriminator
        if not isinstance(given, Discriminator):
            kind = type(given).__name__
            raise InputError(f"discriminator is of type {kind}; give a fitted acs_fast.Discriminator")
        check_real(scale, "scale", zero=True)
        if trust_radius not in ("sigma", "eps"):
            raise InputError(f"trust_radius is {trust_radius!r}, it must be 'sigma' or 'eps'")
        if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
            raise InputError(f"window is {window}, it must be two numbers, 0 <= low <= high <= 1")
        discriminator.guidance(objective)  # refuses an untrained one, and objectives
        read_schedule(_unwatched(scheduler), PROBE_STEPS)
        self.discriminator, self.scheduler = discriminator, scheduler
        self.targets = discriminator.targets(class_labels)
        self.scale = scale
        self._settings = (objective, scale, trust_radius, (window[0], window[1]))
        self._restore: Callable[[], None] | None = None  # what leaving the `with` does; None outside of it
        self._taken: _Taken | None = None
        self._timesteps: Any = None  # those that the coefficients are of
        self._coefficients: dict[int, StepCoefficients] = {}

    def __enter__(self) -> Self:
        own = self.scheduler.step
        if self._restore is not None or hasattr(own, WATCHED):
            raise InputError("a GuidedStep watches this scheduler already; leave its `with` first")
        signature = inspect.signature(type(self.scheduler).step)

        @functools.wraps(own)  # pipelines ask step's signature what it takes
        def step(*args: Any, **keywords: Any) -> Any:
            result = own(*args, **keywords)
            given = signature.bind(self.scheduler, *args, **keywords).arguments
            self._taken = _Taken(given["model_output"], int(given["timestep"]), given["sample"])
            return result

        setattr(step, WATCHED, True)
        attributes = vars(self.scheduler)
        held = "step" in attributes
        self._restore = lambda: attributes.update(step=own) if held else attributes.pop("step", None)
        self.scheduler.step = step
        return self

    def __exit__(self, *exception: object) -> None:
        if self._restore is not None:
            self._restore()
        self._restore = self._taken = None

    def __call__(self, pipe: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        """{"latents": those pushed}, in their dtype, or `callback_kwargs` as they are outside of the window.

        callback_kwargs: holds `latents` [n, C, S, S], what the scheduler's step gave. The other arguments are
        what diffusers passes; they are not needed. InputError outside of the `with`, and for latents of
        another shape or number than the discriminator and the class labels are for.
        """
        taken = self._take(callback_kwargs)
        latents, n = callback_kwargs["latents"], len(self.targets)
        c = self._at(taken.timestep)
        guidance = self.discriminator.guidance(*self._settings)
        if not self.scale or not guidance.active(c):
            return callback_kwargs
        # of a batch doubled for classifier-free guidance the first half is the conditional one
        sample, eps = _wide(taken.sample[:n]), _wide(taken.model_output[:n])
        x0 = predict_xstart(sample, eps, c)  # (2)
        if clips(self.scheduler):
            x0 = x0.clamp(-1.0, 1.0)
        g = self.discriminator.push(guidance, x0, self.targets).to(x0)  # (3)
        push = (guidance.radius(eps, c) * g).repeat(len(latents) // n, 1, 1, 1)
        return {"latents": (_wide(latents) + push.to(latents.device)).to(latents.dtype)}  # (4)

    def _take(self, callback_kwargs: dict[str, Any]) -> _Taken:
        """What the step before was called with, and that it fits; InputError otherwise."""
        if self._restore is None:
            raise InputError("GuidedStep works inside of its `with` only: with GuidedStep(...) as guide: ...")
        taken, self._taken = self._taken, None
        if taken is None:
            raise InputError(
                "this loop took no step of the scheduler that GuidedStep watches; give GuidedStep the one "
                "that it steps, pipe.scheduler (an ACSPipeline steps none: give it discriminator= instead)"
            )
        if "latents" not in callback_kwargs:
            raise InputError('GuidedStep needs "latents" in callback_on_step_end_tensor_inputs')
        n = len(self.targets)
        for values in (taken.sample, callback_kwargs["latents"]):
            self.discriminator.check_shape(values.shape)
            if len(values) not in (n, 2 * n):
                raise InputError(
                    f"GuidedStep was given {n} class labels and the loop steps {len(values)} images; give a "
                    "label of each image (twice as many images are taken for both halves of the guidance)"
                )
        return taken

    def _at(self, timestep: int) -> StepCoefficients:
        """The coefficients of a step, read when the loop has set its timesteps."""
        timesteps = self.scheduler.timesteps
        if timesteps is not self._timesteps:  # a new tensor whenever they are set
            schedule = read_schedule(_unwatched(self.scheduler), len(timesteps))
            self._coefficients = {c.timestep: c for c in schedule.coefficients}
            if sorted(self._coefficients) != sorted(timesteps.tolist()):
                raise InputError(
                    "GuidedStep follows the timesteps of scheduler.set_timesteps(n), this loop has others; "
                    "leave out its own timesteps or sigmas"
                )
            self._timesteps = timesteps
        if timestep not in self._coefficients:
            raise InputError(f"the loop steps at timestep {timestep}, which is none of scheduler.timesteps")
        return self._coefficients[timestep]


def _unwatched(scheduler: Any) -> Any:
    """The scheduler with its class's own step: nothing done to it is seen, or reaches the loop's."""
    plain = copy.copy(scheduler)
    getattr(plain, "__dict__", {}).pop("step", None)
    return plain


def _wide(values: Tensor) -> Tensor:
    """In fp32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
