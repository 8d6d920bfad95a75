"""The presets: what METHOD.md says of the field's defaults, exactly; and the class lists they name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from acs_fast.cli import given, make_parser
from acs_fast.config import PRESETS, DistillConfig, EvaluateConfig, resolve
from acs_fast.data import imagenet_classes, parse_classes, select_classes
from acs_fast.diffusion import NUM_TRAIN_TIMESTEPS, step_coefficients
from acs_fast.models.classifier import build_classifier
from acs_fast.plan import curriculum_ranges

LISTS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "lists"
IMAGENET = {"imagewoof": 10, "imagenette": 10, "imagenet100": 100, "imagenet1k": 1000}


def preset(*argv: str) -> DistillConfig:
    """The configuration of a command line."""
    args: argparse.Namespace = make_parser().parse_args(["distill", *argv])
    return resolve(DistillConfig, given(args, DistillConfig), args.config)


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_preset_is_the_fields_sampler_on_its_classes(name: str) -> None:
    config = preset("--preset", name)
    assert (config.model, config.out) == ("facebook/DiT-XL-2-256", f"runs/{name}")
    sampler = (config.sampler, config.num_sampling_steps, config.cfg_scale, config.num_curricula)
    assert sampler == ("ddpm", 50, 4.0, 5)
    assert (config.objective, config.guidance_space, config.jacobian) == ("adversarial", "latent", "identity")
    classes, labels = select_classes(imagenet_classes(), config.classes)
    assert len(classes) == len(set(labels)) == IMAGENET[name]
    steps = config.discriminator_steps * config.discriminator_batch_size
    assert steps >= 5 * 40 * len(classes)  # at 50 images a class, each of the last one's several times


@pytest.mark.parametrize("name", IMAGENET)
def test_the_window_is_steps_10_to_45_of_50(name: str) -> None:
    config = preset("--preset", name)
    low, high = config.guidance_window
    steps = step_coefficients(config.num_sampling_steps)
    active = [i for i, c in enumerate(steps) if low <= c.timestep / NUM_TRAIN_TIMESTEPS <= high]
    assert active == list(range(10, 46))
    # exactly: the ends are those steps' own t/T
    assert [low, high] == [steps[i].timestep / NUM_TRAIN_TIMESTEPS for i in (10, 45)]


@pytest.mark.parametrize("ipc", [10, 1300])
@pytest.mark.parametrize("name", IMAGENET)
def test_flags_overrule_a_preset_and_ipc_goes_up_to_a_whole_class(name: str, ipc: int) -> None:
    config = preset("--preset", name, "--ipc", str(ipc), "--cfg-scale", "1.5")
    assert (config.ipc, config.cfg_scale, config.out) == (ipc, 1.5, f"runs/{name}")
    ranges = curriculum_ranges(config.ipc, config.num_curricula)
    assert [len(part) for part in ranges] == [ipc // 5] * 5


def test_the_digits_are_the_defaults() -> None:
    assert preset() == preset("--preset", "digits") == DistillConfig()


@pytest.mark.parametrize("name", IMAGENET)
def test_sets_are_judged_by_a_network_of_the_published_tables(name: str) -> None:
    config = resolve(EvaluateConfig, {"preset": name})
    assert config.network == ("resnet-18" if name == "imagenet1k" else "resnetap-10",)
    build_classifier(config.network[0], 3, 10, 256)
    assert config.protocol == () and config.epochs is None  # hard-sgd, by the number of images


def test_imagenet100_is_a_list_of_imagenet_in_its_own_order() -> None:
    names = parse_classes("imagenet100")
    assert len(set(names)) == 100 and set(names) <= set(imagenet_classes())
    assert names[:3] == ("n02869837", "n01749939", "n02488291") and list(names) != sorted(names)


@pytest.mark.skipif(not LISTS.is_dir(), reason="the published class lists are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "file"),
    [("imagewoof", "woof"), ("imagenette", "nette"), ("imagenet100", "100"), ("imagenet1k", "indices")],
)
def test_lists_are_the_published_ones(name: str, file: str) -> None:
    published = (LISTS / f"class{'' if file == '100' else '_'}{file}.txt").read_text().splitlines()
    assert parse_classes(name) == tuple(line.split()[0] for line in published)


def test_every_preset_makes_a_configuration() -> None:
    import acs_fast.config as config

    for cls, presets in PRESETS.items():
        for name in presets:
            assert resolve(getattr(config, cls), {"preset": name}).preset == name
