"""`results.json` as the pages read it: evaluations, redundancy, what the discriminators knew."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acs_fast.config import InputError

RESULTS = "results.json"
PROTOCOL_SIZE = 224  # px: for results of versions that named no deviations


@dataclass(frozen=True)
class Score:
    """Mean, standard deviation (ddof 0) and the value of every repeat, in percent; NaN where not known."""

    mean: float
    std: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """How accuracies were measured: what must be equal before two of them may stand side by side."""

    name: str
    network: str
    ipc: int
    image_size: int
    epochs: tuple[int, ...]
    deviations: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """One protocol's accuracies of a run and its baselines: {set: (best, last)}."""

    protocol: Protocol
    protocol_epochs: int
    repeats: int
    seed: int
    baselines: tuple[str, ...]
    test_images: int
    real: str
    seconds: float
    sets: dict[str, tuple[Score, Score]]
    stood_on: dict[str, Any]
    flags: dict[str, str]


@dataclass(frozen=True)
class Step:
    """A set after its first curricula: images a class, best and last accuracy on real images."""

    curriculum: int
    ipc: int
    best: Score
    last: Score


@dataclass(frozen=True)
class Overlap:
    """One set's redundancy: matrix in percent [trained on i][tested on j], steps, cover of real images."""

    matrix: tuple[tuple[float, ...], ...]
    cross: Score
    incremental: tuple[Step, ...]
    coverage: dict[str, float] | None


@dataclass(frozen=True)
class Redundancy:
    """The redundancy of a run and its baselines; features: the network that coverage is measured in."""

    protocol: Protocol
    repeats: int
    seed: int
    baselines: tuple[str, ...]
    real: str
    features: str
    k: int
    real_images: int
    seconds: float
    sets: dict[str, Overlap]
    stood_on: dict[str, Any]
    flags: dict[str, str]


@dataclass(frozen=True)
class Results:
    """All that was measured of a run; nothing of it for one that was not evaluated."""

    evaluations: tuple[Evaluation, ...] = ()
    redundancy: Redundancy | None = None
    curricula: list[dict[str, Any]] | None = None


def read_results(run: Path) -> Results:
    """What a run folder's results.json holds, also an earlier version's; InputError for a damaged one."""
    path = run / RESULTS
    if not path.is_file():
        return Results()
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged ({reason}); remove it and evaluate {run} again") from error


def parse(value: dict[str, Any]) -> Results:
    """The results of a JSON value; ValueError, LookupError or TypeError for what is none."""
    entries = value.get("evaluations", [value] if "sets" in value else [])
    redundancy, curricula = value.get("redundancy"), value.get("curricula")
    if curricula is not None:
        check_curricula(curricula)
    return Results(
        evaluations=tuple(parse_evaluation(entry) for entry in entries),
        redundancy=parse_redundancy(redundancy) if redundancy else None,
        curricula=curricula,
    )


def parse_evaluation(entry: dict[str, Any]) -> Evaluation:
    """One entry of `evaluations`."""
    protocol = parse_protocol(entry, (int(entry["epochs"]),))
    return Evaluation(
        protocol=protocol,
        protocol_epochs=int(entry["protocol_epochs"]),
        repeats=int(entry["repeats"]),
        seed=int(entry["seed"]),
        baselines=texts(entry.get("baselines", [])),
        test_images=int(entry["test_images"]),
        real=str(entry.get("real", "")),
        seconds=real_number(entry.get("seconds")),
        sets={str(name): best_last(row) for name, row in entry["sets"].items()},
        stood_on=stood_on(entry),
        flags=other_flags(entry),
    )


def parse_protocol(entry: dict[str, Any], epochs: tuple[int, ...]) -> Protocol:
    """What an entry says of its protocol; deviations that an earlier version did not list are added."""
    size = int(entry["image_size"])
    if "deviations" in entry:
        deviations = texts(entry["deviations"])
    else:
        own, found = int(entry["protocol_epochs"]), []
        if epochs[0] != own:
            found.append(f"{epochs[0]} of the protocol's {own} epochs")
        if size != PROTOCOL_SIZE:
            found.append(f"images of {size} px; the protocol resizes to {PROTOCOL_SIZE}")
        deviations = tuple(found)
    return Protocol(
        str(entry["protocol"]), str(entry["network"]), int(entry["ipc"]), size, epochs, deviations
    )


def parse_redundancy(entry: dict[str, Any]) -> Redundancy:
    """The entry `redundancy`."""
    epochs = entry["epochs"] if isinstance(entry["epochs"], list) else [entry["epochs"]]
    return Redundancy(
        protocol=parse_protocol({"deviations": [], **entry}, tuple(int(value) for value in epochs)),
        repeats=int(entry["repeats"]),
        seed=int(entry["seed"]),
        baselines=texts(entry.get("baselines", [])),
        real=str(entry.get("real", "")),
        features=str(entry.get("features", "")),
        k=int(entry.get("k", 0)),
        real_images=int(entry.get("real_images", 0)),
        seconds=real_number(entry.get("seconds")),
        sets={str(name): parse_overlap(row) for name, row in entry["sets"].items()},
        stood_on=stood_on(entry),
        flags=other_flags(entry),
    )


def parse_overlap(row: dict[str, Any]) -> Overlap:
    """One set of the entry `redundancy`; any of its parts may be missing."""
    cross, coverage = row.get("cross_increment") or {}, row.get("coverage")
    matrix = tuple(tuple(map(real_number, line)) for line in cross.get("matrix", []))
    if any(len(line) != len(matrix) for line in matrix):
        raise ValueError("a cross-increment matrix is not square")
    steps = row.get("incremental") or []
    return Overlap(
        matrix=matrix,
        cross=score(cross) if cross else Score(math.nan, math.nan),
        incremental=tuple(
            Step(int(step["curriculum"]), int(step["ipc"]), *best_last(step)) for step in steps
        ),
        coverage={str(name): real_number(number) for name, number in coverage.items()} if coverage else None,
    )


def check_curricula(rows: Any) -> None:
    """Raise for what `judge.by_curriculum` cannot have written."""
    for row in rows:
        int(row["curriculum"])
        knew = row["discriminator"] or {}
        for part in (row["before"], row["after"], *map(knew.get, ("sampled", "newest", "real"))):
            if part is not None:
                real_number(part["loss"]), real_number(part["accuracy"])


def best_last(row: dict[str, Any]) -> tuple[Score, Score]:
    """The two scores of a set."""
    return score(row["best"]), score(row["last"])


def score(row: dict[str, Any]) -> Score:
    """Mean, deviation and values."""
    return Score(
        real_number(row["mean"]), real_number(row["std"]), tuple(map(real_number, row.get("values", [])))
    )


def real_number(value: Any) -> float:
    """A JSON number; NaN for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def other_flags(entry: dict[str, Any]) -> dict[str, str]:
    """The further settings that an entry was made with, where they are not the defaults."""
    return {str(name): str(value) for name, value in dict(entry.get("flags", {})).items()}


def texts(values: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(map(str, values))


def stood_on(entry: dict[str, Any]) -> dict[str, Any]:
    """What `environment.describe` wrote."""
    return {name: entry.get(name) for name in ("commit", "device", "threads", "versions")}
