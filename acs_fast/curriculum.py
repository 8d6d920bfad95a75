"""Distil: per curriculum train the discriminator on everything so far and sample; continue after any stop."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.config import DistillConfig, InputError
from acs_fast.data import (
    ASSETS,
    DIGITS,
    ImageSet,
    check_classes,
    load_images,
    read_class_list,
    to_model_range,
    to_uint8,
)
from acs_fast.discriminator import Classifiers, score
from acs_fast.engine import StepEngine
from acs_fast.environment import describe, resolve_device
from acs_fast.guidance import Guidance
from acs_fast.models.dit import DiT, load_checkpoint
from acs_fast.ops import parse_choice, select
from acs_fast.report import contact_sheet
from acs_fast.sampler import denoise
from acs_fast.writer import Manifest, claim, lock, read_tensors, write_atomic, write_tensors

BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


@dataclass(frozen=True)
class Item:
    """One image of the distilled set: the position of its class in the run's list, its index in the class."""

    position: int
    index: int


def curriculum_ranges(ipc: int, num_curricula: int) -> list[range]:
    """The indices of each curriculum: equal parts, the remainder to the last ones (METHOD.md section 2)."""
    size, remainder = divmod(ipc, num_curricula)
    sizes = [size + (i >= num_curricula - remainder) for i in range(num_curricula)]
    return [range(a, b) for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def curriculum_batches(num_classes: int, indices: range, batch_size: int) -> list[list[Item]]:
    """A curriculum's images class by class, cut into batches; one configuration always gives the same cut."""
    items = [Item(position, index) for position in range(num_classes) for index in indices]
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def distill(config: DistillConfig, overwrite: bool = False) -> Path:
    """Sample a distilled set by adversary-guided curriculum sampling; returns its run folder `config.out`.

    Writes images/<class>/<index>.png, config.json, manifest.jsonl, contact_sheet.png and the state to
    continue from (samples/, discriminators/). An interrupted run of the same configuration is continued and
    ends with the same bytes; a folder of another configuration raises InputError unless `overwrite`.
    """
    run, out = Run(config, overwrite), Path(config.out)
    with lock(out):
        run.start()
        started = time.perf_counter()
        for curriculum in range(1, config.num_curricula + 1):
            run.sample_curriculum(curriculum)
        run.finish()
        seconds = time.perf_counter() - started
    print(f"{out}: {run.total} images, {run.sampled} of them sampled now, in {seconds:.1f} s")
    return out


class Run:
    """One distillation: the model, the classes, the curricula and the folder it is written to."""

    def __init__(self, config: DistillConfig, overwrite: bool = False):
        self.out, self.overwrite = Path(config.out), overwrite
        self.device = resolve_device(config.device)
        self.ops = select(parse_choice(config.backend), self.device)
        self.engine: StepEngine | None = None  # made by the first batch that needs it
        self.checkpoint = ASSETS / "digits-dit.safetensors" if config.model == DIGITS else Path(config.model)
        self.model = load_model(self.checkpoint, config).to(self.device)
        if config.clip_denoised is None:
            config = dataclasses.replace(config, clip_denoised=samples_pixels(self.model))
        self.config = config
        self.classes, labels = select_classes(self.model, config.classes)
        self.class_labels = torch.tensor(labels, device=self.device)  # the model's label of each position
        self.ranges = curriculum_ranges(config.ipc, config.num_curricula)
        self.batches = [
            curriculum_batches(len(self.classes), part, config.batch_size) for part in self.ranges
        ]
        self.total, self.sampled = config.ipc * len(self.classes), 0
        self.guided = config.guidance_scale > 0 and config.num_curricula > 1
        shape = self.model.config
        self.classifiers = Classifiers(
            config,
            shape.in_channels,
            shape.input_size,
            len(self.classes),
            self.device,
            self.out / "discriminators",
        )
        # the real images now, if they are needed: what is missing there is refused before anything is written
        learnability = self.guided and config.objective == "learnability"
        needed = learnability and (overwrite or not self.classifiers.is_trained("real"))
        self.real = self._load_real() if needed else None

    def start(self) -> None:
        """Take the run folder, find what is missing in it, and print the plan."""
        record = {
            "config": dataclasses.asdict(with_absolute_paths(self.config)),
            "model_sha256": hashlib.sha256(self.checkpoint.read_bytes()).hexdigest(),
            "classes": list(self.classes),
            "class_labels": self.class_labels.tolist(),
            "ops": {"sources": dict(self.ops.sources)},
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
        print(self._plan(), flush=True)

    def sample_curriculum(self, curriculum: int) -> None:
        """Bring curriculum 1..N to its end: train its discriminator if guided, sample what is missing."""
        missing = self.missing[curriculum]
        if not missing:
            return
        guidance = self._guidance(curriculum) if self.guided and curriculum > 1 else None
        images = sum(len(batch) for _, batch in missing)
        title = f"curriculum {curriculum}/{self.config.num_curricula} sample"
        with tqdm(total=images, desc=title, unit="image", disable=None, bar_format=BAR) as progress:
            for number, batch in missing:
                self._sample_batch(curriculum, number, batch, guidance, progress)

    def finish(self) -> None:
        """Put the manifest in order and draw the contact sheet."""
        self.manifest.rewrite(self._keys())
        sheet = contact_sheet(self.out / "images", self.classes, self.ranges)
        write_atomic(self.out / "contact_sheet.png", sheet)

    def _sample_batch(
        self, curriculum: int, number: int, batch: list[Item], guidance: Guidance | None, progress: tqdm[Any]
    ) -> None:
        positions = torch.tensor([item.position for item in batch], device=self.device)
        indices = torch.tensor([item.index for item in batch], device=self.device)
        x = torch.empty(0)
        # the discriminator knows positions in the run's list, the denoiser the labels it was trained with
        steps = self._denoise(positions, indices, guidance)
        for x in steps:  # noqa: B007 (the last one is the sample)
            progress.update(len(batch) / self.config.num_sampling_steps)
        finite = torch.isfinite(x).flatten(1).all(dim=1)
        if not finite.all():
            name, index = self._key(batch[int(finite.int().argmin())])
            raise InputError(
                f"class {name} index {index} of curriculum {curriculum} is not finite; check the model's "
                "weights or lower --guidance-scale"
            )
        write_tensors(self._samples_path(curriculum, number), {"samples": x})
        right, loss = [None] * len(batch), [None] * len(batch)
        if guidance is not None:
            right, loss = (values.tolist() for values in score(guidance.discriminator, x, positions))
        rows = [
            {
                "class": self.classes[item.position],
                "index": item.index,
                "curriculum": curriculum,
                "seed": self.config.seed,
                "discriminator_correct": correct,
                "discriminator_loss": value,
            }
            for item, correct, value in zip(batch, right, loss, strict=True)
        ]
        self.manifest.append(to_uint8(x).cpu(), rows)
        self.sampled += len(batch)

    def _denoise(self, positions: Tensor, indices: Tensor, guidance: Guidance | None) -> Iterator[Tensor]:
        """The plain, eager sampler where every op is the reference's, else the engine over the ops."""
        labels = self.class_labels[positions]
        if set(self.ops.sources.values()) == {"reference"}:
            return denoise(self.model, labels, indices, self.config, guidance, positions)
        if self.engine is None:
            self.engine = StepEngine(self.model, self.config, self.ops, self.device)
        if self.engine.guidance is not guidance:
            self.engine.load(guidance)
        return self.engine.denoise(labels, indices, positions)

    def _guidance(self, curriculum: int) -> Guidance:
        c = self.config
        discriminator, real_classifier = self._discriminator(curriculum), None
        if c.objective == "learnability":
            title = f"curriculum {curriculum}/{c.num_curricula} real classifier"
            real_classifier = self.classifiers.get("real", title, self._take_real, c.real_steps)
        return Guidance(
            objective=c.objective,
            discriminator=discriminator,
            real_classifier=real_classifier,
            omega=c.omega,
            scale=c.guidance_scale,
            trust_radius=c.trust_radius,
            window=c.guidance_window,
            jacobian=c.jacobian,
        )

    def _discriminator(self, curriculum: int) -> nn.Module:
        """f_i of a curriculum; a warm one starts from the one before, which is trained anew if it is lost."""
        c = self.config
        warm = c.discriminator_init == "warm" and curriculum > 2
        return self.classifiers.get(
            str(curriculum),
            f"curriculum {curriculum}/{c.num_curricula} discriminator",
            lambda: self._sampled_before(curriculum),
            c.discriminator_steps,
            (lambda: self._discriminator(curriculum - 1)) if warm else None,
        )

    def _load_real(self) -> ImageSet:
        shape = self.model.config
        return load_images(self.config.real, "train", self.classes, shape.input_size, shape.in_channels)

    def _take_real(self) -> tuple[Tensor, Tensor]:
        """The real images and their labels, once: afterwards they are not kept."""
        real, self.real = self.real or self._load_real(), None
        return to_model_range(real.images).to(self.device), real.labels.to(self.device)

    def _sampled_before(self, curriculum: int) -> tuple[Tensor, Tensor]:
        """The samples of all earlier curricula and the positions of their classes."""
        samples, positions = [], []
        for earlier, batches in enumerate(self.batches[: curriculum - 1], start=1):
            for number, batch in enumerate(batches):
                path = self._samples_path(earlier, number)
                stored = read_tensors(path)
                if stored is None:
                    raise InputError(f"{path} is gone or damaged; run the command again to make it anew")
                samples.append(stored["samples"])
                positions += [item.position for item in batch]
        return torch.cat(samples).to(self.device), torch.tensor(positions, device=self.device)

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
        c, shape = self.config, self.model.config
        sizes = [len(batch) for batches in self.missing.values() for _, batch in batches]
        if not sizes:
            return 0.0
        rows = max(sizes)
        x = torch.zeros(2 * rows, shape.in_channels, shape.input_size, shape.input_size, device=self.device)
        labels = torch.zeros(2 * rows, dtype=torch.long, device=self.device)
        sampling = time_call(lambda: self.model(x, labels, labels)) * c.num_sampling_steps * sum(sizes) / rows
        trained = sum(bool(batches) for curriculum, batches in self.missing.items() if curriculum > 1)
        if not self.guided or not trained:
            return sampling
        network, batch = self.classifiers.build("estimate"), x[: c.discriminator_batch_size]
        steps = trained * c.discriminator_steps + (c.real_steps if c.objective == "learnability" else 0)
        window = c.guidance_window[1] - c.guidance_window[0]
        overhead = 1.0 + window * (3.0 if c.jacobian == "full" else 0.3)
        return sampling * overhead + steps * time_call(lambda: network(batch).sum().backward())

    def _done(self, curriculum: int, number: int, batch: list[Item]) -> bool:
        stored = read_tensors(self._samples_path(curriculum, number))
        return stored is not None and self.manifest.holds([self._key(item) for item in batch])

    def _keys(self) -> list[tuple[str, int]]:
        """Every (class, index) in the order of the manifest."""
        return [self._key(item) for batches in self.batches for batch in batches for item in batch]

    def _key(self, item: Item) -> tuple[str, int]:
        return self.classes[item.position], item.index

    def _samples_path(self, curriculum: int, number: int) -> Path:
        return self.out / "samples" / f"{curriculum}-{number}.safetensors"


def load_model(checkpoint: Path, config: DistillConfig) -> DiT:
    """The denoiser of a run, or InputError for one that this configuration cannot sample images from."""
    model = load_checkpoint(checkpoint)
    channels = model.config.in_channels
    if not samples_pixels(model):
        raise InputError(
            f"{checkpoint} samples {channels}-channel latents, which need a VAE to become images; "
            "this version distils pixel models (1 or 3 channels)"
        )
    if config.variance == "learned_range" and not model.config.learn_sigma:
        raise InputError("--variance learned_range: this model has no variance channels; use fixed_small")
    if config.cfg_channels is not None and not 1 <= config.cfg_channels <= channels:
        raise InputError(f"--cfg-channels is {config.cfg_channels}, this model has {channels}")
    return model


def samples_pixels(model: DiT) -> bool:
    """Whether the model's samples are images in [-1, 1], not latents of a VAE."""
    return model.config.in_channels in (1, 3)


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """The configuration as a later command can use it from any folder; the bundled names stay."""
    model, real = (path if path == DIGITS else os.path.abspath(path) for path in (config.model, config.real))
    classes = config.classes and os.path.abspath(config.classes)
    return dataclasses.replace(config, model=model, real=real, classes=classes)


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


def select_classes(model: DiT, path: str | None) -> tuple[tuple[str, ...], list[int]]:
    """The run's class folders and the model's label of each: from a class list, or the model's classes."""
    known = model.config.classes or tuple(str(label) for label in range(model.config.num_classes))
    names = check_classes(known) if path is None else read_class_list(Path(path))
    for name in names:
        if name not in known:
            listed = " ".join(known[:10]) + (" ..." if len(known) > 10 else "")
            raise InputError(f"the model has no class {name!r}; known: {listed}")
    return names, [known.index(name) for name in names]


def time_call(call: Callable[[], object]) -> float:
    """Wall-clock seconds of the second of two calls."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
