"""The plan of a run: its counts by hand, its times from the parts' times, and what it warns of."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acs_fast import estimate
from acs_fast.config import DistillConfig, resolve
from acs_fast.estimate import Plan, Seconds, flop, make_plan, needs, timing
from acs_fast.generator import ImageGenerator
from acs_fast.images import Images
from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import DiT, DiTConfig, official_config
from acs_fast.networks import Networks
from acs_fast.plan import Layout, curriculum_ranges

CPU = torch.device("cpu")
NEEDS_VAE = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers makes the VAE"
)


def layout_of(config: DistillConfig, num_classes: int) -> Layout:
    """The order of a run's images."""
    return Layout(num_classes, tuple(curriculum_ranges(config.ipc, config.num_curricula)))


def everything(layout: Layout) -> dict[int, int]:
    """All images, by curriculum."""
    return {i: layout.size(i) for i in range(1, len(layout.ranges) + 1)}


def shaped(config: DistillConfig, shape: DiTConfig, dtype: torch.dtype, vae: Any = None) -> ImageGenerator:
    """A generator whose denoiser has a shape and no weights."""
    model: Any = types.SimpleNamespace(config=shape, pos_embed=torch.zeros(1, dtype=dtype))
    seen_by = vae if config.guidance_space != "latent" else None
    return ImageGenerator(config, CPU, Networks(model, vae, seen_by))


def plan_of(generator: ImageGenerator, layout: Layout, out: Path, **changes: Any) -> Plan:
    """The plan of a whole run on one rank, untimed."""
    config = generator.config
    settings: dict[str, Any] = {
        "bucket": 20,
        "num_ranks": 1,
        "missing": everything(layout),
        "trained": config.num_curricula - 1,
        "timed": False,
    }
    return make_plan(config, generator, layout, out=out, **{**settings, **changes})


@pytest.fixture(scope="module")
def woof() -> ImageGenerator:
    """Of the preset `imagewoof` in bf16, without a VAE."""
    config = resolve(DistillConfig, {"preset": "imagewoof", "batch_size": 20, "dtype": "bf16"})
    return shaped(config, official_config("DiT-XL/2"), torch.bfloat16)


@pytest.fixture(scope="module")
def digits() -> ImageGenerator:
    """Of `acs-fast distill`."""
    return ImageGenerator(DistillConfig(), CPU)


# --- work --------------------------------------------------------------------------------------------------


def test_the_work_of_dit_xl_by_hand(woof, tmp_path: Path) -> None:
    layout = layout_of(woof.config, 10)
    work = plan_of(woof, layout, tmp_path).work
    assert (work.images, work.guided_images) == (100, 80)
    assert (work.steps, work.guided_steps) == (50, 36)  # respaced steps 10 to 45
    assert (work.calls, work.rank_batches, work.rank_guided_batches) == (250, 5, 4)
    block = 2 * 256 * (3 + 1 + 4 + 4) * 1152**2 + 4 * 256**2 * 1152  # linears, attention
    branch = 28 * block + 2 * 256 * 1152 * 32  # the last projection
    image_step = 2 * branch + 2 * 256 * 16 * 1152  # patches, embedded once
    assert image_step == 473_567_330_304
    assert work.denoiser_flop == 100 * 50 * image_step
    convnet = 2 * 9 * 128 * (4 * 1024 + 128 * 256 + 128 * 64) + 2 * 2048 * 10
    assert work.guidance_flop == 80 * 36 * 2 * convnet  # forward, and as much back to the input
    # the discriminators of curricula 2 to 5 are trained on 20, 40, 60 and batches of 64 of 80
    assert (work.training_steps, work.training_images) == (4 * 500, 500 * (20 + 40 + 60 + 64))
    first = 2 * 9 * 128 * 4 * 1024  # has no gradient to its input
    assert work.training_flop == work.training_images * (3 * convnet - first)
    assert work.decode_flop == 0  # there is no VAE here
    assert work.flop == work.denoiser_flop + work.guidance_flop + work.training_flop


def test_the_work_of_the_digits_by_hand(digits, tmp_path: Path) -> None:
    work = plan_of(digits, layout_of(digits.config, 10), tmp_path).work
    branch = 5 * (2 * 16 * 12 * 128**2 + 4 * 16**2 * 128) + 2 * 16 * 128 * 8
    assert work.denoiser_flop == 100 * 50 * (2 * branch + 2 * 16 * 4 * 128)
    assert (work.calls, work.guided_steps, work.rank_images) == (250, 30, 100)
    convnet = 2 * 9 * 128 * (64 + 128 * 16 + 128 * 4) + 2 * 128 * 10
    assert work.guidance_flop == 80 * 30 * 2 * convnet


def test_ranks_share_every_curriculum_equally(digits, tmp_path: Path) -> None:
    config = dataclasses.replace(digits.config, ipc=5, num_curricula=2)
    generator = ImageGenerator(config, CPU, digits.networks)
    layout = layout_of(config, 3)  # curricula of 6 and 9 images
    work = plan_of(generator, layout, tmp_path, bucket=2, num_ranks=2).work
    assert needs.shares(9, 2) == [5, 4] and needs.shares(2, 4) == [1, 1, 0, 0]
    assert work.calls == 50 * (2 + 2 + 3 + 2)  # of 3, 3 and 5, 4 images
    assert (work.rank_images, work.rank_batches, work.rank_guided_batches) == (8, 5, 3)
    assert work.images == 15 and work.guided_images == 9


def test_what_is_done_is_not_counted_again(digits, tmp_path: Path) -> None:
    layout = layout_of(digits.config, 10)
    work = plan_of(digits, layout, tmp_path, missing={1: 0, 2: 0, 3: 0, 4: 3, 5: 20}, trained=1).work
    assert (work.images, work.guided_images, work.calls) == (23, 23, 100)
    assert (work.training_steps, work.training_images) == (100, 100 * 64)  # the last discriminator's


def test_the_first_curriculum_and_plain_sampling_are_not_guided(digits, tmp_path: Path) -> None:
    for change in ({"guidance_scale": 0.0}, {"num_curricula": 1}):
        generator = ImageGenerator(dataclasses.replace(digits.config, **change), CPU, digits.networks)
        plan = plan_of(generator, layout_of(generator.config, 10), tmp_path, trained=0)
        assert plan.work.guided_images == plan.work.guidance_flop == plan.work.training_flop == 0
        assert plan.memory.latents == plan.memory.discriminator == plan.memory.guidance == 0
        assert plan.disk.latents == plan.disk.discriminators == 0
        assert "guidance: none" in plan.text()


def test_real_images_are_trained_on_too(digits) -> None:
    layout = layout_of(digits.config, 10)
    learnability = dataclasses.replace(digits.config, objective="learnability")
    assert needs.training(learnability, layout, 1, True) == (100 + 2000, 100 * 64 + 2000 * 64)
    density = dataclasses.replace(digits.config, objective="density_ratio")
    # half a batch, or the 20 samples there are at first, and 32 real ones
    assert needs.training(density, layout, 4, False) == (400, 100 * (20 + 32 + 32 + 32 + 4 * 32))


# --- FLOP and parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        official_config("DiT-S/4"),
        DiTConfig(8, 2, 1, hidden_size=32, depth=3, num_heads=2, num_classes=5, learn_sigma=False),
    ],
)
def test_parameters_are_those_of_the_module(shape: DiTConfig) -> None:
    with torch.device("meta"):
        assert flop.denoiser_parameters(shape) == sum(p.numel() for p in DiT(shape).parameters())


def test_parameters_of_dit_xl() -> None:
    assert flop.denoiser_parameters(official_config("DiT-XL/2")) == 675_129_632


@pytest.mark.parametrize(
    ("network", "channels", "size", "forward"),
    [("convnet-3", 4, 32, 0.10), ("resnet-18", 4, 32, 1.11), ("resnet-18", 3, 256, 4.74)],
)
def test_classifiers_cost_what_is_known_of_them(network, channels, size, forward) -> None:
    cost = flop.classifier_cost(network, channels, 10, size)
    assert cost.forward / 1e9 == pytest.approx(forward, abs=0.005)
    assert cost.to_input == 2 * cost.forward < cost.training < 3 * cost.forward
    parameters = build_classifier(network, channels, 10, size).parameters()
    assert cost.parameters == sum(p.numel() for p in parameters)


def test_what_a_backward_pass_keeps_by_hand() -> None:
    floats = 4 * 1024  # the input
    for size in (1024, 256, 64):
        floats += 2 * 128 * size + 128 * size // 4 + 2 * 128  # convolution, ReLU, pool; mean and deviation
    kept = flop.classifier_cost("convnet-3", 4, 10, 32).saved
    assert kept == 4 * floats
    assert flop.classifier_cost("convnet-3", 4, 1000, 32).saved == kept  # no parameter is in it


def test_the_full_jacobian_costs_what_is_known_of_it() -> None:
    assert flop.full_jacobian_flops(official_config("DiT-XL/2")) / 1e9 == pytest.approx(965, abs=0.5)


@NEEDS_VAE
@pytest.mark.parametrize(("tiny", "forward", "both"), [(False, 622, 1247), (True, 35, 71)])
def test_decoders_cost_what_is_known_of_them(tiny: bool, forward: float, both: float) -> None:
    from acs_fast.bench.subject import random_vae

    vae = random_vae(tiny, shaped(DistillConfig(), official_config("DiT-XL/2"), torch.float32).model)
    assert vae is not None
    assert flop.decoder_flops(vae, 32) / 1e9 == pytest.approx(forward, abs=0.5)
    assert flop.decoder_flops(vae, 32, gradient=True) / 1e9 == pytest.approx(both, abs=0.5)
    assert next(vae.module.parameters()).device == CPU  # it is as it was


# --- memory and disk ---------------------------------------------------------------------------------------


def test_the_memory_of_dit_xl_by_hand(woof, tmp_path: Path) -> None:
    memory = plan_of(woof, layout_of(woof.config, 10), tmp_path).memory
    assert memory.weights == 2 * 675_129_632
    assert memory.engine == 20 * 512 * 14 * 1152 * 2
    assert memory.table == 11 * 50 * (6 * 28 + 2) * 1152 * 2  # ten classes and null
    assert memory.latents == 80 * 4 * 32 * 32 * 4  # of the first four curricula
    cost = flop.classifier_cost("convnet-3", 4, 10, 32)
    assert memory.discriminator == 5 * 4 * cost.parameters + 1.5 * 64 * cost.saved
    assert memory.guidance == 1.5 * 20 * cost.saved
    assert memory.decode == memory.host == 0
    parts = dataclasses.asdict(memory)
    assert memory.device == sum(parts.values())


def test_the_memory_of_many_classes_is_bounded_by_the_table(woof, tmp_path: Path) -> None:
    layout = layout_of(woof.config, 1000)
    memory = plan_of(woof, layout, tmp_path).memory
    row = 50 * (6 * 28 + 2) * 1152 * 2
    assert memory.table == ((1 << 30) // row + 1) * row  # as many as fit, and null
    assert memory.latents == 1000 * 8 * 16384


def test_repulsion_and_the_full_jacobian_need_more(woof, tmp_path: Path) -> None:
    plain = plan_of(woof, layout_of(woof.config, 10), tmp_path).memory
    config = dataclasses.replace(woof.config, repulsion=0.1, jacobian="full")
    generator = ImageGenerator(config, CPU, woof.networks)
    plan = plan_of(generator, layout_of(config, 10), tmp_path)
    assert plan.memory.latents == 2 * plain.latents
    assert plan.memory.engine == 20 * 512 * (14 + 19 * 28) * 1152 * 2
    more = flop.full_jacobian_flops(woof.shape) - flop.denoiser_flops(woof.shape)
    identity = plan_of(woof, layout_of(woof.config, 10), tmp_path).work.guidance_flop
    assert plan.work.guidance_flop == identity + 80 * 36 * more


@NEEDS_VAE
def test_pixel_spaces_decode_in_every_guided_step(tmp_path: Path) -> None:
    from acs_fast.models.vae import VAE
    from tests.test_vae import small_kl

    vae = VAE(small_kl())  # 4 x 8 x 8 to 3 x 32 x 32
    shape = DiTConfig(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    plans = {}
    for space in ("latent", "pixel"):
        config = DistillConfig(guidance_space=space, ipc=10, batch_size=20, dtype="fp32")
        generator = shaped(config, shape, torch.float32, vae)
        plans[space] = plan_of(generator, layout_of(config, 5), tmp_path, bucket=10)
    latent, pixel = plans["latent"], plans["pixel"]
    decode = flop.decoder_flops(vae, 8)
    assert latent.work.decode_flop == pixel.work.decode_flop == 50 * decode
    cost = flop.classifier_cost("convnet-3", 3, 5, 32)
    gradient = flop.decoder_flops(vae, 8, gradient=True)
    assert gradient > 1.9 * decode
    assert pixel.work.guidance_flop == 40 * 30 * (cost.to_input + gradient)
    weights = 4 * flop.denoiser_parameters(shape) + sum(v.nbytes for v in vae.module.state_dict().values())
    assert latent.memory.weights == pixel.memory.weights == weights  # one VAE, not two
    assert latent.memory.decode == 10 * vae.bytes_per_image(8, 8) + 10 * 3 * 32 * 32 * 5
    assert latent.memory.latents == 40 * 256 * 4 and pixel.memory.latents == 40 * 3 * 32 * 32 * 4
    assert pixel.memory.guidance == 10 * 7 * vae.bytes_per_image(8, 8) + 1.5 * 10 * cost.saved
    image = needs.image_bytes(tmp_path, "png", 3 * 32 * 32)[0]
    assert latent.disk.images == 50 * image


def test_the_disk_by_hand(woof, tmp_path: Path) -> None:
    layout = layout_of(woof.config, 10)
    disk = plan_of(woof, layout, tmp_path).disk
    network = 4 * flop.classifier_cost("convnet-3", 4, 10, 32).parameters
    assert disk.latents == 80 * 16384 and disk.discriminators == 4 * network
    assert disk.missing == disk.images + disk.latents + disk.discriminators + disk.manifest == disk.most
    kept = ImageGenerator(dataclasses.replace(woof.config, keep_latents=True), CPU, woof.networks)
    assert plan_of(kept, layout, tmp_path).disk.latents == 100 * 16384
    left = plan_of(woof, layout, tmp_path, missing={4: 3, 5: 20}, trained=1).disk
    assert left.images == disk.images
    assert left.missing == 23 * (disk.image + 300) + 3 * 16384 + network


def test_images_are_taken_to_be_photographs(tmp_path: Path) -> None:
    values = 3 * 256 * 256
    for name, blocks in (("png", 25), ("jpeg", 8), ("webp", 17)):  # 1.53, 0.47 and 1.02 bytes a pixel
        assert needs.image_bytes(tmp_path, name, values) == (blocks * 4096, 0)
    assert needs.image_bytes(tmp_path, "wds", values) == (pytest.approx(80 + 0.51 * values + 1792), 0)


def test_images_are_as_large_as_those_that_are_there(tmp_path: Path, monkeypatch) -> None:
    for number, name in enumerate(("a/0.png", "a/1.png", "b/0.png.tmp", "b/1.jpg")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000 * (number + 1)))
    # 5,000 and 10,000 bytes are two and three blocks; what is being written does not count
    assert needs.image_bytes(tmp_path, "png", 1) == (2.5 * 4096, 2)
    assert needs.image_bytes(tmp_path, "jpeg", 1) == (5 * 4096, 1)
    monkeypatch.setattr(needs, "LOOKED_AT", 1)
    assert needs.image_bytes(tmp_path, "png", 1)[1] <= 1


def test_images_in_shards_are_as_large_as_those_of_one(tmp_path: Path) -> None:
    images = Images(tmp_path, "wds")
    keys = [("a", index) for index in range(3)]
    for key in keys:
        images.write(key, bytes(5000))
    assert needs.image_bytes(tmp_path, "wds", 1)[1] == 0  # loose ones are no shard
    images.pack(1, 0, keys)
    size, count = needs.image_bytes(tmp_path, "wds", 1)
    assert count == 3 and size == (tmp_path / "images" / "01-00000.tar").stat().st_size / 3
    assert size == pytest.approx(5000 + 1792, rel=0.3)  # and the end of the archive


# --- time --------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every part of a run with a time of its own; what was asked for."""
    asked: list[Any] = []

    def fixed(name: str, seconds: float) -> Any:
        def part(*args: Any) -> float:
            asked.append((name, *args[1:]))
            return seconds

        return part

    monkeypatch.setattr(ImageGenerator, "seconds_per_step", fixed("step", 2.0))
    monkeypatch.setattr(timing, "_seconds_of_guidance", fixed("guidance", 0.5))
    monkeypatch.setattr(timing, "_seconds_per_decode", fixed("decode", 3.0))
    monkeypatch.setattr(timing, "_seconds_per_training_step", fixed("training", 0.25))
    return asked


def test_the_expected_time_follows_from_its_parts(digits, tmp_path: Path, parts) -> None:
    layout = layout_of(digits.config, 10)
    plan = plan_of(digits, layout, tmp_path, timed=True)
    sampling = 5 * 50 * 2.0 + 4 * 30 * 0.5 + 5 * 3.0
    assert plan.seconds == Seconds(2.0, 0.5, 3.0, 0.25, sampling, 400 * 0.25)
    assert plan.seconds.total == sampling + 100
    assert plan.images_per_second == 100 / (sampling + 100)
    batch = 46  # the mean of 20, 40, 60 and 64
    assert parts == [("step", 20, 0), ("decode", 20), ("guidance", 10, 20, 2.0), ("training", 10, batch, 1)]
    two = plan_of(digits, layout, tmp_path, bucket=10, num_ranks=2, timed=True).seconds
    assert two.sampling == 5 * 50 * 2.0 + 4 * 30 * 0.5 + 5 * 3.0
    assert parts[-1] == ("training", 10, batch, 2)
    alone = ImageGenerator(dataclasses.replace(digits.config, deterministic=True), CPU, digits.networks)
    plan_of(alone, layout, tmp_path, num_ranks=2, timed=True)
    assert parts[-1] == ("training", 10, batch, 1)


def test_what_is_not_needed_is_not_timed(digits, tmp_path: Path, parts) -> None:
    layout = layout_of(digits.config, 10)
    nothing = plan_of(digits, layout, tmp_path, missing=dict.fromkeys(range(1, 6), 0), trained=0, timed=True)
    assert not parts and nothing.seconds.total == 0 and nothing.images_per_second == 0
    assert "0 left" in nothing.text() and "nothing is left" in nothing.text()
    plan_of(digits, layout, tmp_path, missing={1: 5}, trained=0, timed=True)
    assert [name for name, *_ in parts] == ["step", "decode"]


class Clock:
    """A clock that a call moves by a second for so many images; and the numbers that were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, images_per_second: float):
        self.now, self.rate, self.called = 0.0, images_per_second, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def make(self, n: int) -> Any:
        def call() -> None:
            self.called.append(n)
            self.now += n / self.rate

        return call


def test_a_long_call_is_made_for_few_images_and_seldom(monkeypatch) -> None:
    clock = Clock(monkeypatch, images_per_second=2.0)
    assert timing.timed(clock.make, 64, CPU) == 32.0
    assert clock.called == [4, 4]
    clock = Clock(monkeypatch, images_per_second=0.25)
    assert timing.timed(clock.make, 6, CPU, together=3) == 24.0
    assert clock.called == [1, 1]
    clock = Clock(monkeypatch, images_per_second=0.05)
    assert timing.timed(clock.make, 2, CPU) == 40.0
    assert clock.called == [1]


def test_a_first_call_on_a_busy_machine_is_not_believed(monkeypatch) -> None:
    clock, late = Clock(monkeypatch, images_per_second=640.0), iter([8.0])

    def make(n: int) -> Any:
        call = clock.make(n)

        def slow_at_first() -> None:
            call()
            clock.now += next(late, 0.0)

        return slow_at_first

    assert timing.timed(make, 64, CPU) == pytest.approx(0.1)


def test_a_short_call_is_repeated_without_the_first(monkeypatch) -> None:
    clock = Clock(monkeypatch, images_per_second=640.0)
    assert timing.timed(clock.make, 64, CPU) == pytest.approx(0.1)
    assert clock.called.count(64) == 3 and set(clock.called) == {4, 64}
    clock = Clock(monkeypatch, images_per_second=1e9)
    timing.timed(clock.make, 64, CPU)
    assert clock.called.count(64) == timing.CALLS


def test_a_step_is_timed_after_the_one_that_fills_the_table(digits, monkeypatch) -> None:
    import acs_fast.generator as room

    now = [0.0]

    def walk(*_: Any) -> Any:
        for seconds in (5.0, *[0.05] * 49):
            now[0] += seconds
            yield torch.zeros(1)

    monkeypatch.setattr(room.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(digits, "walk", walk)
    assert digits.seconds_per_step(2, 0) == pytest.approx(0.05)
    assert now[0] == pytest.approx(5.0 + 5 * 0.05, abs=0.051)


@pytest.mark.parametrize("changes", [{}, {"jacobian": "full"}, {"objective": "learnability"}])
def test_timing_the_digits_is_quick_and_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = DistillConfig(num_sampling_steps=5, **changes)
    generator = ImageGenerator(config, CPU)
    generator.prepare(4, [3, 8])
    state, labels = torch.get_rng_state(), torch.tensor([3, 8])
    zeros = torch.zeros(2, dtype=torch.long)

    def sample() -> torch.Tensor:
        *_, x = generator.denoise(labels, zeros, zeros, None)
        return x.clone()

    before = sample()
    layout = layout_of(generator.config, 2)
    started = timing.time.perf_counter()
    plan = make_plan(
        generator.config, generator, layout, bucket=4, num_ranks=1, missing=everything(layout), trained=4,
        trains_real="objective" in changes, out=tmp_path / "run",
    )  # fmt: skip
    assert timing.time.perf_counter() - started < 20  # a second or two where nothing else runs
    seconds = plan.seconds
    assert min(seconds.step, seconds.guidance, seconds.training_step) > 0 and seconds.decode == 0
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(sample(), before)
    assert generator.engine is not None and generator.engine.loaded is None
    assert not (tmp_path / "run").exists()


@NEEDS_VAE
@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_a_latent_models_parts_are_timed(tmp_path: Path, space: str) -> None:
    from acs_fast.models.vae import VAE
    from tests.test_sampler import randomise
    from tests.test_vae import small_kl

    shape = DiTConfig(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=5)
    config = DistillConfig(guidance_space=space, num_sampling_steps=4, ipc=5)
    vae = VAE(small_kl())
    model = randomise(DiT(shape), 0.1, seed=0).requires_grad_(False)
    generator = ImageGenerator(config, CPU, Networks(model, vae, vae if space == "pixel" else None))
    generator.prepare(3, range(5))
    plan = plan_of(generator, layout_of(config, 5), tmp_path, bucket=3, timed=True)
    assert min(plan.seconds.step, plan.seconds.guidance, plan.seconds.decode) > 0


# --- what is said ------------------------------------------------------------------------------------------


def test_the_plan_is_short_and_names_what_it_assumes(digits, tmp_path: Path, parts) -> None:
    plan = plan_of(digits, layout_of(digits.config, 10), tmp_path, timed=True)
    lines = plan.text().splitlines()
    assert lines[0] == "plan: 100 images (10 classes x 10) in 5 curricula, 100 left to sample"
    assert lines[1].startswith(
        "      ddpm with 50 steps, CFG 2, guidance: adversarial, 0.15 x sigma, jacobian"
    )
    assert "250 denoiser calls" in lines[2] and "1 rank: about 11.2 min, 0.148 images/s" in lines[2]
    text = " ".join(plan.text().split())
    assert "2 s a step, 500 ms more where guided (30 of 50 steps), 3 s to decode a batch" in text
    assert "discriminators 100 s: 400 steps of 250 ms" in text
    assert "assumed: 4.1 kB an image (png, as photographs have); " in text
    assert len(lines) <= 12 and max(map(len, lines)) <= 120
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["work"]["calls"] == 250
    many = plan_of(digits, layout_of(digits.config, 10), tmp_path, num_ranks=8).text()
    assert "every rank is as fast as this one" in " ".join(many.split()) and "8 ranks" in many


def test_a_run_that_fits_has_no_warning(digits, tmp_path: Path) -> None:
    plan = plan_of(digits, layout_of(digits.config, 10), tmp_path / "not" / "yet")
    assert plan.warnings() == [] and plan.disk_free > 0
    assert plan.memory_reachable is None or plan.memory_reachable > 1 << 28
    unknown = dataclasses.replace(plan, memory_reachable=None)
    assert unknown.warnings() == [] and " of None" not in unknown.text()


def test_warnings_say_what_does_not_fit_and_what_to_do(woof, tmp_path: Path) -> None:
    plan = plan_of(woof, layout_of(woof.config, 10), tmp_path)
    assert dataclasses.replace(plan, memory_reachable=plan.memory.device).warnings() == []
    (memory,) = dataclasses.replace(plan, memory_reachable=plan.memory.device - 1).warnings()
    assert "this machine's memory" in memory and "--batch-size, which is 20" in memory
    two = dataclasses.replace(plan, num_ranks=2, memory_reachable=2 * plan.memory.device - 1)
    assert len(two.warnings()) == 1  # both are on this machine
    gpu = dataclasses.replace(two, device="cuda (a card)", memory_reachable=plan.memory.device)
    assert gpu.warnings() == []
    (disk,) = dataclasses.replace(plan, disk_free=plan.disk.missing - 1).warnings()
    assert str(tmp_path) in disk and "--format" in disk
    assert dataclasses.replace(plan, disk_free=plan.disk.missing).warnings() == []


def test_many_samples_to_train_on_are_named(woof, tmp_path: Path) -> None:
    config = dataclasses.replace(woof.config, ipc=1300)
    generator = ImageGenerator(config, CPU, woof.networks)
    plan = plan_of(generator, layout_of(config, 1000), tmp_path)
    assert plan.memory.latents == 1_040_000 * 16384
    (warning,) = dataclasses.replace(plan, memory_reachable=10 << 30, disk_free=1 << 50).warnings()
    assert "17 GB are samples to train on: use a smaller --ipc" in warning
    assert "1300000 images (1000 classes x 1300)" in plan.text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.0123, "12.3 ms"),
        (59.0, "59 s"),
        (600.0, "10 min"),
        (36000.0, "10 h"),
        (1e6, "11.6 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.5e12, "1.5 TB")]
)
def test_sizes(value: float, text: str) -> None:
    assert estimate.size(value) == text


def test_bytes_kept_count_a_tensor_once() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.ReLU())
    x = torch.ones(1, 2, 2, requires_grad=True)
    assert flop.saved_bytes(network, x) == 2 * 4 * 4  # two results; the view between them is the first's
