"""`GuidedStep`: ACS's push in loops over diffusers' schedulers, held against our own sampler."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    VQModel,
)

# by its module: diffusers itself offers it only where transformers is installed, which it has no use for
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from torch import Tensor

from acs_fast.config import DistillConfig, InputError
from acs_fast.guidance import Guidance
from acs_fast.models.checkpoint import load_checkpoint
from acs_fast.parts import Discriminator, GuidedStep, philox_normal
from acs_fast.sampler import denoise
from acs_fast.schedulers import read_schedule
from acs_fast.testing import excess
from tests.test_parity import SHAPES, small_transformer
from tests.test_parts import LABELS, make, make_samples, one_sentence

STEPS, CFG = 10, 2.5


@pytest.fixture(scope="module")
def fitted() -> Discriminator:
    return make().fit(*make_samples())


def own_loop(
    transformer: torch.nn.Module,
    scheduler: Any,
    latents: Tensor,
    callback: Any = None,
    doubled: bool = False,
    steps: int = STEPS,
) -> list[Tensor]:
    """A sampling loop as people write them over a diffusers DiT; the latents after every step.

    doubled: as DiTPipeline has it, the scheduler steps both halves of the guidance.
    """
    b, found = len(latents), []
    labels = torch.tensor([*LABELS, 1000, 1000, 1000])
    scheduler.set_timesteps(steps)
    x = torch.cat((latents, latents)) if doubled else latents
    for i, t in enumerate(scheduler.timesteps):
        both = torch.cat((x[:b], x[:b]))
        with torch.no_grad():
            out = transformer(both, timestep=t.expand(2 * b), class_labels=labels).sample[:, :4]
        cond, null = out.chunk(2)
        eps = null + CFG * (cond - null)
        if doubled:
            eps, x = torch.cat((eps, eps)), both
        x = scheduler.step(eps, t, x).prev_sample
        if callback is not None:
            x = callback(None, i, t, {"latents": x})["latents"]
        found.append(x[:b])
    return found


def make_scheduler(kind: Any = DDIMScheduler, **settings: Any) -> Any:
    return kind.from_config({"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, **settings})


def double(scheduler: Any) -> Any:
    scheduler = copy.deepcopy(scheduler)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.fixture(scope="module")
def start() -> Tensor:
    return philox_normal(LABELS, [5, 0, 12], 1000, seed=3, shape=(4, 8, 8))


@pytest.mark.parametrize("doubled", [False, True], ids=["single", "doubled"])
@pytest.mark.parametrize("trust_radius", ["sigma", "eps"])
@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating"])
def test_a_loop_with_the_callback_is_our_sampler(
    tmp_path: Path, fitted, start, objective, trust_radius, doubled
) -> None:
    settings: dict[str, Any] = {"objective": objective, "trust_radius": trust_radius, "window": (0.2, 0.7)}
    settings["scale"] = 0.3 if trust_radius == "sigma" else 0.05
    transformer, scheduler = small_transformer(**SHAPES["patch-2"]), make_scheduler()
    transformer.save_pretrained(tmp_path)
    with GuidedStep(fitted, LABELS, scheduler, **settings) as guide:
        theirs = own_loop(transformer, scheduler, start, guide, doubled)
    wide = copy.deepcopy(fitted)
    wide.network.double()
    exact_scheduler = double(scheduler)
    with GuidedStep(wide, LABELS, exact_scheduler, **settings) as guide:
        exact = own_loop(copy.deepcopy(transformer).double(), exact_scheduler, start.double(), guide, doubled)
    config = DistillConfig(cfg_scale=CFG, clip_denoised=False, num_sampling_steps=STEPS)
    guidance = Guidance(
        objective, fitted.network, None, 0.0, settings["scale"], trust_radius, settings["window"], "identity"
    )
    ours = denoise(
        load_checkpoint(tmp_path), torch.tensor(LABELS), torch.tensor([5, 0, 12]), config, guidance,
        fitted.targets(LABELS), read_schedule(scheduler, STEPS), start,
    )  # fmt: skip
    assert max(excess(list(ours), theirs, exact)) <= 1.0
    plain = own_loop(transformer, scheduler, start, None, doubled)
    pushed = [not torch.equal(a, b) for a, b in zip(theirs, plain, strict=True)]
    first = sum(int(t) > 700 for t in scheduler.timesteps)
    assert pushed == [False] * first + [True] * (STEPS - first)


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
@pytest.mark.parametrize("doubled", [False, True], ids=["single", "doubled"])
def test_each_push_is_the_formula(fitted, start, kind, doubled) -> None:
    """Against (2) and (4) written out, from what the scheduler is stepped with."""
    transformer, scheduler, checked = small_transformer(**SHAPES["patch-2"]), make_scheduler(kind), []
    own = scheduler.step

    def record(model_output: Tensor, timestep: Tensor, sample: Tensor, **keywords: Any) -> Any:
        checked.append((model_output, int(timestep), sample))
        return own(model_output, timestep, sample, **keywords)

    scheduler.step = record
    torch.manual_seed(0)
    with GuidedStep(fitted, LABELS, scheduler, scale=0.4, window=(0.0, 0.65)) as guide:

        def callback(pipe: Any, i: int, t: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
            result = guide(pipe, i, t, kwargs)
            eps, timestep, sample = checked[-1]
            c = next(c for c in read_schedule(scheduler, STEPS).coefficients if c.timestep == timestep)
            a = scheduler.alphas_cumprod[timestep]
            x0 = (sample[:3] - (1 - a).sqrt() * eps[:3]) / a.sqrt()
            push = 0.4 * c.sigma * 16.0 * fitted.direction(x0, LABELS) if timestep <= 650 else 0.0 * x0
            moved = result["latents"] - kwargs["latents"]
            halves = moved.chunk(2) if doubled else [moved]
            for half in halves:
                # of a random denoiser x0 is large, and x with it: its rounding is in the difference
                tolerance = 4e-6 * kwargs["latents"].abs().max().item() + 1e-3 * push.abs().max().item()
                assert (half - push).abs().max() <= tolerance
            assert (result is kwargs) == (timestep > 650)
            return result

        own_loop(transformer, scheduler, start, callback, doubled)
    assert len(checked) == STEPS and scheduler.step is record


def test_both_halves_are_pushed_by_the_first_ones_g(fitted) -> None:
    loop, moved = Loop(), []
    x, eps, other = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(3))
    with GuidedStep(fitted, LABELS, loop.scheduler, trust_radius="eps") as guide:
        for sample, output in ((x, eps), (torch.cat((x, other)), torch.cat((eps, 2.0 * other)))):
            after = loop.scheduler.step(output, loop.t, sample).prev_sample
            moved.append(guide(None, 6, loop.t, {"latents": after})["latents"] - after)
    assert moved[0].norm() > 0.1
    assert torch.allclose(moved[1], moved[0].repeat(2, 1, 1, 1), atol=1e-5)


def test_g_is_taken_at_the_clamped_x0(fitted) -> None:
    scheduler = make_scheduler(clip_sample=True)
    scheduler.set_timesteps(STEPS)
    samples, labels = make_samples(n=2)
    t = scheduler.timesteps[6]
    c = next(c for c in read_schedule(scheduler, STEPS).coefficients if c.timestep == int(t))
    with GuidedStep(fitted, labels, scheduler) as guide:
        x = scheduler.step(torch.zeros_like(samples), t, samples).prev_sample
        moved = guide(None, 6, t, {"latents": x})["latents"] - x
    x0 = (samples / c.alpha_cumprod**0.5).clamp(-1.0, 1.0)
    g = fitted.direction(x0, labels)
    assert not torch.allclose(g, fitted.direction(samples / c.alpha_cumprod**0.5, labels), atol=1e-2)
    assert torch.allclose(moved, 0.15 * c.sigma * 16.0 * g, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_0_changes_no_byte(fitted, start, dtype) -> None:
    transformer = small_transformer(**SHAPES["patch-2"]).to(dtype)
    scheduler = make_scheduler()
    plain = own_loop(transformer, scheduler, start.to(dtype))
    with GuidedStep(fitted, LABELS, scheduler, scale=0, window=(0.0, 1.0)) as guide:
        guided = own_loop(transformer, scheduler, start.to(dtype), guide)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(plain, guided, strict=True)
    )
    with GuidedStep(fitted, LABELS, scheduler, scale=0.3) as guide:
        guided = own_loop(transformer, scheduler, start.to(dtype), guide)
    assert guided[-1].dtype == dtype and not torch.equal(guided[-1], plain[-1])


class Loop:
    """A scheduler and one step of it, at the timestep in the middle of the window."""

    def __init__(self, scheduler: Any = None):
        self.scheduler = scheduler or make_scheduler()
        self.scheduler.set_timesteps(STEPS)
        self.t = self.scheduler.timesteps[6]

    def step(self, guide: GuidedStep, b: int = 3, size: int = 8, latents: Tensor | None = None) -> Tensor:
        x = torch.ones(b, 4, size, size)
        x = self.scheduler.step(0.5 * x, self.t, x).prev_sample
        return guide(None, 6, self.t, {"latents": x if latents is None else latents})["latents"]


def test_the_schedulers_step_is_put_back(fitted) -> None:
    loop = Loop()
    assert "step" not in vars(loop.scheduler)
    guide = GuidedStep(fitted, LABELS, loop.scheduler)
    for _ in range(2):  # one guide, one `with` after another
        with guide:
            assert inspect.signature(loop.scheduler.step) == inspect.signature(make_scheduler().step)
            loop.step(guide)
        assert "step" not in vars(loop.scheduler)
    with pytest.raises(KeyError), guide:
        raise KeyError
    assert "step" not in vars(loop.scheduler)
    loop.scheduler.step = own = partial(DDIMScheduler.step, loop.scheduler)
    with pytest.raises(KeyError), guide:
        raise KeyError
    assert loop.scheduler.step is own


def test_nested_guides_are_refused_and_change_nothing(fitted) -> None:
    loop = Loop()
    guide, other = (GuidedStep(fitted, LABELS, loop.scheduler) for _ in range(2))
    with guide:
        for second in (guide, other):
            with pytest.raises(InputError, match="watches this scheduler already; leave its `with` first"):
                second.__enter__()
        loop.step(guide)
    assert "step" not in vars(loop.scheduler)
    with other:
        loop.step(other)


def test_outside_of_the_with_it_is_refused(fitted) -> None:
    guide, loop = GuidedStep(fitted, LABELS, make_scheduler()), Loop()
    with pytest.raises(InputError, match="inside of its `with` only"):
        loop.step(guide)
    with guide:
        pass
    with pytest.raises(InputError, match="inside of its `with` only"):
        loop.step(guide)


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        (lambda guide, loop: Loop().step(guide), ["took no step of the scheduler", "pipe.scheduler"]),
        (
            lambda guide, loop: (loop.step(guide), guide(None, 7, 0, {"latents": torch.ones(3, 4, 8, 8)})),
            ["took no step of the scheduler"],
        ),
        (lambda guide, loop: loop.step(guide, size=16), ["4 channels of 8 px", "have 4 of 16"]),
        (lambda guide, loop: loop.step(guide, b=2), ["3 class labels", "steps 2 images"]),
        (lambda guide, loop: loop.step(guide, b=9), ["3 class labels", "steps 9 images"]),
        (lambda guide, loop: loop.step(guide, latents=torch.ones(4, 4, 8, 8)), ["steps 4 images"]),
        (lambda guide, loop: loop.step(guide, latents=torch.ones(3, 16, 64)), ["shape (3, 16, 64)"]),
    ],
)
def test_loops_that_do_not_fit(fitted, use, parts) -> None:
    loop = Loop()
    with pytest.raises(InputError) as error, GuidedStep(fitted, LABELS, loop.scheduler) as guide:
        use(guide, loop)
    one_sentence(error, *parts)
    assert "step" not in vars(loop.scheduler)


def test_latents_must_be_among_the_callbacks_tensors(fitted) -> None:
    loop = Loop()
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide:
        loop.step(guide)
        x = torch.ones(3, 4, 8, 8)
        loop.scheduler.step(x, loop.t, x)
        with pytest.raises(InputError, match='"latents" in callback_on_step_end_tensor_inputs'):
            guide(None, 0, loop.t, {"prompt_embeds": x})


def test_timesteps_of_the_loops_own_are_refused(fitted) -> None:
    loop = Loop(make_scheduler(DDPMScheduler))
    loop.scheduler.set_timesteps(timesteps=[900, 610, 600, 400, 300])
    loop.t = torch.tensor(600)
    refused = pytest.raises(InputError, match=r"scheduler.set_timesteps\(n\), this loop has others")
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide, refused:
        loop.step(guide)
    loop = Loop()
    loop.t = 601
    refused = pytest.raises(InputError, match=r"timestep 601, which is none of scheduler\.timesteps")
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide, refused:
        loop.step(guide)


def test_a_second_call_may_have_other_timesteps(fitted) -> None:
    loop, moved = Loop(), []
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide:
        for steps in (STEPS, 50, STEPS):
            loop.scheduler.set_timesteps(steps)
            t = loop.t = next(t for t in loop.scheduler.timesteps if 300 <= t <= 301)
            x = loop.scheduler.step(0.5 * torch.ones(3, 4, 8, 8), t, torch.ones(3, 4, 8, 8)).prev_sample
            moved.append((guide(None, 0, t, {"latents": x})["latents"] - x).norm().item())
    sigmas = [
        next(c.sigma for c in read_schedule(loop.scheduler, steps).coefficients if c.timestep == int(t))
        for steps in (STEPS, 50)
    ]
    assert moved[0] == moved[2]
    assert moved[1] / moved[0] == pytest.approx(sigmas[1] / sigmas[0], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"scheduler": EulerDiscreteScheduler()}, ["EulerDiscreteScheduler", "DDIM", "DDPM", "DPM"]),
        ({"scheduler": "ddim"}, ["str", "DDIM", "DDPM", "DPM"]),
        ({"scheduler": DDIMScheduler(prediction_type="v_prediction")}, ["epsilon"]),
        ({"discriminator": torch.nn.Flatten()}, ["type Flatten", "acs_fast.Discriminator"]),
        ({"class_labels": [7, 1]}, ["label 1 is none", "7, 0, 993"]),
        ({"discriminator": make()}, ["untrained; call fit(samples, labels) first"]),
        ({"objective": "density_ratio"}, ["objective 'density_ratio'", "real images"]),
        ({"scale": -0.1}, ["scale is -0.1", "at least 0"]),
        ({"scale": float("inf")}, ["scale is inf"]),
        ({"trust_radius": "unit"}, ["trust_radius is 'unit'", "'sigma' or 'eps'"]),
        ({"window": (0.7, 0.1)}, ["window is (0.7, 0.1)", "low <= high"]),
        ({"window": (0.1, 0.2, 0.3)}, ["window is (0.1, 0.2, 0.3)"]),
        ({"window": (0.1, float("nan"))}, ["window is"]),
    ],
)
def test_guides_that_cannot_be_served(fitted, change, parts) -> None:
    given = {"discriminator": fitted, "class_labels": LABELS, "scheduler": make_scheduler(), **change}
    with pytest.raises(InputError) as error:
        GuidedStep(**given)
    one_sentence(error, *parts)


def make_kandinsky() -> KandinskyV22Pipeline:
    """The pipeline of diffusers with callback_on_step_end that needs no text encoder; random weights."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        layers_per_block=1, cross_attention_dim=8, addition_embed_type="image", encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
    )  # fmt: skip
    movq = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=8)
    scheduler = make_scheduler(DDPMScheduler)
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_of_diffusers_with_its_own_callback(fitted) -> None:
    pipe = make_kandinsky()
    embeds = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))

    def sample(**keywords: Any) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        return pipe(
            embeds, torch.zeros_like(embeds), height=8, width=8, num_inference_steps=STEPS,
            generator=generator, output_type="latent", **keywords,
        ).images  # fmt: skip

    plain = sample()
    with GuidedStep(fitted, LABELS, pipe.scheduler, scale=0.0) as guide:
        assert torch.equal(sample(callback_on_step_end=guide), plain)

    def loss(x: Tensor) -> float:
        return torch.nn.functional.cross_entropy(fitted.network(x), fitted.targets(LABELS)).item()

    with GuidedStep(fitted, LABELS, pipe.scheduler, scale=1.0) as guide:
        guided = sample(callback_on_step_end=guide)
    assert torch.equal(sample(), plain)
    assert loss(guided) > loss(plain) + 0.1
