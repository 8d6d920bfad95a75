"""Several runs on one page: what differs, and what each measured by the same protocol side by side."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from acs_fast.config import InputError
from acs_fast.report import commands
from acs_fast.report.accuracy import BEST_LAST, deviations, protocol_title
from acs_fast.report.figures import Line, Row, curves, dots, legend, limits_of
from acs_fast.report.folder import RunFolder, differing, read_folder
from acs_fast.report.inventory import seconds
from acs_fast.report.markup import (
    DASH,
    Html,
    document,
    figure,
    join,
    mean_std,
    missing,
    reproduce,
    section,
    table,
    tag,
)
from acs_fast.report.redundancy import COVERAGE, cover_cells, cover_title
from acs_fast.report.results import Evaluation, Protocol, Redundancy
from acs_fast.report.sections import count_classes, setting, sheet
from acs_fast.writer import write_atomic

LAST = "last top-1 accuracy, %"
CROSS_TITLE = "Cross-increment accuracy, %: lower is less overlap"
Labelled = tuple[str, RunFolder]  # what a run is called on the page


def compare(runs: list[Path], out: Path) -> Path:
    """Write one page of several run folders to the file `out`, and return its path.

    Accuracies stand in one table only where protocol, network, images a class and their size, epochs,
    deviations, test images and classes are the same. InputError for a folder that is no run, for one named
    twice and for damaged results.
    """
    named: dict[Path, Path] = {}
    for path in runs:
        if path.resolve() in named:
            raise InputError(f"{path} is named twice; name every run once")
        named[path.resolve()] = path
    folders = [read_folder(path) for path in runs]
    names = [run.name for run in folders]
    labels = [run.name if names.count(run.name) == 1 else str(run.path) for run in folders]
    both = list(zip(labels, folders, strict=True))
    parts = (settings, accuracies, increments, covers, sheets, durations)
    intro = f"{len(runs)} runs side by side. What was measured in different ways stands in different tables."
    head = (tag("h1", "Comparison of runs"), tag("p", intro, class_="lead"), legend(series(both)))
    page = document("Comparison of runs", *head, *(part(both) for part in parts))
    write_atomic(out, page)
    return out


def series(runs: Sequence[Labelled]) -> dict[str, int]:
    """The colour and marker of each run."""
    return {label: place for place, (label, _) in enumerate(runs)}


def settings(runs: list[Labelled]) -> Html:
    """The settings that are not the same in all."""
    rows = [(name, *map(short, values)) for name, values in differing([run for _, run in runs])]
    title = "Settings that differ"
    if not rows:
        return section(
            "settings", title, tag("p", "None: all settings, the model and the device are the same.")
        )
    head = ("setting", *(label for label, _ in runs))
    again = reproduce([commands.distill(run.path) for _, run in runs])
    return section("settings", title, table(head, rows, "A column a run", numbers_from=len(head)), again)


def short(value: object) -> str:
    """A setting that fits into a cell."""
    text = setting(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def accuracies(runs: list[Labelled]) -> Html:
    """A table and a drawing for each way of measuring that some run has."""
    groups: dict[tuple[Protocol, int, tuple[str, ...]], list[tuple[str, RunFolder, Evaluation]]] = (
        defaultdict(list)
    )
    for label, run in runs:
        for found in run.results.evaluations:
            groups[found.protocol, found.test_images, run.classes].append((label, run, found))
    parts = [
        group(protocol, images, members, series(runs), number)
        for number, ((protocol, images, _), members) in enumerate(groups.items(), start=1)
    ]
    parts += [
        missing(f"{label} was not evaluated yet", commands.evaluate(run.path))
        for label, run in runs
        if not run.results.evaluations
    ]
    return section("accuracy", "Accuracy on real images", tag("p", BEST_LAST, class_="fine"), *parts)


def group(
    protocol: Protocol,
    images: int,
    members: list[tuple[str, RunFolder, Evaluation]],
    places: dict[str, int],
    number: int,
) -> Html:
    """The runs that one protocol judged, set by set."""
    names = dict.fromkeys(name for _, _, found in members for name in found.sets)
    found = [
        (name, label, one, *one.sets[name]) for name in names for label, _, one in members if name in one.sets
    ]
    rows = [
        (name, label, *(mean_std(s.mean, s.std, len(s.values)) for s in (best, last)), one.repeats)
        for name, label, one, best, last in found
    ]
    title, classed = protocol_title(protocol), members[0][1]
    shown = table(("set", "run", "best", "last", "repeats"), rows, "Top-1 accuracy, %", numbers_from=2)
    first = {name: label for name, label, *_ in reversed(found)}  # the set is named beside its first run
    points = [
        Row(name if first[name] == label else "", f"{label}, {name}", places[label], best, last)
        for name, label, _, best, last in found
    ]
    shown_runs = {label: places[label] for label, _, _ in members}
    note = legend(shown_runs, (("best", True), ("last", False)))
    drawing = figure(
        join((note, dots(f"accuracy-{number}", points, "top-1 accuracy, %"))),
        "Mean and standard deviation; the strokes are the single repeats.",
    )
    epochs, real = protocol.epochs[0], sorted({one.real for _, _, one in members})
    text = (
        f"{epochs} epochs; tested on {images} real images of {' and '.join(real)}, {count_classes(classed)}. "
        f"Runs: {', '.join(label for label, _, _ in members)}."
    )
    again = reproduce([commands.evaluation(run.path, one) for _, run, one in members])
    pair = tag("div", join((shown, drawing)), class_="pair")
    return join((tag("h3", title), tag("p", text), deviations(protocol), pair, again), "\n")


def measured(runs: list[Labelled]) -> Iterator[tuple[str, RunFolder, Redundancy]]:
    """The runs that have redundancy figures."""
    for label, run in runs:
        if run.results.redundancy is not None:
            yield label, run, run.results.redundancy


def increments(runs: list[Labelled]) -> Html:
    """Incremental curves over each other and cross-increment means, a group for each way of measuring."""
    title, parts, places = "Increments", [], series(runs)
    groups: dict[tuple[Protocol, int, tuple[str, ...]], list[tuple[str, RunFolder, Redundancy]]] = (
        defaultdict(list)
    )
    for label, run, found in measured(runs):
        groups[found.protocol, found.real_images, run.classes].append((label, run, found))
    for number, ((protocol, _, _), members) in enumerate(groups.items(), start=1):
        overlaps = [(name, label, one.sets[name]) for name, label, one in by_set(members)]
        rows = [
            (name, label, mean_std(o.cross.mean, o.cross.std, len(o.cross.values)))
            for name, label, o in overlaps
            if o.matrix
        ]
        lines: dict[str, list[Line]] = defaultdict(list)
        for name, label, overlap in overlaps:
            if overlap.incremental:
                steps = overlap.incremental
                lines[name].append(
                    Line(label, places[label], [s.ipc for s in steps], [s.last for s in steps])
                )
        limits = limits_of(itertools.chain(*lines.values()))
        plots = [
            figure(curves(f"gain-{number}-{place}", drawn, "images a class", LAST, limits), "", name)
            for place, (name, drawn) in enumerate(lines.items(), start=1)
        ]
        parts += [tag("h3", protocol_title(protocol)), deviations(protocol), legend(places)]
        parts.append(tag("div", join(plots, "\n"), class_="plots"))
        parts.append(table(("set", "run", "mean over i ≠ j"), rows, CROSS_TITLE, numbers_from=2))
        parts.append(reproduce([commands.redundancy(run.path, one) for _, run, one in members]))
    return section("increments", title, *parts, *unmeasured(runs))


def by_set(members: list[tuple[str, RunFolder, Redundancy]]) -> Iterator[tuple[str, str, Redundancy]]:
    """Set by set the runs that have it."""
    names = dict.fromkeys(name for _, _, one in members for name in one.sets)
    yield from ((name, label, one) for name in names for label, _, one in members if name in one.sets)


def unmeasured(runs: list[Labelled]) -> list[Html]:
    """What to say of the runs without redundancy figures."""
    return [
        missing(f"No redundancy of {label} was measured", commands.redundancy(run.path))
        for label, run in runs
        if run.results.redundancy is None
    ]


def covers(runs: list[Labelled]) -> Html:
    """Coverage, a table for each feature network and set of real images."""
    groups: dict[tuple[str, int, int, tuple[str, ...]], list[tuple[str, RunFolder, Redundancy]]] = (
        defaultdict(list)
    )
    for label, run, found in measured(runs):
        groups[found.features, found.k, found.real_images, run.classes].append((label, run, found))
    parts = []
    for members in groups.values():
        overlaps = [(name, label, one.sets[name]) for name, label, one in by_set(members)]
        rows = [(name, label, *cover_cells(overlap)) for name, label, overlap in overlaps if overlap.coverage]
        if rows:
            title = cover_title(members[0][2])
            parts.append(table(("set", "run", *COVERAGE), rows, title, numbers_from=2))
    empty = [] if parts else [missing("No coverage was measured")]
    return section("coverage", "Cover of the real images", *parts, *empty)


def sheets(runs: list[Labelled]) -> Html:
    """The contact sheets, one below the other."""
    parts = []
    for number, (label, run) in enumerate(runs, start=1):
        parts += [tag("h3", label), sheet(run, f"sheet-{number}")]
    note = tag("p", "A row a class, a block of columns a curriculum. A click enlarges it.", class_="fine")
    return section("images", "Contact sheets", note, *parts)


def durations(runs: list[Labelled]) -> Html:
    """What the last start of each took, and what was expected of it."""
    rows = []
    for label, run in runs:
        if not run.starts:
            rows.append((label, *[DASH] * 6))
            continue
        start = run.starts[-1]
        expected = seconds(start.expected["total"]) if start.expected else DASH
        taken = map(seconds, (start.sampling, start.discriminators, start.total))
        rows.append((label, str(start.images), *taken, expected, str(run.record.get("device"))))
    head = ("run", "images", "sampling", "discriminators", "total", "expected", "device")
    return section("time", "Time", table(head, rows, "The last start of each run, on rank 0"))
