"""What a run took and what it wrote: plan against actual time, the manifest in numbers."""

from __future__ import annotations

import math
import statistics

from acs_fast.report import commands
from acs_fast.report.figures import bars, legend
from acs_fast.report.folder import Losses, RunFolder, Start, Summary
from acs_fast.report.markup import (
    DASH,
    Html,
    details,
    facts_line,
    figure,
    join,
    missing,
    number,
    reproduce,
    section,
    table,
    tag,
)
from acs_fast.units import duration, size

STARTS = 10  # that are shown
ALL_CLASSES = 100  # a run of more shows those of lowest and highest loss
FEW = 10


def times(run: RunFolder) -> Html:
    """The section of plan against actual time, a table a start of the run."""
    title, shown = "Plan and actual time", run.starts[-STARTS:]
    if not shown:
        return section("time", title, missing("The run has no log of rank 0", commands.distill(run.path)))
    notes = []
    if len(run.starts) > len(shown):
        notes.append(tag("p", f"The last {len(shown)} of {len(run.starts)} starts.", class_="fine"))
    parts = [one_start(start, place, len(shown)) for place, start in enumerate(shown, start=1)]
    if not shown[-1].expected:
        notes.append(missing("The plan is not in this log", commands.distill(run.path, "--plan")))
    command = reproduce([commands.distill(run.path)], facts_line(run.record))
    return section("time", title, *notes, *parts, command)


def one_start(start: Start, place: int, of: int) -> Html:
    """What was expected of a start and what it took."""
    parts = {"sampling": start.sampling, "discriminators": start.discriminators, "total": start.total}
    rest = max(0.0, start.total - start.sampling - start.discriminators)
    rows = [
        (
            part,
            seconds(start.expected.get(part, math.nan)),
            seconds(taken),
            ratio(taken, start.expected.get(part)),
        )
        for part, taken in parts.items()
    ]
    rows.insert(2, ("the rest", DASH, seconds(rest), DASH))
    ranks = f", of {start.num_ranks} ranks" if start.num_ranks > 1 else ""
    title = f"Start {place} of {of}" if of > 1 else "Started"
    when = start.time.replace("T", " ").replace("Z", " UTC")
    text = f"{title}, {when}: {start.missing} images to sample, {start.images} sampled, {start.ended}."
    shown = table(("part", "expected", "actual", "actual / expected"), rows, f"By the log of rank 0{ranks}")
    content: Html = shown
    if start.expected:
        drawn = [(part, start.expected[part], taken) for part, taken in parts.items()]
        note = legend({}, (("expected", True), ("actual", False)))
        caption = "The rest is judging, reading and writing, for which the plan has no time."
        content = tag(
            "div", join((shown, figure(join((note, bars(f"time-{place}", drawn))), caption))), class_="pair"
        )
    return join((tag("p", text), content), "\n")


def manifest(run: RunFolder) -> Html:
    """The section of the manifest in numbers."""
    title, found = "Manifest", run.summary
    if found is None:
        return section(
            "manifest", title, missing("No image has a row in a manifest", commands.resume(run.path))
        )
    columns = ("images", "bytes", "loss, mean", "min", "max", "judged right")
    rows = [(f"S{n}", *cells(part)) for n, part in found.curricula.items()]
    shown = table(("curriculum", *columns), [*rows, ("all", *cells(found.whole))], "By curriculum")
    note = (
        f"{found.whole.images} images, {size(found.whole.bytes)} as {run.config.get('format', 'png')}. Loss "
        "and verdict are those of the discriminator that steered an image; the first curriculum has none."
    )
    return section("manifest", title, tag("p", note), shown, duplicates(found), by_class(found, columns))


def by_class(found: Summary, columns: tuple[str, ...]) -> Html:
    """All classes in a closed table; of many those of the lowest and highest loss."""
    head = ("class", *columns)
    if len(found.classes) <= ALL_CLASSES:
        rows = [(name, *cells(part)) for name, part in found.classes.items()]
        return details(f"By class ({len(rows)})", table(head, rows, "By class"))
    counts = [part.images for part in found.classes.values()]
    few, most, median = min(counts), max(counts), statistics.median(counts)
    note = f"{len(counts)} classes of {few} to {most} images, median {median:g}."
    seen = sorted(
        (name for name, part in found.classes.items() if part.losses), key=lambda n: found.classes[n].mean
    )
    chosen = [*seen[:FEW], *seen[-FEW:]] if len(seen) >= 2 * FEW else seen
    rows = [(name, *cells(found.classes[name])) for name in chosen]
    text = f"The {FEW} classes of lowest and the {FEW} of highest mean loss"
    return join((tag("p", note), details(text, table(head, rows, text)) if rows else ""), "\n")


def cells(part: Losses) -> tuple[str, ...]:
    """A row of numbers."""
    low, high = (min(part.losses), max(part.losses)) if part.losses else (math.nan, math.nan)
    right = f"{part.right} of {len(part.losses)}" if part.losses else DASH
    return (str(part.images), size(part.bytes), number(part.mean, 3), number(low, 3), number(high, 3), right)


def duplicates(found: Summary) -> Html:
    """The images that are equal to another one to the byte."""
    if not found.repeated:
        return tag("p", "No two images have the same SHA-256.")
    count = sum(map(len, found.repeated))
    groups = "; ".join(" = ".join(names[:FEW]) for names in found.repeated[:FEW])
    more = "; …" if len(found.repeated) > FEW else ""
    text = f"{count} images have the SHA-256 of another one: {groups}{more}."
    return tag("p", text, class_="note warn")


def seconds(value: float) -> str:
    """A time in the unit that fits; a dash for one that is not known."""
    return duration(value) if math.isfinite(value) else DASH


def ratio(actual: float, expected: float | None) -> str:
    """How many times as long as expected."""
    return f"{actual / expected:.2f}" if expected else DASH
