"""One call of `evaluate`: its sets, the classifiers trained on them, the records."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acs_fast.config import PRESETS, EvaluateConfig
from acs_fast.data import DIGITS, ImageSet, load_images, parse_classes
from acs_fast.environment import describe, resolve_device
from acs_fast.evaluation import redundancy
from acs_fast.evaluation.arithmetic import resolve_dtype
from acs_fast.evaluation.baselines import NAMES, RANDOM, SAMPLED, choose_coresets, sampled_set
from acs_fast.evaluation.coverage import expected_coverage, prdc
from acs_fast.evaluation.features import Features, feature_network
from acs_fast.evaluation.kept import Kept
from acs_fast.evaluation.protocols import PROTOCOL_SIZE, SOFT_NETWORKS, Recipe, deviations, make_recipe
from acs_fast.evaluation.refusals import (
    NEIGHBOURS,
    check_plans,
    check_redundancy,
    check_source,
    choose_ipc,
    tell_of_other_classes,
)
from acs_fast.evaluation.results import summary
from acs_fast.evaluation.runs import Run, read_run
from acs_fast.evaluation.sets import Real, Training, resized
from acs_fast.evaluation.soft import SoftLabels, identity, network_digest
from acs_fast.evaluation.teacher import Teacher, load_teacher
from acs_fast.evaluation.trained import images_digest
from acs_fast.evaluation.training import Accuracy, Learner, TestSet, top1, train_and_test
from acs_fast.models.classifier import default_network
from acs_fast.plan import curriculum_ranges
from acs_fast.writer import lock

DISTILLED = "distilled"


class Evaluation:
    """The sets, what is trained on them, and the real images; `judge` and `redundancy` train."""

    def __init__(self, config: EvaluateConfig):
        """Read the set and refuse what can be refused."""
        self.config, self.run = config, read_run(Path(config.path))
        self.device = resolve_device(config.device)
        source = config.real or (self.run.config.real if self.run else "")
        check_source(config, self.run, source)
        distilled = self._distilled(source)
        native, channels = distilled.images.shape[-1], distilled.images.shape[1]
        size = config.image_size or min(native, PROTOCOL_SIZE)
        self.real = real = Real(source, distilled.classes, channels, native, size)
        real.check()
        self.num_classes = len(real.classes)
        self.dtype = resolve_dtype(config.dtype, self.device, size)
        if not self.run and not config.classes:
            tell_of_other_classes(config.path, real)
        self.ipc = choose_ipc(config, distilled.labels, real)
        self.distilled = self._mirrored(resized(distilled, size).first(self.ipc))
        recipes, self.epochs = choose_recipes(config, self.run, source, self.ipc, self.num_classes)
        self.plans = [
            (network, recipe)
            for recipe in recipes
            for network in config.network or (SOFT_NETWORKS[0] if recipe.soft else default_network(size),)
        ]
        check_plans(config, self.plans, real, self.ipc)
        check_redundancy(config, self.run, real, self.ipc)
        if self.run:
            with lock(self.run.path):  # refused here if results could not be written
                pass

    def prepare(self) -> None:
        """Choose the coresets, sample what is to be sampled, make the teacher and the features."""
        world = {**describe(self.device), "dtype": str(self.dtype)}
        known = not (world["commit"] or "").endswith("+")  # else other code has the same name
        file = self.run.path / "baselines" / "trainings.jsonl" if self.run and known else None
        self.kept = Kept(file, world)
        self.tests: dict[bool, tuple[TestSet, str]] = {}
        names = self.config.baselines
        if self.config.redundancy:
            _ = self.features  # a model that cannot be had is refused before the rest
        fixed = choose_coresets(names, self.real, self.ipc, lambda: self.features)
        for name in SAMPLED:
            if name in names and self.run:
                fixed[name] = sampled_set(name, self.run, self.real, self.device).first(self.ipc)
        self.sets: dict[str, Training] = {DISTILLED: functools.partial(_same, self.distilled)}
        for name in names:
            self.sets[NAMES[name]] = (
                (lambda seed: self._mirrored(self.real.random(self.ipc, seed)))
                if name == RANDOM
                else functools.partial(_same, self._mirrored(fixed[name]))
            )
        for _, recipe in self.plans:
            if recipe.soft and self.config.stored_soft_labels:
                for name, training in self.sets.items():
                    for seed in self.seeds:
                        self._labels(name, training(seed), recipe, seed)  # others are refused here

    @property
    def seeds(self) -> range:
        """Of the repeats."""
        return range(self.config.seed, self.config.seed + self.config.repeats)

    def judge(self) -> Iterator[dict[str, Any]]:
        """A record for each protocol and network, as it is done."""
        total = sum(len(self.sets) * self.config.repeats * recipe.epochs for _, recipe in self.plans)
        with tqdm(total=total, desc="evaluate", unit="epoch", disable=None) as progress:
            for network, recipe in self.plans:
                yield self._judge(network, recipe, progress)

    def _judge(self, network: str, recipe: Recipe, progress: tqdm[Any]) -> dict[str, Any]:
        started, found = time.perf_counter(), {}
        for name, training in self.sets.items():
            accuracies = []
            for seed in self.seeds:
                progress.set_postfix_str(f"{recipe.protocol} {network}, {name}, seed {seed}", refresh=False)
                accuracies.append(self._trained(name, training(seed), network, recipe, seed, progress))
            found[name] = summary(accuracies)
        return {
            **self._made_by(network, recipe),
            "test_images": len(self.test(recipe.soft)[0].labels),
            "seconds": round(time.perf_counter() - started, 1),
            "sets": found,
            **describe(self.device),
        }

    def _trained(
        self, name: str, train: ImageSet, network: str, recipe: Recipe, seed: int, progress: tqdm[Any]
    ) -> Accuracy:
        """One training of a set, or what an earlier call has kept of it."""
        before = progress.n

        def make() -> list[float]:
            teacher = self.teacher if recipe.soft else None
            batches = None
            if recipe.soft and self.config.stored_soft_labels:
                labels = self._labels(name, train, recipe, seed)
                labels.complete(
                    lambda: Learner(train, network, recipe, seed, self.device, teacher, capture=False)
                )
                batches = functools.partial(labels.draws, batch_size=recipe.batch_size)
            found = train_and_test(
                train, self.test(recipe.soft)[0], network, recipe, seed, self.device, progress, teacher,
                batches, self.dtype,
            )  # fmt: skip
            return [found.best, found.last]

        values = self.kept.get(self._key(train, network, recipe, seed), make)
        progress.update(before + recipe.epochs - progress.n)
        return Accuracy(*values)

    def _key(self, train: ImageSet, network: str, recipe: Recipe, seed: int) -> dict[str, Any]:
        """What the outcome of a training is a function of, but for what all of this call have in common."""
        return {
            **dataclasses.asdict(recipe),
            "network": network,
            "seed": seed,
            "trained": images_digest(train),
            "tested": self.test(recipe.soft)[1],
            "teacher": network_digest(self.teacher) if recipe.soft else None,
            "stored": recipe.soft and self.config.stored_soft_labels is not None,  # rounded to fp16
        }

    def _made_by(self, network: str, recipe: Recipe) -> dict[str, Any]:
        """The settings of a record."""
        taught = f"{self.teacher.origin}, {self._taught:.1f} % on the test images" if recipe.soft else None
        return {
            "protocol": recipe.protocol,
            "network": network,
            "image_size": self.real.size,
            "ipc": self.ipc,
            "epochs": recipe.epochs,
            "protocol_epochs": recipe.protocol_epochs,
            "deviations": deviations(
                recipe, network, size=self.real.size, channels=self.real.channels, mirror=self.real.mirror,
                bf16=self.dtype == torch.bfloat16, repeats=self.config.repeats, teacher=taught,
            ),
            "repeats": self.config.repeats,
            "seed": self.config.seed,
            "mirror": self.real.mirror,
            "baselines": list(self.config.baselines),
            "real": self.real.source,
            "flags": self._other_flags(),
        }  # fmt: skip

    def _other_flags(self) -> dict[str, str]:
        """The further settings that whoever repeats this must give."""
        given = {name: getattr(self.config, name) for name in ("dtype", "features", "teacher")}
        default = EvaluateConfig()
        return {name: value for name, value in given.items() if value != getattr(default, name)}

    def redundancy(self) -> dict[str, Any]:
        """The record of the redundancy of each set, by the first hard protocol and its network."""
        assert self.run is not None
        started, found = time.perf_counter(), {}
        hard = [(network, recipe) for network, recipe in self.plans if not recipe.soft]
        network, recipe = hard[0] if hard else self._fallback()
        ranges = curriculum_ranges(self.ipc, self.run.config.num_curricula)
        epochs = redundancy.epochs_of(recipe.protocol, ranges, self.num_classes, self.epochs)
        real, covered = self.real.sample(), self.features
        features = covered.of(real.images)
        sampled = {DISTILLED, *(NAMES[name] for name in SAMPLED)}
        with tqdm(
            total=len(self.sets) * len(self.seeds) * sum(epochs),
            desc="redundancy",
            unit="epoch",
            disable=None,
        ) as progress:
            for name, training in self.sets.items():
                repeats = []
                for seed in self.seeds:
                    progress.set_postfix_str(f"{name}, seed {seed}", refresh=False)
                    train, before = training(seed), progress.n
                    if name in sampled:
                        train = redundancy.by_index(train, self.ipc)
                    make = functools.partial(
                        redundancy.measure, train, ranges, self.test(False)[0], network=network, seed=seed,
                        protocol=recipe.protocol, epochs=self.epochs, device=self.device, progress=progress,
                        dtype=self.dtype,
                    )  # fmt: skip
                    key = {"ranges": [[r.start, r.stop] for r in ranges], "epochs_of_each": epochs}
                    repeats.append(self.kept.get({**self._key(train, network, recipe, seed), **key}, make))
                    progress.update(before + sum(epochs) - progress.n)
                images = training(self.config.seed).images
                found[name] = {
                    **redundancy.summarised(repeats, ranges),
                    "coverage": {
                        **prdc(features, covered.of(images), NEIGHBOURS),
                        "expected": expected_coverage(len(features), len(images), NEIGHBOURS),
                        "images": len(images),
                    },
                }
        return {
            **self._made_by(network, recipe),
            "epochs": epochs,
            "features": covered.describe,
            "k": NEIGHBOURS,
            "real_images": len(features),
            "seconds": round(time.perf_counter() - started, 1),
            "sets": found,
            **describe(self.device),
        }

    def test(self, soft: bool) -> tuple[TestSet, str]:
        """The test images of a kind of protocol on the device, read when wanted, and their digest."""
        if soft not in self.tests:
            images = self.real.test(soft)
            self.tests = {soft: (TestSet.of(images, self.device), images_digest(images))}  # one at a time
        return self.tests[soft]

    @functools.cached_property
    def features(self) -> Features:
        """The network in whose features coresets are chosen and coverage is measured."""
        folder = self.run.path / "baselines" if self.run else None
        return feature_network(self.config.features, self.real.sample, self.device, 0, folder)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """Of the soft protocol: from a file, from where it was kept, or trained now."""
        stored = self.config.stored_soft_labels
        folder = self.run.path / "baselines" if self.run else Path(stored) if stored else None
        return load_teacher(
            self.config.teacher, self.real.classes, self.real.sample, self.device, folder, self.real.size,
            self.real.channels,
        )  # fmt: skip

    @functools.cached_property
    def _taught(self) -> float:
        """The teacher's own accuracy."""
        return top1(self.teacher, self.test(True)[0])

    def _labels(self, name: str, train: ImageSet, recipe: Recipe, seed: int) -> SoftLabels:
        """The stored soft labels of a training; InputError for others in their place."""
        folder = Path(str(self.config.stored_soft_labels))
        folder /= f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        return SoftLabels(folder, identity(train, self.teacher, recipe, seed))

    def _mirrored(self, images: ImageSet) -> ImageSet:
        return dataclasses.replace(images, mirror=self.real.mirror)

    def _distilled(self, source: str) -> ImageSet:
        """The distilled images; classes in the run's order, or in that of `--classes`.

        As they lie, or resized from their files; but where the digits judge they must lie as digits do.
        """
        size = None if source == DIGITS else self.config.image_size
        if self.run:
            return load_images(str(self.run.path / "images"), None, self.run.classes, size)
        classes = parse_classes(self.config.classes) if self.config.classes else None
        return load_images(self.config.path, None, classes, size)

    def _fallback(self) -> tuple[str, Recipe]:
        """Of a call that has soft protocols alone: the field's first."""
        recipe = make_recipe("hard-sgd", self.ipc, self.num_classes, self.epochs)
        return default_network(self.real.size), recipe


def _same(images: ImageSet, seed: int) -> ImageSet:
    """A set that is the same in every repeat."""
    return images


def choose_recipes(
    config: EvaluateConfig, run: Run | None, source: str, ipc: int, num_classes: int
) -> tuple[list[Recipe], int | None]:
    """Those of the protocols given; else the preset's for a run on the digits; else hard-sgd. And the epochs
    that overrule the protocols' own, if any.

    A protocol that is named has its own epochs, not the preset's.
    """
    preset = PRESETS["EvaluateConfig"].get(source, {}) if run and not config.protocol else {}
    protocols = config.protocol or preset.get("protocol", ("hard-sgd",))
    epochs = config.epochs or preset.get("epochs")
    return [make_recipe(protocol, ipc, num_classes, epochs) for protocol in protocols], epochs
