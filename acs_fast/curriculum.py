"""Distil: per curriculum train the discriminator on everything so far and sample; continue after any stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from acs_fast.augment import to_device
from acs_fast.config import DistillConfig, InputError
from acs_fast.data import DIGITS, select_classes
from acs_fast.environment import describe, resolve_device
from acs_fast.estimate import Plan, make_plan
from acs_fast.generator import ImageGenerator, is_out_of_memory, out_of_memory
from acs_fast.guidance import Guidance
from acs_fast.images import Images
from acs_fast.loader import resolve_loader
from acs_fast.manifest import Manifest, Rows
from acs_fast.models.checkpoint import read_config
from acs_fast.networks import checkpoint_path, dtype_name, resolve_dtype
from acs_fast.output import Output
from acs_fast.plan import Item, Layout, available_memory, curriculum_ranges, cut
from acs_fast.record import keep_resolved, warn_of_other_code, with_absolute_paths
from acs_fast.report import contact_sheet
from acs_fast.resume import Left, add_samples, find_missing, own_batches
from acs_fast.samples import Samples
from acs_fast.session import Session
from acs_fast.shards import SHARD
from acs_fast.steering import Steering
from acs_fast.stopping import RankLost, Stopped
from acs_fast.writer import RUN_CONFIG, check_same, claim, lock, sweep, write_atomic

BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def distill(config: DistillConfig, overwrite: bool = False, session: Session | None = None) -> Path:
    """Sample a distilled set by adversary-guided curriculum sampling; returns its run folder `config.out`.

    Writes `images/<class>/<index>.png` (or what `format` says), config.json, manifest.jsonl,
    contact_sheet.png and the state to continue from (discriminators/ and, until it ends, samples/). An
    interrupted run of the same configuration is continued and ends with the same bytes; a folder of another
    configuration raises InputError unless `overwrite`.

    session: the ranks that share the run, its log and its stop; default: this process alone.
    """
    session = session or Session()
    out, run, ranks = Path(config.out), None, session.ranks
    try:
        run = Run(config, overwrite, session)
        with contextlib.ExitStack() as stack:
            ranks.lead(lambda: stack.enter_context(lock(out)))
            run.start()
            started = time.perf_counter()
            run.sample()
            run.finish()
            run.note_end(time.perf_counter() - started)
    except Stopped as stopped:
        raise stop(stopped, session, run) from None
    except RuntimeError as error:
        died = isinstance(error, RankLost) and error.died
        if not died and (asked := session.asked()):  # and so was the rank that has ended
            raise stop(asked, session, run) from None
        session.event("error", text=str(error))
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the engine
        raise InputError(run.out_of_memory() if run else "the model does not fit into the memory") from error
    return out


def stop(stopped: Stopped, session: Session, run: Run | None) -> Stopped | RankLost:
    """What a run ends with that was asked to stop: by a scheduler, or by torchrun because a rank has died."""
    session.event("stop", signal=stopped.signum)
    if dead := session.ranks.leaving():
        return RankLost(dead)
    if not session.ranks.leads:
        return Stopped(stopped.signum)
    written = f"{run.written()} of {run.layout.total}" if run else "no"
    return Stopped(stopped.signum, f"{written} images are written")


class Run:
    """One distillation: the model, the classes, the curricula and the folder it is written to."""

    def __init__(self, config: DistillConfig, overwrite: bool = False, session: Session | None = None):
        self.session = session or Session()
        self.ranks, self.out, self.overwrite = self.session.ranks, Path(config.out), overwrite
        self.ranks.lead(lambda: str(resolve_device(config.device)))  # what is wrong everywhere is said once
        self.device = resolve_device(config.device)
        given, config = config, self.ranks.lead(lambda: self._resolved(config))
        names = [name for name in ("attention", "compile") if getattr(given, name) != getattr(config, name)]
        self.kept = [f"--{name} {getattr(config, name)}" for name in names]
        self.generator = ImageGenerator(config, self.device)
        self.config = config = self.generator.config
        shape = self.generator.shape
        self.classes, self.class_labels = select_classes(shape.class_names, config.classes)
        self.layout = Layout(len(self.classes), tuple(curriculum_ranges(config.ipc, config.num_curricula)))
        assert config.batch_size is not None
        sizes = [self.layout.size(i) for i in range(1, config.num_curricula + 1)]
        # the shape that batches are padded to hangs on no number of ranks: so do the bytes of the images
        self.bucket = max(len(part) for size in sizes for part in cut(size, config.batch_size))
        self.waited = 0.0  # seconds that sampling stood still for decoding and writing
        self.sampled = 0
        self.samples = Samples(self.out, self.layout, (shape.in_channels, shape.input_size, shape.input_size))
        self.images = Images(self.out, config.format)
        self.steering = Steering(config, self.generator, self.classes, self.samples, self.session, overwrite)

    def _resolved(self, config: DistillConfig) -> DistillConfig:
        """What all ranks must agree on: the settings that a run in the folder has resolved, loader, dtype."""
        if not self.overwrite:
            config = keep_resolved(config, self.out, self.device)
        if config.real != DIGITS and config.guidance_scale > 0:  # else nothing is loaded
            config = dataclasses.replace(config, loader=resolve_loader(config.loader))
        if self.ranks.num_ranks > 1:
            shape = read_config(checkpoint_path(config.model))  # the others find what this downloads
            select_classes(shape.class_names, config.classes)
            dtype = resolve_dtype(config.dtype, self.device, shape)
            config = dataclasses.replace(config, dtype=dtype_name(dtype))
        return config

    def start(self) -> None:
        """Take the run folder, find what is missing in it, make ready for it, and print the plan."""
        measured = self._choose()
        stored = self.ranks.lead(self._claim)
        self.left = self.ranks.lead(lambda: self._find_left(mend=True))
        self.samples.files = self.left.files
        self.batches = {
            number: own_batches(numbers, self.ranks, self.bucket)
            for number, numbers in self.left.missing.items()
        }
        self.manifest = Manifest(self.out, self.images, self.ranks.rank)
        left, total = self.left.images, self.layout.total
        self.session.event("start", num_ranks=self.ranks.num_ranks, missing=left, total=total)
        if left:
            if self.ranks.leads:
                warn_of_other_code(stored, self._record)
                print(*filter(None, [measured]), end="\n" if measured else "", flush=True)
            self.steering.prepare()
        seconds = self._print_plan().seconds
        parts = {"sampling": seconds.sampling, "discriminators": seconds.training, "total": seconds.total}
        self.session.event("plan", images=left, **parts)

    def show_plan(self) -> None:
        """Print the plan of what is left, and write nothing."""
        self._choose()
        self.ranks.lead(self._check_same)
        self.left = self.ranks.lead(lambda: self._find_left(mend=False))
        self._print_plan()

    def _print_plan(self) -> Plan:
        """The plan, from a few steps timed on every rank at once, as the run will be."""
        if self.left.images:
            self.generator.prepare(self.bucket, self.class_labels)
        plan = make_plan(
            self.config,
            self.generator,
            self.layout,
            bucket=self.bucket,
            num_ranks=self.ranks.num_ranks,
            missing={number: len(numbers) for number, numbers in self.left.missing.items()},
            trained=len(self.left.untrained),
            trains_real=self.left.trains_real,
            out=self.out,
        )
        if self.ranks.leads:
            print(plan.text(), flush=True)
            for warning in plan.warnings():
                print(f"warning: {warning}", file=sys.stderr)
        return plan

    def _check_same(self) -> None:
        if not self.overwrite and (self.out / RUN_CONFIG).is_file():
            check_same(self.out, self._record)

    def _choose(self) -> str:
        """Let rank 0 measure what is measured, and every rank run as it found."""
        measured = self.ranks.lead(self._measured)
        config = self.ranks.lead(lambda: self.generator.config)
        if not self.ranks.leads:
            self.generator.config = config
            self.generator.choose(self.bucket)
        self.config = self.generator.config
        return measured

    def _measured(self) -> str:
        try:
            return self.generator.choose(self.bucket)
        except InputError as error:
            if not self.kept:
                raise
            raise InputError(
                f"{self.out} was begun with {' '.join(self.kept)}, which does not go here ({error}); "
                "continue it where it was begun or give another --out"
            ) from error

    def _claim(self) -> dict[str, Any]:
        """The run's record, that of its start; what cannot run is refused before anything is written."""
        if self.overwrite or not (self.out / RUN_CONFIG).is_file():
            self.generator.check_memory(self.bucket, len(self.classes))
        return claim(self.out, self._record, self.overwrite)

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        """What the folder is to say of the run; reads all of the model for its digest."""
        return {
            "config": dataclasses.asdict(with_absolute_paths(self.config)),
            "classes": list(self.classes),
            "class_labels": self.class_labels,
            **self.generator.record(),
            **describe(self.device),
        }

    def _find_left(self, mend: bool) -> Left:
        """What the folder lacks; mend: remove unfinished files and rows of images that are not there."""
        if mend:
            sweep(self.out)
        rows = self._rows()
        if not mend and self.overwrite:
            rows.places[:] = -1
        missing = find_missing(rows, self.images, self.layout)
        if mend:
            rows.merge()
        c, steering = self.config, self.steering
        needed = add_samples(
            missing, self.samples.scan(),
            guided=c.guided, keep=c.keep_latents, repulsion=c.repulsion > 0,
            is_ready=steering.is_ready,
        )  # fmt: skip
        untrained, trains_real = steering.untrained(missing), steering.trains_real(missing)
        return Left(missing, needed, self.samples.files, untrained, trains_real)

    def sample(self) -> None:
        """Bring every curriculum to its end; decoding and writing go on beside the next batch."""
        decode, to_uint8 = self.generator.decode, self.generator.ops.to_uint8
        with Output(self.manifest, self.device, decode, to_uint8) as self.output:
            for curriculum in range(1, self.config.num_curricula + 1):
                self.sample_curriculum(curriculum)
                if self.config.format == "wds":
                    self.pack(curriculum)
            self.waited = self.output.waited

    def sample_curriculum(self, curriculum: int) -> None:
        """Bring curriculum 1..N to its end: train its discriminator if guided, sample what is missing."""
        if not len(self.left.missing[curriculum]):
            return
        guided = self.config.guided and curriculum > 1
        guidance = self.steering.guidance(curriculum) if guided else None
        batches, started = self.batches[curriculum], time.perf_counter()
        images = sum(map(len, batches))
        title = f"curriculum {curriculum}/{self.config.num_curricula} sample"
        title += f" (rank 0 of {self.ranks.num_ranks})" if self.ranks.num_ranks > 1 else ""
        quiet = None if self.ranks.leads else True
        with tqdm(total=images, desc=title, unit="image", disable=quiet, bar_format=BAR) as progress:
            for numbers in batches:
                self.session.check()
                self._sample_batch(curriculum, numbers, guidance, progress)
            self.output.flush()  # the next discriminator is trained on what lies on the disk
        self.samples.add(curriculum, batches if self.left.needed[curriculum] else [], self.ranks)
        seconds = round(time.perf_counter() - started, 3)
        self.session.event("curriculum", number=curriculum, images=images, seconds=seconds)

    def pack(self, curriculum: int) -> None:
        """Move a finished curriculum's images into shards: each rank its own, those that are there stay."""
        self.ranks.barrier()  # the images of all ranks are on disk
        for number, numbers in enumerate(cut(self.layout.size(curriculum), SHARD)):
            if number % self.ranks.num_ranks == self.ranks.rank:
                items = [self.layout.item(curriculum, place) for place in numbers]
                keys = [(self.classes[item.position], item.index) for item in items]
                self.images.pack(curriculum, number, keys)

    def finish(self) -> None:
        """Put the manifest in order, keep or remove the samples, draw the contact sheet last."""
        self.ranks.barrier()
        if self.config.keep_latents:
            self.samples.keep(self.ranks)
        self.ranks.lead(self._finish)

    def _finish(self) -> None:
        self._rows().merge()
        if not self.config.keep_latents:
            self.samples.remove()
        self.images.sweep()
        sheet = contact_sheet(self.images, self.classes, self.layout.ranges)
        write_atomic(self.out / "contact_sheet.png", sheet)

    def written(self) -> int:
        """Images that are written, of all ranks, as far as they are done."""
        return int((self._rows().places[:, 0] >= 0).sum())

    def _sample_batch(
        self, curriculum: int, numbers: range, guidance: Guidance | None, progress: tqdm[Any]
    ) -> None:
        started, batch = time.perf_counter(), [self.layout.item(curriculum, number) for number in numbers]
        positions = torch.tensor([item.position for item in batch])
        # the discriminator knows positions in the run's list, the denoiser the labels it was trained with
        labels = torch.tensor(self.class_labels)[positions]
        inputs = (labels, torch.tensor([item.index for item in batch]), positions)
        x = torch.empty(0)
        for x in self.generator.denoise(*inputs, guidance):  # noqa: B007 (the last one is the sample)
            progress.update(len(batch) / self.generator.yields)
        # padded as the engine's batch is: so no byte hangs on how many images came along
        samples = torch.zeros(self.bucket, *x.shape[1:], dtype=x.dtype, device=x.device)
        samples[: len(batch)] = x.detach()
        scores = None
        if guidance is not None:
            targets = to_device(F.pad(positions, [0, self.bucket - len(batch)]), self.device)
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
        locate = functools.partial(self.generator.first_non_finite, *inputs, guidance)
        path = self.samples.path(curriculum, numbers) if self.left.needed[curriculum] else None
        self.output.submit(samples, path, rows, scores, locate)
        self.sampled += len(batch)
        seconds = round(time.perf_counter() - started, 3)
        self.session.event("batch", curriculum=curriculum, images=len(batch), seconds=seconds)

    def _rows(self) -> Rows:
        """The rows that lie in the folder, by the images' numbers."""
        positions = {name: position for position, name in enumerate(self.classes)}

        def order(name: str, index: int) -> int | None:
            known = name in positions and 0 <= index < self.config.ipc
            return self.layout.number(Item(positions[name], index)) if known else None

        return Rows(self.out, order, self.layout.total, self.ranks.num_ranks)

    def note_end(self, seconds: float) -> None:
        """Say what was done, and what sampling and training waited for."""
        real = self.steering.real
        self.session.event(
            "wait",
            writer_seconds=round(self.waited, 3),
            real_seconds=0.0 if real is None else round(real.waited, 3),
        )
        self.session.event("end", images=self.sampled, seconds=round(seconds, 3))
        if not self.ranks.leads:
            return
        waited = f", {self.waited:.1f} s of it waiting for files" if self.waited >= 0.1 else ""
        if real is not None and real.waited >= 0.1:
            waited += f", {real.waited:.1f} s waiting for real images"
        now = f"{self.left.images} of them sampled now"
        print(f"{self.out}: {self.layout.total} images, {now}, in {seconds:.1f} s{waited}")

    def out_of_memory(self) -> str:
        """The sentence for a run that the memory cannot hold, with the batch size that would fit."""
        self.generator.release()
        available = available_memory(self.device)
        fits = self.bucket // 2 if available is None else self.generator.fitting_batch_size(available)
        return (
            out_of_memory(self.bucket, min(fits, self.bucket - 1)) + ", in another --out or with --overwrite"
        )
