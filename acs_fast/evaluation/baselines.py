"""What stands beside a distilled set, of its size: real images chosen in three ways, sampling without ACS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from acs_fast.curriculum import distill
from acs_fast.data import ImageSet, load_images
from acs_fast.evaluation.coresets import herding, k_centre
from acs_fast.evaluation.features import Features
from acs_fast.evaluation.runs import Run, read_record
from acs_fast.evaluation.sets import Real, resized
from acs_fast.writer import RUN_CONFIG

# --baselines -> the set's name in the results
RANDOM, HERDING, K_CENTRE, PLAIN, REPULSION = "random", "herding", "k-centre", "plain", "repulsion"
NAMES = {
    RANDOM: "random real",
    HERDING: "herding",
    K_CENTRE: "k-centre",
    PLAIN: "plain",
    REPULSION: "plain, repulsion",
}
REAL, CORESETS, SAMPLED = (RANDOM, HERDING, K_CENTRE), (HERDING, K_CENTRE), (PLAIN, REPULSION)
ALONE = 1e6  # weight of a repulsion beside which the discriminator's gradient, of order 1, is nothing
CHUNK = 512  # real images read at a time for their features


def sample_baseline(name: str, run: Run, device: torch.device) -> Path:
    """The run's images without ACS: same model, noise and settings, kept inside the run folder.

    `plain` has no guidance. `repulsion` is pushed away from the nearest earlier sample of the class, by
    IGD's diversity term alone, as far as the run was pushed: its weight drowns the discriminator's gradient.
    """
    out = run.path / "baselines" / name
    changes = {"guidance_scale": 0.0} if name == PLAIN else {"repulsion": ALONE, "objective": "adversarial"}
    config = dataclasses.replace(run.config, out=str(out), device=device.type, **changes)
    # kernels that were chosen on another kind of device need not be on this one
    if run.device != device.type:
        config = dataclasses.replace(config, attention="auto", compile="auto")
    other_device = (out / RUN_CONFIG).is_file() and read_record(out).device != device.type
    return distill(config, overwrite=other_device)


def sampled_set(name: str, run: Run, real: Real, device: torch.device) -> ImageSet:
    """The images of `sample_baseline`, sampled now where they are not there, in the size of all others."""
    images = load_images(
        str(sample_baseline(name, run, device) / "images"), None, run.classes, None, real.channels
    )
    return dataclasses.replace(resized(images, real.size), mirror=real.mirror)


def choose_coresets(
    names: tuple[str, ...], real: Real, ipc: int, features: Callable[[], Features]
) -> dict[str, ImageSet]:
    """The coresets that `names` has, of `ipc` real training images a class, in the order of choice."""
    wanted = [name for name in CORESETS if name in names]
    if not wanted:
        return {}
    found, of = [], features()
    for rows in torch.arange(len(real.train_labels)).split(CHUNK):
        found.append(of.of(real.take(rows).images))
    choose = {HERDING: herding, K_CENTRE: k_centre}
    values = torch.cat(found)
    return {name: real.take(choose[name](values, real.train_labels, ipc)) for name in wanted}
