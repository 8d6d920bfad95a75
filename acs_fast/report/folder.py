"""What a run folder says of its run besides the results: record, times, manifest, pictures."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from acs_fast.config import InputError
from acs_fast.images import CODECS, Images
from acs_fast.log import amount, read_events
from acs_fast.manifest import read_rows
from acs_fast.report.results import Results, read_results
from acs_fast.writer import RUN_CONFIG, is_record, read_json

LARGE = 3_000_000  # bytes: a contact sheet of more is put into the page as a smaller JPEG
LARGE_PIXELS = 8_000_000  # then of at most so many pixels
SMALL = 32  # px: images up to this edge were enlarged pixel by pixel for the contact sheet


@dataclass
class Start:
    """One start of `distill` on rank 0, by its log: what was expected of it and what it took, in seconds.

    expected: {"sampling", "discriminators", "total"} or empty; ended: "finished" or what else came.
    """

    time: str
    num_ranks: int
    missing: int
    begun: float
    expected: dict[str, float] = field(default_factory=dict)
    sampling: float = 0.0
    discriminators: float = 0.0
    total: float = 0.0
    images: int = 0
    ended: str = "no end in the log: killed, or still running"


@dataclass(frozen=True)
class Losses:
    """Some rows of the manifest: images, bytes, the discriminators' loss and verdict on those they saw."""

    images: int
    bytes: int
    losses: tuple[float, ...]
    right: int

    @property
    def mean(self) -> float:
        """Mean loss; NaN where no discriminator saw an image."""
        return statistics.fmean(self.losses) if self.losses else math.nan


@dataclass(frozen=True)
class Summary:
    """The manifest in numbers; repeated: SHA-256 of images that are there more than once, with the images."""

    whole: Losses
    curricula: dict[int, Losses]
    classes: dict[str, Losses]
    repeated: list[list[str]]


@dataclass(frozen=True)
class RunFolder:
    """A run as its page shows it."""

    path: Path
    record: dict[str, Any]
    config: dict[str, Any]
    classes: tuple[str, ...]
    results: Results
    starts: list[Start]
    summary: Summary | None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def total(self) -> int:
        """Images that the run is to have; 0 where its record does not say."""
        ipc = self.config.get("ipc")
        return ipc * len(self.classes) if isinstance(ipc, int) else 0


def read_folder(path: Path) -> RunFolder:
    """The run in a folder; InputError for what is none and for damaged results."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; name a run folder that distill wrote")
    file = path / RUN_CONFIG
    if not file.is_file():
        raise InputError(f"{path} is no run folder: there is no {file}; name a folder that distill wrote")
    record = read_json(file)
    if not is_record(record) or not isinstance(record.get("classes"), list) or not record["classes"]:
        raise InputError(f"{file} is not that of a run; name a folder that distill wrote")
    classes = tuple(map(str, record["classes"]))
    return RunFolder(
        path=path,
        record=record,
        config=record["config"],
        classes=classes,
        results=read_results(path),
        starts=read_starts(path),
        summary=summarise(path, record["config"].get("format"), classes),
    )


def read_starts(path: Path) -> list[Start]:
    """The starts in the log of rank 0."""
    found: list[Start] = []
    for event in read_events(path):
        if event["rank"] != 0:
            continue
        kind = event["event"]
        if kind == "start":
            ranks, left = (int(amount(event, name)) for name in ("num_ranks", "missing"))
            found.append(Start(event["time"], ranks, left, event["since"]))
        if not found:
            continue
        start = found[-1]
        start.total = max(0.0, event["since"] - start.begun)
        if kind == "plan":
            parts = ("sampling", "discriminators", "total")
            start.expected = {part: amount(event, part) for part in parts}
            start.begun = event["since"]  # its steps are timed before it, and are no part of what it expects
        elif kind == "curriculum":
            start.sampling += amount(event, "seconds")
        elif kind == "discriminator":
            start.discriminators += amount(event, "seconds")
        elif kind == "batch":
            start.images += int(amount(event, "images"))
        elif kind in ("end", "stop", "error"):
            start.total = amount(event, "seconds") if kind == "end" else start.total
            start.ended = {"end": "finished", "stop": "stopped", "error": "ended by an error"}[kind]
    return found


def summarise(path: Path, format: Any, classes: Iterable[str]) -> Summary | None:
    """The manifest's rows in numbers, by curriculum and in the order of the classes; None without a row."""
    rows = read_rows(path)
    if not rows:
        return None
    images = Images(path, format if format in CODECS else "png")
    by_curriculum, by_class, by_bytes = defaultdict(list), defaultdict(list), defaultdict(list)
    items = []
    for key, row in rows.items():
        item = (images.size(key) or 0, row)
        items.append(item)
        by_curriculum[row["curriculum"]].append(item)
        by_class[row["class"]].append(item)
        by_bytes[row["sha256"]].append(f"{key[0]}/{key[1]}")
    order = [*classes, *sorted(by_class.keys() - set(classes))]
    return Summary(
        whole=losses(items),
        curricula={number: losses(by_curriculum[number]) for number in sorted(by_curriculum)},
        classes={name: losses(by_class[name]) for name in order},
        repeated=sorted(sorted(names) for names in by_bytes.values() if len(names) > 1),
    )


def losses(items: list[tuple[int, dict[str, Any]]]) -> Losses:
    """What is to be said of (bytes, row) pairs."""
    seen = [row for _, row in items if isinstance(row.get("discriminator_loss"), int | float)]
    return Losses(
        images=len(items),
        bytes=sum(size for size, _ in items),
        losses=tuple(float(row["discriminator_loss"]) for row in seen),
        right=sum(row.get("discriminator_correct") is True for row in seen),
    )


@dataclass(frozen=True)
class Picture:
    """A contact sheet for a page: its bytes, their kind, its size in px, whether pixels are to be seen."""

    data: bytes
    kind: str
    width: int
    height: int
    pixels: bool


def picture(run: RunFolder) -> Picture | None:
    """The run's contact sheet, a smaller one if it is large; None where there is none that can be read."""
    try:
        data = (run.path / "contact_sheet.png").read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
            pixels = own_edge(run) <= SMALL
            if len(data) <= LARGE:
                return Picture(data, "image/png", width, height, pixels)
            scale = min(1.0, math.sqrt(LARGE_PIXELS / (width * height)))
            small = image.convert("RGB").resize((max(1, int(width * scale)), max(1, int(height * scale))))
    except (OSError, ValueError, SyntaxError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return Picture(buffer.getvalue(), "image/jpeg", *small.size, pixels=False)


def own_edge(run: RunFolder) -> int:
    """The edge of the run's images in px; 0 where none can be read."""
    format = run.config.get("format")
    data = Images(run.path, format if format in CODECS else "png").read((run.classes[0], 0))
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            return image.width
    except (OSError, ValueError, SyntaxError):
        return 0


def differing(folders: list[RunFolder]) -> Iterator[tuple[str, list[Any]]]:
    """The settings, classes and origins that are not the same in all runs, with the value in each."""

    def values(run: RunFolder) -> dict[str, Any]:
        versions = run.record.get("versions")
        origins = {name: run.record.get(name) for name in ("model_sha256", "vae_sha256", "device", "commit")}
        version = versions.get("torch") if isinstance(versions, dict) else None
        classes = f"{len(run.classes)}: {', '.join(run.classes)}"
        settings = {k: v for k, v in run.config.items() if k != "out"}
        return {**settings, "classes": classes, **origins, "torch": version}

    found = [values(run) for run in folders]
    names = dict.fromkeys(name for one in found for name in one)
    for name in names:
        row = [one.get(name) for one in found]
        if any(value != row[0] for value in row):
            yield name, row
