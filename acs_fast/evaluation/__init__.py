"""Judge a distilled set: train fresh classifiers on it alone, test on real held-out images (PROTOCOLS.md)."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from acs_fast.config import PRESETS, DistillConfig, EvaluateConfig, InputError
from acs_fast.data import DIGITS, ImageSet, load_images, parse_classes, select_classes
from acs_fast.environment import describe, resolve_device
from acs_fast.evaluation import redundancy
from acs_fast.evaluation.arithmetic import resolve_dtype
from acs_fast.evaluation.baselines import (
    NAMES,
    RANDOM,
    REAL,
    SAMPLED,
    check_baselines,
    choose_coresets,
    sampled_set,
)
from acs_fast.evaluation.coverage import expected_coverage, prdc
from acs_fast.evaluation.features import Features, feature_network
from acs_fast.evaluation.kept import Kept
from acs_fast.evaluation.protocols import PROTOCOL_SIZE, Recipe, deviations, make_recipe
from acs_fast.evaluation.results import format_results, keep_results, summary
from acs_fast.evaluation.runs import Run, read_run
from acs_fast.evaluation.sets import Real, Training, fewest, resized
from acs_fast.evaluation.soft import SoftLabels, identity, network_digest
from acs_fast.evaluation.teacher import load_teacher
from acs_fast.evaluation.trained import images_digest
from acs_fast.evaluation.training import Accuracy, Learner, TestSet, top1, train_and_test
from acs_fast.listing import class_folders
from acs_fast.models.checkpoint import read_config
from acs_fast.models.classifier import build_classifier, default_network
from acs_fast.networks import checkpoint_path, samples_pixels
from acs_fast.plan import curriculum_ranges
from acs_fast.writer import lock

__all__ = ["check_test_images", "evaluate", "format_results"]

DISTILLED = "distilled"
NEIGHBOURS = 5  # k of coverage, density, precision and recall
TEACHER = "resnet18"  # the soft protocol's, and its first student


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Train `repeats` fresh classifiers on the images of `config.path` and each baseline; test on real ones.

    `config.path` is a run folder, or a folder of <class>/<image> or of WebDataset shards. Returns
    `evaluations`, a record for each protocol and network: for each set the best and last top-1 accuracy of
    every repeat, their mean and their standard deviation (ddof 0), in percent, and what deviates from the
    protocol; with `redundancy` also that. A run folder keeps them in results.json, beside earlier ones of
    other protocols, and report.html. What can be refused is refused before anything is trained or sampled.
    """
    evaluation = Evaluation(config)
    evaluation.prepare()
    results: dict[str, Any] = {"evaluations": evaluation.judge()}
    if config.redundancy:
        results["redundancy"] = evaluation.redundancy()
    if evaluation.run:
        keep_results(evaluation.run.path, results)
    return results


def check_test_images(config: DistillConfig) -> None:
    """InputError before a run whose images could not be judged by the digits, the default of `--real`."""
    if config.real == DIGITS:
        shape = read_config(checkpoint_path(config.model))
        size = shape.input_size if samples_pixels(shape) else None
        channels = shape.in_channels if samples_pixels(shape) else 3
        load_images(DIGITS, "val", select_classes(shape.class_names, config.classes)[0], size, channels)


class Evaluation:
    """One call of `evaluate`: the sets, what is trained on them, and the real images."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.run = config, read_run(Path(config.path))
        self.device = resolve_device(config.device)
        source = config.real or (self.run.config.real if self.run else "")
        check_baselines(config.baselines, self.run, config.path, source)
        self.distilled = self._distilled()
        native, channels = self.distilled.images.shape[-1], self.distilled.images.shape[1]
        size = config.image_size or min(native, PROTOCOL_SIZE)
        self.real = Real(source, self.distilled.classes, channels, native, size)
        self.distilled = dataclasses.replace(resized(self.distilled, size), mirror=self.real.mirror)
        self.num_classes = len(self.real.classes)
        self.dtype = resolve_dtype(config.dtype, self.device, size)
        if not self.run and not config.classes:
            self._tell_of_other_classes()
        self.ipc = self._ipc()
        self.plans = [
            (network, recipe)
            for recipe in choose_recipes(config, self.run, source, self.ipc, self.num_classes)
            for network in config.network or (TEACHER if recipe.soft else default_network(size),)
        ]
        for network, _ in self.plans:
            with torch.device("meta"):
                build_classifier(network, channels, self.num_classes, size)  # refused here if it does not fit
        self._check_redundancy()
        if self.run:
            with lock(self.run.path):  # refused here if results could not be written
                pass

    def prepare(self) -> None:
        """Read the test images, choose the coresets, sample what is to be sampled."""
        soft = {recipe.soft for _, recipe in self.plans} | ({False} if self.config.redundancy else set())
        tests = {kind: self.real.test(kind) for kind in soft}
        self.tests = {kind: TestSet.of(images, self.device) for kind, images in tests.items()}
        self.tested = {kind: images_digest(images) for kind, images in tests.items()}
        file = self.run.path / "baselines" / "trainings.jsonl" if self.run else None
        self.kept = Kept(file, {**describe(self.device), "dtype": str(self.dtype)})
        self.teacher: nn.Module | None = None
        taught = ""
        if True in soft:
            self.teacher, taught = self._teacher()
        self.taught = taught
        names, ipc = self.config.baselines, self.ipc
        fixed = choose_coresets(names, self.real, ipc, lambda: self.features)
        for name in SAMPLED:
            if name in names and self.run:
                fixed[name] = sampled_set(name, self.run, self.real, self.device).first(ipc)
        self.sets: dict[str, Training] = {DISTILLED: lambda seed: self.distilled.first(ipc)}
        for name in names:
            self.sets[NAMES[name]] = (
                (lambda seed: self._mirrored(self.real.random(ipc, seed)))
                if name == RANDOM
                else functools.partial(_same, self._mirrored(fixed[name]))
            )

    def judge(self) -> list[dict[str, Any]]:
        """A record for each protocol and network."""
        total = sum(len(self.sets) * self.config.repeats * recipe.epochs for _, recipe in self.plans)
        with tqdm(total=total, desc="evaluate", unit="epoch", disable=None) as progress:
            return [self._judge(network, recipe, progress) for network, recipe in self.plans]

    def _judge(self, network: str, recipe: Recipe, progress: tqdm[Any]) -> dict[str, Any]:
        config, started = self.config, time.perf_counter()
        test, found = self.tests[recipe.soft], {}
        for name, training in self.sets.items():
            accuracies = []
            for seed in range(config.seed, config.seed + config.repeats):
                progress.set_postfix_str(f"{recipe.protocol} {network}, {name}, seed {seed}", refresh=False)
                accuracies.append(self._trained(name, training(seed), network, recipe, seed, progress))
            found[name] = summary(accuracies)
        return {
            **self._made_by(network, recipe),
            **({"teacher": self.taught} if recipe.soft else {}),
            "test_images": len(test.labels),
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
            batches = self._stored(name, train, network, recipe, seed)
            found = train_and_test(
                train, self.tests[recipe.soft], network, recipe, seed, self.device, progress, self.teacher,
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
            "tested": self.tested[recipe.soft],
            "teacher": network_digest(self.teacher) if recipe.soft and self.teacher else None,
        }

    def _made_by(self, network: str, recipe: Recipe) -> dict[str, Any]:
        """The settings of a record."""
        return {
            "protocol": recipe.protocol,
            "network": network,
            "image_size": self.real.size,
            "ipc": self.ipc,
            "epochs": recipe.epochs,
            "protocol_epochs": recipe.protocol_epochs,
            "deviations": deviations(
                recipe, self.real.size, self.real.mirror, network, self.dtype == torch.bfloat16
            ),
            "repeats": self.config.repeats,
            "seed": self.config.seed,
            "mirror": self.real.mirror,
            "baselines": list(self.config.baselines),
            "real": self.real.source,
        }

    def redundancy(self) -> dict[str, Any]:
        """The record of the redundancy of each set, by the first hard protocol and its network."""
        assert self.run is not None
        config, started = self.config, time.perf_counter()
        hard = [(network, recipe) for network, recipe in self.plans if not recipe.soft]
        network, recipe = hard[0] if hard else self._fallback()
        ranges = curriculum_ranges(self.ipc, self.run.config.num_curricula)
        own = None if recipe.epochs == recipe.protocol_epochs else recipe.epochs
        epochs = redundancy.epochs_of(recipe.protocol, ranges, self.num_classes, own)
        seeds, features = range(config.seed, config.seed + config.repeats), self.features
        real = features.of(self.real.sample().images)
        found: dict[str, Any] = {}
        with tqdm(
            total=len(self.sets) * len(seeds) * sum(epochs), desc="redundancy", unit="epoch", disable=None
        ) as progress:
            for name, training in self.sets.items():
                repeats = []
                for seed in seeds:
                    progress.set_postfix_str(f"{name}, seed {seed}", refresh=False)
                    train, before = training(seed), progress.n
                    make = functools.partial(
                        redundancy.measure, train, ranges, self.tests[False], network=network, seed=seed,
                        protocol=recipe.protocol, epochs=own, device=self.device, progress=progress,
                        dtype=self.dtype,
                    )  # fmt: skip
                    key = {"ranges": [[r.start, r.stop] for r in ranges], "epochs_of_each": epochs}
                    repeats.append(self.kept.get({**self._key(train, network, recipe, seed), **key}, make))
                    progress.update(before + sum(epochs) - progress.n)
                images = training(config.seed).images
                expected = expected_coverage(len(real), len(images), NEIGHBOURS)
                shares = {**prdc(real, features.of(images), NEIGHBOURS), "expected": expected}
                found[name] = {
                    **redundancy.summarised(repeats, ranges),
                    "coverage": {**shares, "images": len(images)},
                }
        return {
            **self._made_by(network, recipe),
            "epochs": epochs,
            "features": features.describe,
            "k": NEIGHBOURS,
            "real_images": len(real),
            "seconds": round(time.perf_counter() - started, 1),
            "sets": found,
            **describe(self.device),
        }

    @functools.cached_property
    def features(self) -> Features:
        """The network in whose features coresets are chosen and coverage is measured."""
        folder = self.run.path / "baselines" if self.run else None
        return feature_network(self.config.features, self.real.sample, self.device, 0, folder)

    def _teacher(self) -> tuple[nn.Module, str]:
        """The teacher, and what results say of it."""
        folder = self.run.path / "baselines" if self.run else None
        teacher = load_teacher(
            self.config.teacher, TEACHER, self.real.classes, self.real.sample, self.device, 0, folder,
            self.real.size, self.real.channels,
        )  # fmt: skip
        return teacher, f"{teacher.origin}, {top1(teacher, self.tests[True]):.1f} % on the test images"

    def _stored(self, name: str, train: ImageSet, network: str, recipe: Recipe, seed: int) -> Any:
        """Where a training finds its stored batches with their labels, made now where they are missing."""
        if not recipe.soft or not self.config.stored_soft_labels:
            return None
        assert self.teacher is not None
        learner = Learner(train, network, recipe, seed, self.device, self.teacher, capture=False)
        folder = Path(self.config.stored_soft_labels) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        labels = SoftLabels(folder, identity(train, self.teacher, learner, seed))
        labels.complete(learner)
        return functools.partial(labels.draws, batch_size=recipe.batch_size)

    def _mirrored(self, images: ImageSet) -> ImageSet:
        return dataclasses.replace(images, mirror=self.real.mirror)

    def _distilled(self) -> ImageSet:
        """The distilled images as they lie; classes in the run's order, or in that of `--classes`."""
        if self.run:
            return load_images(str(self.run.path / "images"), None, self.run.classes)
        return load_images(
            self.config.path, None, parse_classes(self.config.classes) if self.config.classes else None
        )

    def _ipc(self) -> int:
        """The images a class that every set has; InputError where one has fewer than are asked for."""
        available = {DISTILLED: fewest(self.distilled.labels, self.num_classes)}
        if any(name in REAL for name in self.config.baselines):
            available["real training"] = fewest(self.real.train_labels, self.num_classes)
        ipc = self.config.ipc or available[DISTILLED]
        for name, count in available.items():
            if count < ipc:
                raise InputError(
                    f"--ipc {ipc}: a class of the {name} images has only {count}; give at most that"
                )
        return ipc

    def _tell_of_other_classes(self) -> None:
        """Say on stderr which classes of the real images a folder without a class list leaves out."""
        root = Path(self.real.source) / "val"
        known = class_folders(root) if root.is_dir() else []
        if other := [name for name in known if name not in self.real.classes]:
            named = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
            print(
                f"{self.config.path} has {self.num_classes} of the {len(known)} classes of "
                f"{self.real.source}; without {named} the task is easier than theirs",
                file=sys.stderr,
            )

    def _check_redundancy(self) -> None:
        """InputError where there are no curricula to compare."""
        if not self.config.redundancy:
            return
        if not self.run or self.run.config.num_curricula == 1:
            raise InputError(
                f"--redundancy compares curricula, and {self.config.path} has not more than one; "
                "give a run of several"
            )
        if self.ipc != self.run.config.ipc:
            raise InputError(
                f"--redundancy takes all images of a run, so --ipc {self.ipc} does not go with it; drop it"
            )

    def _fallback(self) -> tuple[str, Recipe]:
        """Of a call that has soft protocols alone: the field's first."""
        recipe = make_recipe("hard-sgd", self.ipc, self.num_classes, self.config.epochs)
        return default_network(self.real.size), recipe


def _same(images: ImageSet, seed: int) -> ImageSet:
    """A set that is the same in every repeat."""
    return images


def choose_recipes(
    config: EvaluateConfig, run: Run | None, source: str, ipc: int, num_classes: int
) -> list[Recipe]:
    """Those of the protocols given; else the preset's for a run on the digits; else hard-sgd.

    A protocol that is named has its own epochs, not the preset's.
    """
    preset = PRESETS["EvaluateConfig"].get(source, {}) if run and not config.protocol else {}
    protocols = config.protocol or preset.get("protocol", ("hard-sgd",))
    epochs = config.epochs or preset.get("epochs")
    return [make_recipe(protocol, ipc, num_classes, epochs) for protocol in protocols]
