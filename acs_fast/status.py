"""`acs-fast status`: what a run folder holds, its pace, what is missing or damaged; it writes nothing."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from acs_fast.config import DistillConfig, InputError, resolve
from acs_fast.images import Images
from acs_fast.log import Pace
from acs_fast.manifest import Rows
from acs_fast.plan import Layout, curriculum_ranges
from acs_fast.writer import LOCK, MANIFEST, RUN_CONFIG, is_record, read_json

NAMED = 5  # images that are named; the others are counted
TRIES, PAUSE = 100, 0.05  # a folder that changes while it is read is read again, after so many seconds


@dataclass(frozen=True)
class Part:
    """One curriculum. discriminator: whether the one that steers it is trained; None where none steers it."""

    curriculum: int
    images: int
    written: int
    discriminator: bool | None


@dataclass(frozen=True)
class Some:
    """How many images, and the first of them as <class>/<index>."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """What `acs-fast status` tells of a run.

    finished: distill came to its end. writing: a process holds the folder now; None where that cannot be
    asked. written: images that have a row and a file; missing: the others; damaged: those written whose file
    is not the one its row names, None without `--verify`. rate: images/s, None before any batch; eta: seconds
    until all are written. waited: seconds that sampling stood still for the writer, of all processes.
    last_event: the wall clock's time of the last one of the log files.
    """

    run: str
    configuration: str
    finished: bool
    writing: bool | None
    images: int
    written: int
    curricula: tuple[Part, ...]
    missing: Some
    damaged: Some | None
    rate: float | None
    eta: float | None
    waited: float
    last_event: str | None

    @property
    def whole(self) -> bool:
        """Whether distill came to its end and nothing is known to be missing or damaged."""
        return self.finished and not self.missing.count and not (self.damaged and self.damaged.count)


def status(run: str | Path, verify: bool = False) -> Status:
    """What the run folder `run` holds; `verify` reads every image, with a progress bar on stderr.

    A process may be writing there, or one may have been killed at any moment. InputError for what is no run
    folder.
    """
    out = Path(run)
    found = settled(out, lambda: Found(out, verify))
    written = found.written()
    damaged = found.damaged(written) if verify else None
    pace = Pace(out)
    missing = len(written) - int(written.sum())
    finished = (out / "contact_sheet.png").is_file()
    return Status(
        run=str(out),
        configuration=one_line(found.record, found.config),
        finished=finished,
        writing=is_held(out),
        images=len(written),
        written=len(written) - missing,
        curricula=tuple(found.parts(written)),
        missing=found.some(~written),
        damaged=None if damaged is None else found.some(damaged),
        rate=pace.rate,
        eta=None if finished or not pace.rate else missing / pace.rate,
        waited=pace.waited,
        last_event=pace.last_event,
    )


class Found:
    """A run's record and rows as they are at one moment."""

    def __init__(self, out: Path, verify: bool):
        self.out = out
        self.record, self.config = read_record(out)
        self.classes = [str(name) for name in self.record["classes"]]
        ranges = curriculum_ranges(self.config.ipc, self.config.num_curricula)
        self.layout = Layout(len(self.classes), tuple(ranges))
        self.images = Images(out, self.config.format)
        self.rows = Rows(out, self._numbering(), self.layout.total)
        # the first result is asked for here: then the files of the rows are open, and stay what they are
        results = self.rows.verify(self.images) if verify else iter(())
        self._results = itertools.chain(list(itertools.islice(results, 1)), results)

    def _numbering(self) -> Callable[[str, int], int | None]:
        """`Layout.number` by class and index, from tables; None for an image that is not of the run."""
        positions = {name: position for position, name in enumerate(self.classes)}
        numbers = [
            (self.layout.start(curriculum) + place, len(indices))
            for curriculum, indices in enumerate(self.layout.ranges, start=1)
            for place in range(len(indices))
        ]

        def number(name: str, index: int) -> int | None:
            position = positions.get(name)
            if position is None or not 0 <= index < len(numbers):
                return None
            first, size = numbers[index]
            return first + position * size

        return number

    def written(self) -> np.ndarray:
        """bool [images]: which have a row and a file."""
        written = self.rows.places[:, 0] >= 0
        names = [self.images.path((self.classes[0], index)).name for index in range(self.config.ipc)]
        for position, name in enumerate(self.classes):  # a listing is quicker than a question a file
            listed = listing(self.images.path((name, 0)).parent)
            exists = np.array([file in listed for file in names])
            for curriculum, indices in enumerate(self.layout.ranges, start=1):
                start = self.layout.start(curriculum) + position * len(indices)
                part = written[start : start + len(indices)]
                for place in np.nonzero(part & ~exists[indices.start : indices.stop])[0].tolist():
                    part[place] = self.images.holds((name, indices[place]))  # in a shard, if at all
        return written

    def damaged(self, written: np.ndarray) -> np.ndarray:
        """bool [images]: which are written, and not with the bytes that their rows name."""
        damaged = np.zeros(len(written), bool)
        total = int((self.rows.places[:, 0] >= 0).sum())
        for number, same in tqdm(self._results, total=total, desc="verify", unit="image", disable=None):
            damaged[number] = not same
        return damaged & written

    def parts(self, written: np.ndarray) -> Iterator[Part]:
        """The curricula."""
        for curriculum in range(1, len(self.layout.ranges) + 1):
            start, size = self.layout.start(curriculum), self.layout.size(curriculum)
            path = self.out / "discriminators" / f"{curriculum}.safetensors"
            trained = path.is_file() if self.config.guidance_scale > 0 and curriculum > 1 else None
            yield Part(curriculum, size, int(written[start : start + size].sum()), trained)

    def some(self, which: np.ndarray) -> Some:
        """The images of a bool [images]."""
        numbers = np.nonzero(which)[0]
        return Some(len(numbers), tuple(self._name(number) for number in numbers[:NAMED].tolist()))

    def _name(self, number: int) -> str:
        curricula = range(len(self.layout.ranges), 0, -1)
        curriculum = next(c for c in curricula if self.layout.start(c) <= number)
        item = self.layout.item(curriculum, number - self.layout.start(curriculum))
        return f"{self.classes[item.position]}/{item.index}"


def listing(folder: Path) -> frozenset[str]:
    """The names in a folder; none where there is no folder."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def read_record(out: Path) -> tuple[dict[str, Any], DistillConfig]:
    """What `distill` wrote of the run, and its settings; InputError where it wrote nothing."""
    path = out / RUN_CONFIG
    if not path.is_file():
        raise InputError(f"{out} is no run folder: there is no {path}")
    record = read_json(path)
    if not is_record(record) or not isinstance(record.get("classes"), list) or not record["classes"]:
        raise InputError(f"{path} is not that of a run; name a folder that distill wrote")
    try:
        return record, resolve(DistillConfig, record["config"])
    except InputError as error:
        raise InputError(f"{path} is not that of a run of this version: {error}") from error


def settled(out: Path, look: Callable[[], Found]) -> Found:
    """What `look` finds while no process merges the manifest or begins the run anew; else it looks again."""
    for _ in range(TRIES):
        before = stamps(out)
        try:
            found = look()
        except FileNotFoundError:  # rows that were merged between their folder's listing and their reading
            found = None
        except (ValueError, KeyError, TypeError):  # or those of one file read by the places of another
            if stamps(out) == before:
                raise
            found = None
        if found is not None and stamps(out) == before:
            return found
        time.sleep(PAUSE)
    raise InputError(f"{out} changes faster than it can be read; try again")


def stamps(out: Path) -> list[tuple[int, ...]]:
    """What differs once the record or the merged rows are other ones."""
    found: list[tuple[int, ...]] = []
    for path in (out / RUN_CONFIG, out / MANIFEST):
        try:
            at = path.stat()
            found.append((at.st_ino, at.st_mtime_ns, at.st_size))
        except FileNotFoundError:
            found.append(())
    return found


def is_held(out: Path) -> bool | None:
    """Whether a process holds the run folder's lock; None where the file system does not say."""
    try:
        with open(out / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # of others who ask, none is in the way
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def one_line(record: dict[str, Any], config: DistillConfig) -> str:
    """The configuration in a line."""
    c, guidance = config, "no guidance"
    if c.guidance_scale > 0:
        guidance = f"{c.objective} {c.guidance_scale:g} x {c.trust_radius}"
    images = f"{len(record['classes'])} classes x {c.ipc} in {c.num_curricula} curricula"
    steps = f"{c.sampler} with {c.num_sampling_steps} steps, CFG {c.cfg_scale:g}"
    return f"{c.model}, {images}, {guidance}, {steps}, {c.format}, seed {c.seed}, {record.get('device')}"


def as_json(found: Status) -> str:
    """The status as one JSON object."""
    return json.dumps({**dataclasses.asdict(found), "whole": found.whole}, indent=2)


def as_text(found: Status) -> str:
    """The status as a person reads it."""
    state = "finished" if found.finished else "not finished"
    state += {True: ", a process is writing to it now", False: "", None: ", its lock cannot be asked"}[
        found.writing
    ]
    lines = [
        f"{found.run}: {found.written} of {found.images} images are written; {state}",
        f"  {found.configuration}",
    ]
    width = len(str(found.images))
    for part in found.curricula:
        trained = {None: "", True: "  discriminator trained", False: "  discriminator not trained"}
        lines.append(
            f"  curriculum {part.curriculum}: {part.written:{width}} of {part.images:{width}}"
            f"{trained[part.discriminator]}"
        )
    if found.rate is not None:
        left = "" if found.eta is None else f", {timedelta(seconds=round(found.eta))} to go"
        lines.append(f"  {found.rate:.3g} images/s over the last ten minutes of batches{left}")
    if found.last_event:
        lines.append(f"  last event {found.last_event}; {found.waited:.1f} s waited for the writer")
    for name, some in (("missing", found.missing), ("damaged", found.damaged)):
        if some is not None and (some.count or name == "damaged"):
            more = ", ..." if some.count > len(some.first) else ""
            lines.append(
                f"  {name}: {some.count}" + (f" ({', '.join(some.first)}{more})" if some.count else "")
            )
    if not found.whole and not found.writing:
        lines.append("  run the same command again to make what is missing or damaged")
    return "\n".join(lines)
