"""The parts for people with a sampler of their own: discriminator, guided step, noise."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import UNet2DConditionModel, VQModel

# by its module: diffusers itself offers it only where transformers is installed, which it has no use for
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from torch import Tensor

from acs_fast.config import DistillConfig, InputError
from acs_fast.guidance import Guidance
from acs_fast.kernels import reference
from acs_fast.models.checkpoint import load_checkpoint
from acs_fast.parts import Discriminator, GuidedStep, philox_normal
from acs_fast.sampler import denoise
from acs_fast.schedulers import read_schedule
from acs_fast.testing import excess
from tests.test_parity import SHAPES, small_transformer

LABELS = [7, 0, 993]
STEPS, CFG = 10, 2.5


def make_samples(n: int = 36, channels: int = 4, size: int = 8, seed: int = 1) -> tuple[Tensor, list[int]]:
    """Samples whose class is a coarse pattern plus noise, and their labels in no order."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(len(LABELS), channels, 2, 2, generator=torch.Generator().manual_seed(9))
    patterns = patterns.repeat_interleave(size // 2, dim=2).repeat_interleave(size // 2, dim=3)
    picked = torch.randint(len(LABELS), (n,), generator=generator)
    noise = torch.randn(n, channels, size, size, generator=generator)
    return patterns[picked] + 0.5 * noise, [LABELS[i] for i in picked.tolist()]


def make(**settings: Any) -> Discriminator:
    """An untrained one of small latents."""
    settings = {"class_labels": LABELS, "size": 8, "steps": 16, "batch_size": 36, "mirror": False} | settings
    return Discriminator(**settings)


@pytest.fixture(scope="module")
def fitted() -> Discriminator:
    return make().fit(*make_samples())


def weights(discriminator: Discriminator) -> Tensor:
    return torch.cat([values.flatten() for values in discriminator.network.state_dict().values()])


def one_sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    """The message names all of that, on one line."""
    text = str(error.value)
    assert "\n" not in text and not text.endswith(".")
    assert [part for part in parts if part not in text] == []


# --- Discriminator ---------------------------------------------------------------------------------------


def test_it_learns_labels_in_the_order_given(fitted) -> None:
    samples, labels = make_samples(seed=2)
    assert fitted.accuracy(samples, labels) > 95.0
    assert fitted.accuracy(samples, [LABELS[(LABELS.index(label) + 1) % 3] for label in labels]) < 5.0
    assert fitted.targets([993, 7, 7, 0]).tolist() == [2, 0, 0, 1]
    assert fitted.targets(torch.tensor(0)).tolist() == [1]
    assert not fitted.network.training
    assert not any(parameter.requires_grad for parameter in fitted.network.parameters())


def test_the_same_seed_gives_the_same_weights(fitted) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    twice = make().fit(*make_samples())
    assert torch.equal(weights(twice), weights(fitted))
    assert torch.equal(weights(twice.fit(*make_samples())), weights(fitted))  # from scratch each time
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(make(seed=1).fit(*make_samples())), weights(fitted))


def test_warm_goes_on_from_the_present_weights(fitted) -> None:
    samples, labels = make_samples()
    still = make(lr=1e-12).fit(samples, labels)
    kept = still.network
    scratch = weights(still)
    still._network = fitted.network
    assert torch.allclose(weights(still.fit(samples, labels, warm=True)), weights(fitted), atol=1e-6)
    assert not torch.allclose(weights(still), scratch, atol=1e-2)
    assert kept is not still.network
    assert torch.equal(weights(make().fit(samples, labels, warm=True)), weights(fitted))  # the first has none


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_trained_and_guides_within_a_pipeline(fitted, mode) -> None:
    with mode():
        samples, labels = make_samples()
        inside = make().fit(samples, labels)
        g = inside.direction(samples, labels)
    assert torch.equal(weights(inside), weights(fitted))
    assert torch.equal(g, fitted.direction(*make_samples()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype) -> None:
    samples, labels = make_samples()
    samples = samples.to(dtype)
    trained = make().fit(samples, labels)
    assert torch.equal(weights(trained), weights(make().fit(samples.float(), labels)))
    assert trained.direction(samples, labels).dtype == dtype


def test_latents_are_shifted_and_pixels_cropped(monkeypatch) -> None:
    seen = []
    for name in ("shift_and_flip", "random_resized_crop"):

        def record(images, mirror, generator, name=name):
            seen.append((name, mirror))
            return images

        monkeypatch.setattr(f"acs_fast.parts.discriminator.{name}", record)
    for channels, mirror in ((4, False), (3, True), (1, False)):
        make(channels=channels, mirror=mirror, steps=1).fit(*make_samples(channels=channels))
    assert seen == [("shift_and_flip", False), ("random_resized_crop", True), ("random_resized_crop", False)]


@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating"])
def test_direction_is_the_normalised_gradient(fitted, objective) -> None:
    samples, labels = make_samples(n=5, seed=3)
    g = fitted.direction(samples, labels, objective)
    assert torch.allclose(g.flatten(1).norm(dim=1), torch.ones(5))
    x = samples.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(fitted.network(x), fitted.targets(labels), reduction="sum")
    (want,) = torch.autograd.grad(loss, x)  # both rise with the same margin
    assert torch.allclose(g, want / want.flatten(1).norm(dim=1).view(-1, 1, 1, 1), atol=1e-4)


def test_save_and_load(fitted, tmp_path: Path) -> None:
    path = tmp_path / "f" / "d.safetensors"
    fitted.save(path)
    again = Discriminator.load(path)
    assert again.settings == fitted.settings
    samples, labels = make_samples(seed=4)
    assert torch.equal(again.network(samples), fitted.network(samples))
    assert torch.equal(weights(again.fit(*make_samples())), weights(fitted))


def damage(path: Path, kind: str) -> None:
    """Make a saved file one that is no Discriminator's."""
    state = safetensors.torch.load_file(path)
    settings = make().settings
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("no weights at all")
    elif kind == "missing":
        path.unlink()
    elif kind == "foreign":
        safetensors.torch.save_file(state, path, {"format": "pt"})
    elif kind == "tensor":
        state.pop("classifier.bias")
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})
    elif kind == "shape":
        settings["size"] = 16
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})
    elif kind == "json":
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": "{"})
    else:
        settings["newer"] = 1
        safetensors.torch.save_file(state, path, {"acs_fast.discriminator": json.dumps(settings)})


@pytest.mark.parametrize("kind", ["cut", "text", "missing", "foreign", "tensor", "shape", "json", "setting"])
def test_files_that_are_damaged_or_of_something_else(fitted, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    damage(path, kind)
    with pytest.raises(InputError) as error:
        Discriminator.load(path)
    one_sentence(error, str(path), "save" if kind != "foreign" else "Discriminator.save")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"class_labels": [3]}, ["class_labels", "at least two"]),
        ({"class_labels": [3, 3]}, ["3, 3", "each once"]),
        ({"class_labels": [3, -1]}, ["class_labels holds -1"]),
        ({"class_labels": [0.5, 1.0]}, ["class_labels holds float"]),
        ({"network": "convnet-5"}, ["convnet-5 needs images of 32 px"]),
        ({"network": "resnet18"}, ["resnet18 has BatchNorm", "resnet-18"]),
        ({"network": "mlp"}, ["no network 'mlp'", "convnet-<depth>"]),
        ({"steps": 0}, ["steps is 0", "at least 1"]),
        ({"batch_size": 1.5}, ["batch_size is 1.5"]),
        ({"lr": float("nan")}, ["lr is nan", "above 0"]),
        ({"lr": 0.0}, ["lr is 0.0"]),
        ({"seed": 2**63}, ["seed is", "0 to 9223372036854775807"]),
        ({"seed": True}, ["seed is True"]),
    ],
)
def test_settings_that_do_not_fit(settings, parts) -> None:
    with pytest.raises(InputError) as error:
        make(**settings)
    one_sentence(error, *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s, l: (s.repeat(1, 1, 2, 2), l), ["4 channels of 8 px, these samples have 4 of 16;"]),
        (lambda s, l: (s[:, :3], l), ["4 channels of 8 px, these samples have 3 of 8;"]),
        (lambda s, l: (s[..., :4], l), ["have 4 of 8 x 4;"]),
        (lambda s, l: (s[0], l), ["shape (4, 8, 8)", "[n, channels, height, width]"]),
        (lambda s, l: (s.long(), l), ["torch.int64", "floats"]),
        (lambda s, l: (s.numpy(), l), ["ndarray", "give a tensor"]),
        (lambda s, l: (s, l[:-1]), ["36 samples and 35 labels"]),
        (lambda s, l: (s, [*l[:-1], 5]), ["label 5 is none", "7, 0, 993"]),
        (lambda s, l: (s, []), ["labels has the shape (0,)"]),
        (lambda s, l: (s * float("inf"), l), ["not finite"]),
    ],
)
@pytest.mark.parametrize("method", ["fit", "accuracy", "direction"])
def test_samples_that_do_not_fit(fitted, method, change, parts) -> None:
    discriminator = make() if method == "fit" else fitted
    with pytest.raises(InputError) as error:
        getattr(discriminator, method)(*change(*make_samples()))
    one_sentence(error, *parts)


def test_many_labels_are_shortened_in_messages() -> None:
    with pytest.raises(InputError, match=r"which are 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(1000 in all\)"):
        make(class_labels=range(1000)).targets(1000)


@pytest.mark.parametrize("call", ["network", "accuracy", "direction", "save", "guide"])
def test_before_fit(call, tmp_path: Path) -> None:
    discriminator, (samples, labels) = make(), make_samples()
    calls = {
        "network": lambda: discriminator.network,
        "accuracy": lambda: discriminator.accuracy(samples, labels),
        "direction": lambda: discriminator.direction(samples, labels),
        "save": lambda: discriminator.save(tmp_path / "d.safetensors"),
        "guide": lambda: GuidedStep(discriminator, LABELS, DDIMScheduler()),
    }
    with pytest.raises(InputError, match=r"untrained; call fit\(samples, labels\) first"):
        calls[call]()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective", ["learnability", "density_ratio", "loud"])
def test_objectives_that_cannot_be_served(fitted, objective) -> None:
    samples, labels = make_samples()
    for call in (
        lambda: fitted.direction(samples, labels, objective),
        lambda: GuidedStep(fitted, LABELS, DDIMScheduler(), objective=objective),
    ):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error, repr(objective), "adversarial or nonsaturating")
        assert ("real images" in str(error.value)) == (objective != "loud")


def test_a_training_that_diverges_is_refused_and_changes_nothing(fitted) -> None:
    discriminator = make(lr=1e30).fit  # AdamW's decay overflows
    with pytest.raises(InputError, match=r"not finite; lower lr, which is 1e\+30"):
        discriminator(*make_samples())


# --- GuidedStep ------------------------------------------------------------------------------------------


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
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(plain, guided))
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
    loop.scheduler.step = own = lambda *args, **keywords: DDIMScheduler.step(
        loop.scheduler, *args, **keywords
    )
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
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide:
        with pytest.raises(InputError, match=r"scheduler.set_timesteps\(n\), this loop has others"):
            loop.step(guide)
    loop = Loop()
    loop.t = 601
    with GuidedStep(fitted, LABELS, loop.scheduler) as guide:
        with pytest.raises(InputError, match="timestep 601, which is none of scheduler.timesteps"):
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
    """Of diffusers' pipelines with callback_on_step_end the one that needs no text encoder: random weights."""
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


# --- philox_normal ---------------------------------------------------------------------------------------


def test_noise_is_the_ops() -> None:
    labels, places = torch.tensor(LABELS), torch.tensor([5, 0, 2**32 - 1])
    key = torch.tensor([2**62 + 12345]), torch.tensor([7])
    want = reference.philox_normal(labels, places, *key, shape=(4, 3, 5))
    for given in ((labels, places), (LABELS, places.tolist()), (labels.int(), places)):
        assert torch.equal(philox_normal(*given, 7, seed=2**62 + 12345, shape=(4, 3, 5)), want)
    assert not torch.equal(philox_normal(labels, places, 8, seed=2**62 + 12345, shape=(4, 3, 5)), want)


def test_noise_of_an_image_hangs_on_no_batch() -> None:
    alone = philox_normal(7, 5, 0, shape=[4, 8, 8])
    assert alone.shape == (1, 4, 8, 8) and alone.dtype == torch.float32
    assert torch.equal(philox_normal(7, range(9), 0, shape=[4, 8, 8])[5:6], alone)
    assert torch.equal(philox_normal([0, 7], 5, 0, shape=[4, 8, 8])[1:], alone)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"class_labels": -1}, ["class_labels holds -1", "0 to 4294967295"]),
        ({"class_labels": 2**32}, ["class_labels holds 4294967296"]),
        ({"class_labels": 2**70}, ["class_labels cannot be read"]),
        ({"indices": [0, 2**32]}, ["indices holds 4294967296"]),
        ({"indices": 0.5}, ["indices holds float32"]),
        ({"indices": [True]}, ["indices holds bool"]),
        ({"indices": [[1], [2]]}, ["indices has the shape (2, 1)"]),
        ({"indices": "x"}, ["indices cannot be read"]),
        ({"class_labels": [1, 2], "indices": [1, 2, 3]}, ["2 class_labels and 3 indices"]),
        ({"step": -1}, ["step is -1", "0 to 4294967295"]),
        ({"step": 1.0}, ["step is 1.0"]),
        ({"seed": 2**63}, ["seed is 9223372036854775808"]),
        ({"shape": (4, 0)}, ["shape is 0", "at least 1"]),
    ],
)
def test_noise_out_of_its_ranges(change, parts) -> None:
    given = {"class_labels": 1, "indices": 2, "step": 3, "seed": 4, "shape": (4, 8, 8), **change}
    with pytest.raises(InputError) as error:
        philox_normal(**given)
    one_sentence(error, *parts)
