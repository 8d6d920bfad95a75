"""Distil: per curriculum train the discriminator on everything so far and sample; continue after any stop."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acs_fast.augment import to_device
from acs_fast.config import DistillConfig, InputError, resolve
from acs_fast.data import DIGITS, select_classes
from acs_fast.environment import describe, resolve_device
from acs_fast.generator import ImageGenerator, is_out_of_memory, out_of_memory
from acs_fast.guidance import Guidance
from acs_fast.loader import resolve_loader
from acs_fast.output import Output
from acs_fast.plan import Item, available_memory, curriculum_batches, curriculum_ranges
from acs_fast.report import contact_sheet
from acs_fast.steering import Steering
from acs_fast.writer import (
    RUN_CONFIG,
    Manifest,
    claim,
    is_record,
    lock,
    read_json,
    read_tensors,
    write_atomic,
)

BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
# settings whose `auto` is resolved by measurement or by the machine: a run that is continued keeps its own
RESOLVED = ("dtype", "attention", "compile", "batch_size", "loader")


def distill(config: DistillConfig, overwrite: bool = False) -> Path:
    """Sample a distilled set by adversary-guided curriculum sampling; returns its run folder `config.out`.

    Writes images/<class>/<index>.png, config.json, manifest.jsonl, contact_sheet.png and the state to
    continue from (samples/, discriminators/). An interrupted run of the same configuration is continued and
    ends with the same bytes; a folder of another configuration raises InputError unless `overwrite`.
    """
    out, run = Path(config.out), None
    try:
        run = Run(config, overwrite)
        with lock(out):
            run.start()
            started = time.perf_counter()
            run.sample()
            run.finish()
            seconds = time.perf_counter() - started
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the engine
        raise InputError(run.out_of_memory() if run else "the model does not fit into the memory") from error
    waited = f", {run.waited:.1f} s of it waiting for files" if run.waited >= 0.1 else ""
    if run.steering.real is not None and run.steering.real.waited >= 0.1:
        waited += f", {run.steering.real.waited:.1f} s waiting for real images"
    print(f"{out}: {run.total} images, {run.sampled} of them sampled now, in {seconds:.1f} s{waited}")
    return out


class Run:
    """One distillation: the model, the classes, the curricula and the folder it is written to."""

    def __init__(self, config: DistillConfig, overwrite: bool = False):
        self.out, self.overwrite = Path(config.out), overwrite
        self.device = resolve_device(config.device)
        given, config = config, config if overwrite else keep_resolved(config, self.out, self.device)
        if config.real != DIGITS and config.guidance_scale > 0:  # else nothing is loaded
            config = dataclasses.replace(config, loader=resolve_loader(config.loader))
        names = [name for name in ("attention", "compile") if getattr(given, name) != getattr(config, name)]
        self.kept = [f"--{name} {getattr(config, name)}" for name in names]
        self.generator = ImageGenerator(config, self.device)
        self.config = config = self.generator.config
        known = self.generator.shape.classes or tuple(map(str, range(self.generator.shape.num_classes)))
        self.classes, self.class_labels = select_classes(known, config.classes)
        self.ranges = curriculum_ranges(config.ipc, config.num_curricula)
        assert config.batch_size is not None
        self.batches = [
            curriculum_batches(len(self.classes), part, config.batch_size) for part in self.ranges
        ]
        self.bucket = max(len(batch) for batches in self.batches for batch in batches)  # the rest is padded
        self.waited = 0.0  # seconds that sampling stood still for decoding and writing
        self.total, self.sampled = config.ipc * len(self.classes), 0
        self.guided = config.guidance_scale > 0 and config.num_curricula > 1
        self.steering = Steering(config, self.generator, self.classes, self.batches, self.guided, overwrite)

    def start(self) -> None:
        """Take the run folder, find what is missing in it, and print the plan."""
        try:
            measured = self.generator.choose(self.bucket)
        except InputError as error:
            if not self.kept:
                raise
            raise InputError(
                f"{self.out} was begun with {' '.join(self.kept)}, which does not go here ({error}); "
                "continue it where it was begun or give another --out"
            ) from error
        self.config = self.generator.config
        if self.overwrite or not (self.out / RUN_CONFIG).is_file():  # refused before anything is written
            self.generator.check_memory(self.bucket, len(self.classes))
        record = {
            "config": dataclasses.asdict(with_absolute_paths(self.config)),
            "classes": list(self.classes),
            "class_labels": self.class_labels,
            **self.generator.record(),
            **describe(self.device),
        }
        stored = claim(self.out, record, self.overwrite)
        self.manifest = Manifest(self.out)
        self.manifest.rewrite(self._keys())
        self.missing = {
            curriculum: [item for item in enumerate(batches) if not self._done(curriculum, *item)]
            for curriculum, batches in enumerate(self.batches, start=1)
        }
        if any(self.missing.values()):
            warn_of_other_code(stored, record)
            print(*filter(None, [measured]), end="\n" if measured else "", flush=True)
            self.steering.prepare()
            self.generator.prepare(self.bucket, self.class_labels)
        print(self._plan(), flush=True)

    def sample(self) -> None:
        """Bring every curriculum to its end; decoding and writing go on beside the next batch."""
        decode, to_uint8 = self.generator.decode, self.generator.ops.to_uint8
        with Output(self.manifest, self.device, decode, to_uint8) as self.output:
            for curriculum in range(1, self.config.num_curricula + 1):
                self.sample_curriculum(curriculum)
            self.waited = self.output.waited

    def sample_curriculum(self, curriculum: int) -> None:
        """Bring curriculum 1..N to its end: train its discriminator if guided, sample what is missing."""
        missing = self.missing[curriculum]
        if not missing:
            return
        guidance = self.steering.guidance(curriculum) if self.guided and curriculum > 1 else None
        images = sum(len(batch) for _, batch in missing)
        title = f"curriculum {curriculum}/{self.config.num_curricula} sample"
        with tqdm(total=images, desc=title, unit="image", disable=None, bar_format=BAR) as progress:
            for number, batch in missing:
                self._sample_batch(curriculum, number, batch, guidance, progress)
            self.output.flush()  # the next discriminator is trained on what lies on the disk

    def finish(self) -> None:
        """Put the manifest in order and draw the contact sheet."""
        self.manifest.rewrite(self._keys())
        sheet = contact_sheet(self.out / "images", self.classes, self.ranges)
        write_atomic(self.out / "contact_sheet.png", sheet)

    def _sample_batch(
        self, curriculum: int, number: int, batch: list[Item], guidance: Guidance | None, progress: tqdm[Any]
    ) -> None:
        positions = torch.tensor([item.position for item in batch])
        # the discriminator knows positions in the run's list, the denoiser the labels it was trained with
        labels = torch.tensor(self.class_labels)[positions]
        inputs = (labels, torch.tensor([item.index for item in batch]), positions)
        x = torch.empty(0)
        for x in self.generator.denoise(*inputs, guidance):  # noqa: B007 (the last one is the sample)
            progress.update(len(batch) / self.generator.yields)
        samples = x.detach().clone()
        scores = None
        if guidance is not None:
            targets = to_device(positions, self.device)
            scores = self.steering.score(guidance.discriminator, samples, targets)
        rows = [
            {
                "class": self.classes[item.position],
                "index": item.index,
                "curriculum": curriculum,
                "seed": self.config.seed,
            }
            for item in batch
        ]
        locate = partial(self.generator.first_non_finite, *inputs, guidance)
        self.output.submit(samples, self.steering.samples_path(curriculum, number), rows, scores, locate)
        self.sampled += len(batch)

    def out_of_memory(self) -> str:
        """The sentence for a run that the memory cannot hold, with the batch size that would fit."""
        self.generator.release()
        available = available_memory(self.device)
        fits = self.bucket // 2 if available is None else self.generator.fitting_batch_size(available)
        return (
            out_of_memory(self.bucket, min(fits, self.bucket - 1)) + ", in another --out or with --overwrite"
        )

    def _plan(self) -> str:
        c, calls = self.config, sum(map(len, self.batches)) * self.config.num_sampling_steps
        guidance = "none"
        if self.guided:
            guidance = (
                f"{c.objective}, {c.guidance_scale:g} x {c.trust_radius}, jacobian {c.jacobian}, "
                f"t/T {c.guidance_window[0]:g} to {c.guidance_window[1]:g}"
            )
        images = f"{self.total} images ({len(self.classes)} classes x {c.ipc}) in {c.num_curricula} curricula"
        steps = f"{c.sampler} with {c.num_sampling_steps} steps, CFG {c.cfg_scale:g}, guidance: {guidance}"
        work = f"{calls} denoiser calls on {self.device}, about {self._estimate_seconds():.0f} s"
        return f"plan: {images}\n      {steps}\n      {work}"

    def _estimate_seconds(self) -> float:
        """Seconds for what is missing: one denoiser call and one classifier step are timed and multiplied."""
        c, calls = self.config, sum(map(len, self.missing.values())) * self.config.num_sampling_steps
        if not calls:
            return 0.0
        sampling = calls * self.generator.seconds_per_step(self.bucket, self.class_labels[0])
        trained = sum(bool(batches) for curriculum, batches in self.missing.items() if curriculum > 1)
        if not self.guided or not trained:
            return sampling
        channels, size = self.generator.seen_shape()
        network = self.steering.classifiers.build("estimate")
        batch = torch.zeros(c.discriminator_batch_size, channels, size, size, device=self.device)
        steps = trained * c.discriminator_steps + (c.real_steps if c.objective == "learnability" else 0)
        window = c.guidance_window[1] - c.guidance_window[0]
        overhead = 1.0 + window * (3.0 if c.jacobian == "full" else 0.3)
        return sampling * overhead + steps * time_call(lambda: network(batch).sum().backward(), self.device)

    def _done(self, curriculum: int, number: int, batch: list[Item]) -> bool:
        stored = read_tensors(self.steering.samples_path(curriculum, number))
        whole = stored is not None and len(stored["samples"]) == len(batch)
        return whole and self.manifest.holds([self._key(item) for item in batch])

    def _keys(self) -> list[tuple[str, int]]:
        """Every (class, index) in the order of the manifest."""
        return [self._key(item) for batches in self.batches for batch in batches for item in batch]

    def _key(self, item: Item) -> tuple[str, int]:
        return self.classes[item.position], item.index


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """The configuration as a later command can use it from any folder; the bundled names stay."""
    names = ("model", "real", "vae", "tiny_vae", "classes", "cache")
    given = {name: value for name in names if (value := getattr(config, name)) and value != DIGITS}
    exists = {name: os.path.isfile if name == "classes" else os.path.exists for name in given}
    paths = {name: os.path.abspath(value) for name, value in given.items() if exists[name](value)}
    return dataclasses.replace(config, **paths)


def keep_resolved(config: DistillConfig, out: Path, device: torch.device) -> DistillConfig:
    """The configuration with what the run in `out` resolved, on this kind of device, where it says auto."""
    stored = read_json(out / RUN_CONFIG) if (out / RUN_CONFIG).is_file() else None
    if stored is None or not is_record(stored) or str(stored.get("device")).partition(" ")[0] != device.type:
        return config
    auto = {name for name in RESOLVED if getattr(config, name) in ("auto", None)}
    values = {name: value for name, value in stored["config"].items() if name in auto}
    return resolve(DistillConfig, {**dataclasses.asdict(config), **values})


def warn_of_other_code(stored: dict[str, Any], record: dict[str, Any]) -> None:
    """Say so when a run is continued by another torch or another commit than it was started by."""

    def code(side: dict[str, Any]) -> str:
        versions = side.get("versions")
        torch_version = versions.get("torch") if isinstance(versions, dict) else None
        return f"torch {torch_version}, commit {side.get('commit')}"

    if code(stored) != code(record):
        print(
            f"warning: this run was started with {code(stored)} and goes on with {code(record)}; "
            "what is sampled now may differ in rounding",
            file=sys.stderr,
        )


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of the second of two calls."""
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started
