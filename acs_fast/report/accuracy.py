"""The accuracies of a run on real images: a table and a drawing a protocol."""

from __future__ import annotations

import math

from acs_fast.report import commands
from acs_fast.report.figures import Row, dots, legend, series_of
from acs_fast.report.folder import RunFolder
from acs_fast.report.markup import (
    Html,
    facts_line,
    figure,
    join,
    mean_std,
    missing,
    reproduce,
    section,
    table,
    tag,
)
from acs_fast.report.results import Evaluation, Protocol
from acs_fast.units import duration

BEST_LAST = (
    "Top-1 accuracy in percent on real images that nothing was trained on; mean ± standard deviation over "
    "the repeats. Last is the end of training. Best is the best of the validations on the test set itself, "
    "as the field publishes it, which flatters every row. Numbers of different protocols do not compare."
)


def accuracy(run: RunFolder) -> Html:
    """The section."""
    title = "Accuracy on real images"
    found = run.results.evaluations
    if not found:
        return section(
            "accuracy", title, missing("This run was not evaluated yet", commands.evaluate(run.path))
        )
    parts = [evaluation(run, one, number) for number, one in enumerate(found, start=1)]
    return section("accuracy", title, tag("p", BEST_LAST, class_="fine"), *parts)


def evaluation(run: RunFolder, found: Evaluation, number: int) -> Html:
    """One protocol's results; number: of the evaluation on the page."""
    series = series_of(list(found.sets))
    rows = [Row(name, name, series[name], *pair) for name, pair in found.sets.items()]
    cells = [
        (row.name, *(mean_std(score.mean, score.std, len(score.values)) for score in (row.best, row.last)))
        for row in rows
    ]
    drawing = dots(f"accuracy-{number}", rows, "top-1 accuracy, %")
    note = legend({}, (("best", True), ("last", False)))
    caption = "Mean and standard deviation; the strokes are the single repeats."
    return join(
        (
            tag("h3", protocol_title(found.protocol)),
            tag("p", evaluation_facts(found)),
            deviations(found.protocol),
            tag(
                "div",
                join(
                    (
                        table(("set", "best", "last"), cells, "Top-1 accuracy, %"),
                        figure(join((note, drawing)), caption),
                    )
                ),
                class_="pair",
            ),
            reproduce([commands.evaluation(run.path, found)], facts_line(found.stood_on)),
        ),
        "\n",
    )


def repeats_text(repeats: int, seed: int) -> str:
    """How many repeats with which seeds."""
    seeds = f"seeds {seed} to {seed + repeats - 1}" if repeats > 1 else f"seed {seed}"
    return f"{repeats} repeat{'s' * (repeats != 1)} with {seeds}"


def protocol_title(protocol: Protocol) -> str:
    """A protocol in a few words."""
    return (
        f"{protocol.name}, {protocol.network}, {protocol.ipc} image{'s' * (protocol.ipc != 1)} a class, "
        f"{protocol.image_size} px"
    )


def evaluation_facts(found: Evaluation) -> str:
    """What was trained and tested, in a sentence."""
    epochs = found.protocol.epochs[0]
    of = f" of the protocol's {found.protocol_epochs}" if epochs != found.protocol_epochs else ""
    took = f"; it took {duration(found.seconds)}" if math.isfinite(found.seconds) else ""
    return (
        f"{epochs} epochs{of}; {repeats_text(found.repeats, found.seed)}; "
        f"tested on {found.test_images} real images of {found.real or 'a set that was not noted'}{took}."
    )


def deviations(protocol: Protocol) -> Html:
    """What differs from the protocol as published."""
    if not protocol.deviations:
        return tag("p", "No deviation from the protocol is recorded.", class_="fine")
    listed = tag("ul", join(tag("li", text) for text in protocol.deviations))
    return tag("div", join(("Deviates from the protocol:", listed)), class_="note")
