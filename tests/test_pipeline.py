"""`ACSPipeline` is a drop-in for diffusers' `DiTPipeline`: the same call, the same images; ACS beside it."""

from __future__ import annotations

import copy
import inspect
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor

import acs_fast
from acs_fast import ACSPipeline, Discriminator, InputError, accelerate
from acs_fast.testing import excess

LABELS = {1: "white shark, shark", 2: "umbrella", 7: "cock"}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(),
    "ddim-no-clip": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "dpm": lambda: DPMSolverMultistepScheduler(),
    "dpm-karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=2),
}
STEPS = 4


def small_transformer(seed: int = 0) -> DiTTransformer2DModel:
    """diffusers' own tests have these settings; a real checkpoint repeats one embedder in every block."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def make_pipe(scheduler: Any = None, dtype: torch.dtype = torch.float32) -> DiTPipeline:
    torch.manual_seed(1)
    vae = AutoencoderKL().eval()
    pipe = DiTPipeline(small_transformer(), vae, scheduler or DDIMScheduler(), id2label=LABELS).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, labels: Any = (1, 7), seed: int = 0, **options: Any) -> Any:
    options = {"num_inference_steps": STEPS, "output_type": "np", **options}
    return pipe(list(labels), generator=torch.Generator().manual_seed(seed), **options).images


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return make_pipe()


@pytest.fixture(scope="module")
def fast(pipe: DiTPipeline) -> ACSPipeline:
    return accelerate(pipe)


# what diffusers asks of a DiTPipeline


def test_the_call_is_diffusers(pipe, fast) -> None:
    theirs = inspect.signature(DiTPipeline.__call__).parameters
    ours = inspect.signature(ACSPipeline.__call__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    rest = [p for name, p in ours.items() if name not in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not p.empty for p in rest)
    assert isinstance(fast, DiTPipeline) and isinstance(call_whole(fast), type(call_whole(pipe)))


def call_whole(pipe: Any, **options: Any) -> Any:
    return pipe([1], generator=torch.manual_seed(0), num_inference_steps=2, **options)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_outputs_have_diffusers_types_and_shapes(pipe, fast, output_type) -> None:
    ours, theirs = (call_whole(p, output_type=output_type).images for p in (fast, pipe))
    if output_type == "pt" and isinstance(theirs, np.ndarray):  # of older releases, for `pt` too
        theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    assert type(ours) is type(theirs) and type(ours[0]) is type(theirs[0])
    assert np.shape(ours) == np.shape(theirs)
    if output_type == "pil":
        assert ours[0].size == theirs[0].size == (16, 16) and ours[0].mode == theirs[0].mode


def test_a_tuple_holds_the_same(fast) -> None:
    whole, (images,) = (
        call_whole(fast, output_type="np"),
        call_whole(fast, output_type="np", return_dict=False),
    )
    assert np.array_equal(whole.images, images)


@pytest.mark.parametrize("scale", [4.0, 1.5, 1.0, 0.5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_are_diffusers_within_a_grey_level(name, scale) -> None:
    theirs = make_pipe(SCHEDULERS[name]())
    ours = accelerate(theirs)
    a, b = (call(p, guidance_scale=scale, output_type="pil") for p in (ours, theirs))
    assert max(int(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in zip(a, b, strict=True)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_diffusers_by_the_error_rule(name, dtype) -> None:
    """No further from float64 than diffusers is."""

    def by_diffusers(pipe: DiTPipeline) -> Tensor:
        """What the pipeline hands to its VAE, times the factor."""
        seen: list[Tensor] = []
        decode = pipe.vae.decode
        pipe.vae.decode = lambda z: (seen.append(z), decode(z))[1]
        call(pipe, output_type="pt")
        return seen[0].double() * pipe.vae.config.scaling_factor

    theirs = make_pipe(SCHEDULERS[name](), dtype)
    ours = call(accelerate(theirs), output_type="latent")
    exact_pipe = copy.deepcopy(theirs).to(torch.float64)
    exact_pipe.scheduler = SCHEDULERS[name]()
    drawn = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0), dtype=dtype)
    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, lambda *args, **keywords: drawn.double())
        exact = by_diffusers(exact_pipe)
    assert max(excess([ours], [by_diffusers(theirs).float()], [exact])) <= 1.0


def test_ddpm_starts_from_diffusers_latents_and_its_noise_is_each_images_own() -> None:
    theirs = make_pipe(DDPMScheduler(clip_sample=False))
    ours = accelerate(theirs)
    both, alone = call(ours, (1, 7), output_type="latent"), []
    for number, label in enumerate((1, 7)):
        generators = [torch.Generator().manual_seed(10 + i) for i in (0, 1)]
        pair = ours([1, 7], generator=generators, num_inference_steps=STEPS, output_type="latent").images
        one = torch.Generator().manual_seed(10 + number)
        single = ours([label], generator=[one], num_inference_steps=STEPS, output_type="latent").images
        assert torch.allclose(pair[number], single[0], atol=1e-5)
        alone.append(single)
    assert torch.equal(both, call(ours, (1, 7), output_type="latent"))
    assert not torch.equal(both, call(ours, (1, 7), seed=1, output_type="latent"))


def test_ddpm_is_diffusers_where_it_draws_the_same_noise(monkeypatch) -> None:
    theirs = make_pipe(DDPMScheduler(clip_sample=False))
    ours = accelerate(theirs)
    monkeypatch.setattr(ours_noise(), "philox_normal", _constant_noise)
    name = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(name, lambda shape, **keywords: torch.full(shape, 0.5))
    assert np.abs(call(ours) - call(theirs)).max() < 1 / 255


def ours_noise() -> Any:
    """The module whose noise the reference step takes."""
    from acs_fast.kernels.reference import step

    return step


def _constant_noise(*args: Any, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    assert out is not None
    return out.fill_(0.5)


def test_an_image_is_the_same_alone_and_in_a_batch(fast) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = fast([1, 2, 7], generator=generators, num_inference_steps=STEPS, output_type="np").images
    for number, label in enumerate((1, 2, 7)):
        generator = torch.Generator().manual_seed(number)
        alone = fast([label], generator=generator, num_inference_steps=STEPS, output_type="np").images
        assert np.abs(together[number] - alone[0]).max() < 1e-4


def test_save_and_load_round_trip(fast, tmp_path: Path) -> None:
    expected = call(fast)
    fast.save_pretrained(tmp_path)
    for kind in (ACSPipeline, DiTPipeline, acs_fast.pipeline.DiTPipeline):
        loaded = kind.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is kind and np.abs(call(loaded) - expected).max() < 1e-4
        assert loaded.get_label_ids(["shark", "cock"]) == [1, 7]


def test_it_is_made_of_the_same_components_of_the_same_types() -> None:
    ours, theirs = (inspect.signature(kind.__init__) for kind in (ACSPipeline, DiTPipeline))
    assert ours == theirs and DiTTransformer2DModel in [p.annotation for p in ours.parameters.values()]


def test_the_pipeline_given_stays_as_it_is() -> None:
    pipe = make_pipe(DPMSolverMultistepScheduler())
    before = copy.deepcopy(pipe.transformer.state_dict()), copy.deepcopy(pipe.vae.state_dict())
    pipe.vae.train()
    timesteps, expected = pipe.scheduler.timesteps, call(make_pipe(DPMSolverMultistepScheduler()))
    fast = accelerate(pipe)
    call(fast, curricula=1)
    fast([1, 1, 7, 7], num_inference_steps=2, curricula=2)
    for module, state in zip((pipe.transformer, pipe.vae), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(p.requires_grad for p in module.parameters())
    assert pipe.vae.training and pipe.scheduler.timesteps is timesteps
    assert type(pipe) is DiTPipeline and np.array_equal(call(pipe), expected)
    assert fast.scheduler is not pipe.scheduler


def test_changed_weights_are_seen(fast) -> None:
    pipe = make_pipe()
    ours = accelerate(pipe)
    before = call(ours)
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.mul_(1.5)
    assert not np.allclose(before, call(ours)) and np.abs(call(ours) - call(pipe)).max() < 1e-4


def test_the_engine_is_kept_between_calls(monkeypatch) -> None:
    ours = accelerate(make_pipe())
    call(ours, (1, 7))
    backend = ours._backend
    call(ours, (2, 9), seed=3)
    assert ours._backend is backend
    call(ours, (2, 9), guidance_scale=2.0)
    assert ours._backend is not backend


# ACS


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_curricula_steer_the_later_images_alone(pipe, backend) -> None:
    ours = accelerate(pipe, backend=backend)
    labels, options = [1, 1, 1, 7, 7, 7], {"num_inference_steps": 10, "output_type": "latent"}
    plain, steered = (
        call(ours, labels, curricula=n, adversarial_scale=scale, **options)
        for n, scale in ((1, 0.15), (3, 0.5))
    )
    moved = (steered - plain).flatten(1).norm(dim=1)
    assert torch.equal(moved > 1e-3, torch.tensor([False, True, True] * 2))
    assert torch.allclose(call(ours, labels, curricula=3, adversarial_scale=0.0, **options), plain, atol=1e-5)


def test_both_backends_agree(pipe) -> None:
    options = {"num_inference_steps": 10, "output_type": "latent"}
    plain = call(accelerate(pipe), [1, 7, 7], **options)
    discriminator = Discriminator("convnet-2", class_labels=[1, 7], size=16, steps=5).fit(plain, [1, 7, 7])
    options |= {"discriminator": discriminator, "adversarial_scale": 0.3}
    a, b = (call(accelerate(pipe, backend=name), [1, 7, 7], **options) for name in ("fast", "reference"))
    assert (a - b).norm() < 1e-4 * b.norm() and (plain - b).norm() > 1e-2 * b.norm()


def test_a_fitted_discriminator_steers_every_image(pipe, fast) -> None:
    labels, options = [1, 7, 7], {"num_inference_steps": 10, "output_type": "latent"}
    plain = call(fast, labels, **options)
    discriminator = Discriminator("convnet-2", class_labels=[7, 1], size=16, steps=5).fit(plain, labels)
    steered = call(fast, labels, discriminator=discriminator, adversarial_scale=0.3, **options)
    targets = discriminator.targets(labels)
    before, after = (
        torch.nn.functional.cross_entropy(discriminator.network(x), targets, reduction="none")
        for x in (plain, steered)
    )
    assert (after > before).all()  # what ACS ascends


def test_the_callback_sees_every_step_and_may_replace_the_latents(fast) -> None:
    seen: list[tuple[int, int]] = []

    def callback(pipe: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        assert pipe is fast and values["latents"].shape == (2, 4, 16, 16)
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(values["latents"])} if step == 1 else values

    changed = call(fast, callback_on_step_end=callback)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    assert seen == list(enumerate(scheduler.timesteps.tolist()))
    assert not np.allclose(changed, call(fast))
    kept: list[Tensor] = []
    call(fast, callback_on_step_end=lambda p, i, t, values: kept.append(values["latents"]))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(kept))
    assert np.array_equal(call(fast, callback_on_step_end=lambda p, i, t, values: values), call(fast))


# wrong use


def test_another_pipeline_is_refused() -> None:
    other = DDPMPipeline(UNet2DModel(block_out_channels=(32, 64), norm_num_groups=8, sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")),
        DDPMScheduler())  # fmt: skip
    with pytest.raises(InputError, match="takes a diffusers DiTPipeline, this is a DDPMPipeline"):
        accelerate(other)


def test_a_scheduler_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(InputError, match="is a EulerDiscreteScheduler; accepted are DDIMScheduler"):
        accelerate(make_pipe(EulerDiscreteScheduler()))


def test_embedders_that_differ_are_refused() -> None:
    pipe = make_pipe()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(InputError, match=r"differs from .* one embedder for all blocks"):
        accelerate(pipe)


def wrong_discriminator() -> Discriminator:
    samples = torch.randn(4, 4, 32, 32)
    return Discriminator("convnet-1", class_labels=[1, 7], size=32, steps=1).fit(samples, [1, 1, 7, 7])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1000], {}, r"class label 1000: this model's are 0 to 999; get_label_ids has"),
        ([-1], {}, "class label -1"),
        ([], {}, "class_labels is empty"),
        (["shark"], {}, r"class_labels is \['shark'\], a list of numbers is needed"),
        (
            [1, 1],
            {"curricula": 2, "adversarial_scale": -1.0},
            "adversarial_scale is -1.0, it must be a finite",
        ),
        ([1], {"output_type": "jpeg"}, "output_type is 'jpeg', it must be one of pil, np, pt, latent"),
        ([1], {"objective": "learnability"}, "adversarial or nonsaturating; those that need real images"),
        ([1, 1, 7], {"curricula": 2}, "curricula is 2, and class 7 has 1 images"),
        ([1], {"curricula": 0}, "curricula is 0"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps is 0"),
        ([1], {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "holds 'prompt_embeds'"),
        ([1, 1, 7, 7], {"curricula": 2, "discriminator": "convnet-9"}, "convnet-9 needs images of 512 px"),
        ([1, 1], {"curricula": 2}, "all images are of class 1, and a discriminator tells classes apart"),
        ([1], {"discriminator": "convnet-2"}, "trained between curricula, and there is one"),
        ([1, 7], {"discriminator": torch.nn.Flatten()}, "discriminator is a Flatten; give a network's name"),
        ([1], {"curricula": 2.0}, "curricula is 2.0, it must be a whole number"),
        ([1], {"guidance_scale": float("inf")}, "guidance_scale is inf, it must be a finite number"),
        ([1], {"num_inference_steps": 4.0}, "num_inference_steps is 4.0, it must be 1 to 1000"),
        (
            [1],
            {"callback_on_step_end": lambda *a: {"latents": torch.zeros(1)}},
            r"latents of the shape \(1,\)",
        ),
    ],
)
def test_wrong_use_is_one_sentence(fast, labels, options, message) -> None:
    with pytest.raises(InputError, match=message):
        call(fast, labels, **options)


def test_one_generator_or_one_each(fast) -> None:
    with pytest.raises(InputError, match="there are 2 generators for 3 images; give one, or one each"):
        fast([1, 2, 7], generator=[torch.Generator(), torch.Generator()], num_inference_steps=2)
    one = [torch.Generator().manual_seed(0)]
    images = fast([1, 7], generator=one, num_inference_steps=STEPS, output_type=None).images
    assert np.array_equal(images, call(fast, (1, 7)))


def test_labels_may_be_tensors_and_arrays(fast) -> None:
    expected = call(fast, (1, 7))
    for labels in (torch.tensor([1, 7]), np.array([1, 7])):
        generator = torch.Generator().manual_seed(0)
        images = fast(labels, generator=generator, num_inference_steps=STEPS, output_type="np").images
        assert np.array_equal(images, expected)


def test_calls_one_after_another_are_diffusers_with_one_generator(pipe, fast) -> None:
    results = []
    for each in (pipe, fast):
        generator = torch.Generator().manual_seed(0)
        options = {"generator": generator, "num_inference_steps": STEPS, "output_type": "np"}
        results.append([each([label], **options).images for label in (1, 7)])
    assert np.abs(np.array(results[0]) - np.array(results[1])).max() < 1 / 255


def test_the_engine_is_given_up(pipe) -> None:
    ours = accelerate(pipe)
    for give_up in (ours.release, lambda: ours.to("cpu")):
        expected = call(ours)
        give_up()
        assert ours._backend is None and np.array_equal(call(ours), expected)


def test_a_copy_has_an_engine_of_its_own(fast) -> None:
    expected = call(fast)
    assert np.array_equal(call(copy.deepcopy(fast)), expected)


def test_inference_mode_around_calls(pipe) -> None:
    ours = accelerate(pipe)
    expected = call(ours, (1, 1, 7, 7), curricula=2)
    ours.release()
    with torch.inference_mode():
        assert np.allclose(call(ours, (1, 1, 7, 7), curricula=2), expected, atol=1e-4)
    assert np.allclose(call(ours, (1, 1, 7, 7), curricula=2), expected, atol=1e-4)


def test_no_random_state_is_moved_but_the_generators(fast, monkeypatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeded.append(seed))
    torch.manual_seed(5)
    seeded.clear()
    expected = torch.rand(1)
    torch.manual_seed(5)
    seeded.clear()
    call(fast, (1, 1, 7, 7), curricula=2)
    assert torch.equal(torch.rand(1), expected) and not seeded


def test_the_vae_and_the_scheduler_may_be_changed_after_a_call() -> None:
    ours = accelerate(make_pipe())
    call(ours)
    ours.vae.to(torch.bfloat16)
    assert np.isfinite(call(ours)).all()
    ours.scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler(clip_sample=True).config)
    theirs = make_pipe(DPMSolverMultistepScheduler())
    theirs.vae.to(torch.bfloat16)
    a, b = (call(p, output_type="latent") for p in (ours, accelerate(theirs)))
    assert torch.allclose(a, b)


def test_what_accelerate_cannot_serve_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="there is no backend 'quick'"):
        accelerate(make_pipe(), backend="quick")
    with pytest.raises(InputError, match="attention is 'quick', it must be auto, cudnn, flash"):
        accelerate(make_pipe(), attention="quick")
    pipe = make_pipe()
    pipe.vae = AutoencoderKL(latent_channels=8)
    with pytest.raises(InputError, match="the VAE has 8 latent channels, the model samples 4"):
        accelerate(pipe)
    with pytest.raises(InputError, match=r"the transformer is in torch.float64; it must be in bf16"):
        call(accelerate(make_pipe(dtype=torch.float64)))


def test_a_compiled_transformer_and_from_pipe(pipe, fast) -> None:
    compiled = copy.copy(pipe)
    compiled.transformer = torch.compile(pipe.transformer)
    assert np.abs(call(accelerate(compiled)) - call(fast)).max() < 1e-5
    made = ACSPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert np.abs(call(made) - call(fast)).max() < 1e-5


def test_discriminators_of_several_networks_one_after_another(fast) -> None:
    labels, options = [1, 7, 7], {"num_inference_steps": 10, "output_type": "latent"}
    samples, found = call(fast, labels, **options), []
    for network in ("convnet-1", "convnet-2", "resnet-18", "convnet-1"):
        f = Discriminator(network, class_labels=[1, 7], size=16, steps=2).fit(samples, labels)
        found.append(call(fast, labels, discriminator=f, adversarial_scale=0.3, **options))
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_a_discriminator_of_another_latent_shape_is_refused(fast) -> None:
    with pytest.raises(InputError, match="made for 4 channels of 32 px, these samples have 4 of 16"):
        call(fast, [1], discriminator=wrong_discriminator())
    with pytest.raises(InputError, match="give a network's name, or curricula=1"):
        call(fast, [1, 1], discriminator=wrong_discriminator(), curricula=2)
