"""How much of a set repeats itself: cross-increment accuracy, incremental gain, cover of the real images."""

from __future__ import annotations

import itertools
import math

from acs_fast.report import commands
from acs_fast.report.accuracy import deviations, protocol_title, repeats_text
from acs_fast.report.figures import Line, curves, heat_map, legend, limits_of, series_of
from acs_fast.report.folder import RunFolder
from acs_fast.report.markup import (
    Html,
    facts_line,
    figure,
    join,
    mean_std,
    missing,
    number,
    reproduce,
    section,
    table,
    tag,
)
from acs_fast.report.results import Overlap, Redundancy

COVERAGE = ("coverage", "density", "precision", "recall")
CROSS = (
    "A classifier is trained on the images of one increment (one curriculum) and tested on those of another. "
    "High numbers off the diagonal mean that the increments show the same things: lower is less overlap."
)
GAIN = (
    "Accuracy on real images of a classifier trained on the first curricula 1 to i, by their images a class."
)
COVER = (
    "Coverage and recall: the share of real images that the set reaches. Density and precision: how much of "
    "the set lies where real images are."
)


def redundancy(run: RunFolder) -> Html:
    """The section."""
    found, title = run.results.redundancy, "Redundancy and coverage"
    if found is None:
        return section(
            "redundancy", title, missing("No redundancy was measured", commands.redundancy(run.path))
        )
    command = reproduce([commands.redundancy(run.path, found)], facts_line(found.stood_on))
    epochs = ", ".join(map(str, found.protocol.epochs))
    how = (
        f"{protocol_title(found.protocol)}; {repeats_text(found.repeats, found.seed)}; "
        f"epochs by increment: {epochs}. Mean ± standard deviation over the repeats."
    )
    parts = [join((part, command), "\n") for part in (heat_maps(found), gains(found), covers(found))]
    return section("redundancy", title, tag("p", how), deviations(found.protocol), *parts)


def heat_maps(found: Redundancy) -> Html:
    """A matrix a set, all on one scale."""
    shown = {name: overlap for name, overlap in found.sets.items() if overlap.matrix}
    values = [v for o in shown.values() for row in o.matrix for v in row if math.isfinite(v)]
    head = tag("h3", "Cross-increment accuracy")
    if not values:
        return join((head, missing("No cross-increment accuracy was measured")), "\n")
    low, high = 5 * math.floor(min(values) / 5), min(100, 5 * math.ceil(max(values) / 5))
    maps = [
        figure(
            heat_map(f"cross-{place}", overlap.matrix, (low, high), name),
            cross_text(overlap).capitalize(),
            tag("strong", name),
        )
        for place, (name, overlap) in enumerate(shown.items())
    ]
    note = f"{CROSS} One scale for all, from the faintest colour, {low} %, to the strongest, {high} %."
    return join(
        (head, tag("p", note, class_="fine"), tag("div", join(maps, "\n"), class_="plots small")), "\n"
    )


def cross_text(overlap: Overlap) -> str:
    """The mean off the diagonal, in words."""
    if len(overlap.matrix) < 2:
        return "one increment, so there is nothing to compare"
    return f"mean over i ≠ j {mean_std(overlap.cross.mean, overlap.cross.std, len(overlap.cross.values))} %"


def gains(found: Redundancy) -> Html:
    """The incremental curves of all sets."""
    shown = {name: overlap.incremental for name, overlap in found.sets.items() if overlap.incremental}
    head = tag("h3", "Incremental gain")
    if not shown:
        return join((head, missing("No incremental accuracy was measured")), "\n")
    series = series_of(list(found.sets))
    lines = {
        kind: [
            Line(name, series[name], [step.ipc for step in steps], [getattr(step, kind) for step in steps])
            for name, steps in shown.items()
        ]
        for kind in ("last", "best")
    }
    limits = limits_of(itertools.chain(*lines.values()))
    drawings = [
        figure(
            curves(f"gain-{kind}", drawn, "images a class", "top-1 accuracy, %", limits),
            "",
            kind.capitalize(),
        )
        for kind, drawn in lines.items()
    ]
    key = legend({name: series[name] for name in shown})
    plots = tag("div", join(drawings, "\n"), class_="plots")
    return join((head, tag("p", GAIN, class_="fine"), key, plots), "\n")


def covers(found: Redundancy) -> Html:
    """The table of coverage, density, precision and recall."""
    rows = [
        (name, *cover_cells(overlap), f"{overlap.coverage.get('images', math.nan):.0f}")
        for name, overlap in found.sets.items()
        if overlap.coverage
    ]
    head = tag("h3", "Cover of the real images")
    if not rows:
        return join((head, missing("No coverage was measured")), "\n")
    shown = table(("set", *COVERAGE, "images"), rows, cover_title(found))
    return join((head, tag("p", COVER, class_="fine"), shown), "\n")


def cover_title(found: Redundancy) -> str:
    """In which features coverage was measured, against how many real images."""
    features = found.features or "a network that was not noted"
    return f"Features of {features}; {found.k} nearest neighbours among {found.real_images} real images"


def cover_cells(overlap: Overlap) -> list[str]:
    """Coverage, density, precision and recall as they are printed."""
    return [number((overlap.coverage or {}).get(name, math.nan), 3) for name in COVERAGE]
