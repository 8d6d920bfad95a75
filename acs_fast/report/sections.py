"""The parts of a run's page that need no evaluation: title, discriminators, contact sheet, configuration."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from acs_fast.config import DistillConfig
from acs_fast.judge import by_curriculum
from acs_fast.report import commands
from acs_fast.report.figures import Line, curves, legend, spikes
from acs_fast.report.folder import RunFolder, picture
from acs_fast.report.markup import (
    DASH,
    Html,
    details,
    escape,
    facts,
    facts_line,
    figure,
    join,
    listing,
    missing,
    number,
    reproduce,
    section,
    table,
    tag,
)
from acs_fast.report.results import Score

SPIKE = (
    "Mean cross-entropy of the discriminator on the images of a curriculum: before, of the one that steered "
    "them and had not seen them; after, of the next one, trained on them too. The fall is the loss spike: "
    "what was new in them."
)
PARTS = ("sampled", "newest", "real")
SHOWN = 100  # classes that are named
KNOWS = "What each discriminator knows after its training, before the curriculum that it steers."


def heading(run: RunFolder) -> Html:
    """Title, a sentence and a few numbers."""
    c, summary = run.config, run.summary
    written = summary.whole.images if summary else 0
    guided = (
        f"{c.get('objective')} guidance of scale {c.get('guidance_scale')}"
        if c.get("guidance_scale")
        else "no guidance"
    )
    curricula = c.get("num_curricula")
    parts_of = f"{curricula} curricul{'um' if curricula == 1 else 'a'}"
    steps = f"{c.get('num_sampling_steps')} {c.get('sampler')} steps and CFG {c.get('cfg_scale')}"
    sentence = (
        f"{written} images of {count_classes(run)}, sampled by the model {c.get('model')} in {parts_of} "
        f"with {guided}, {steps}."
    )
    strip = [("images", written), ("classes", len(run.classes)), ("images a class", c.get("ipc", DASH))]
    strip += [("curricula", c.get("num_curricula", DASH)), ("seed", c.get("seed", DASH))]
    parts = [tag("h1", f"Distilled set {run.name}"), tag("p", sentence, class_="lead")]
    if written < run.total:
        text = f"Unfinished: {written} of {run.total} images are written"
        parts.append(missing(text, commands.resume(run.path), "goes on with it"))
    return tag("header", join((*parts, facts(strip)), "\n"))


def count_classes(run: RunFolder) -> str:
    """Their number in words."""
    return f"{len(run.classes)} class{'es' * (len(run.classes) != 1)}"


def discriminators(run: RunFolder) -> Html:
    """Loss spikes, and what each discriminator knew."""
    title = "Discriminators"
    rows = run.results.curricula
    rows = by_curriculum(run.path) if rows is None else rows
    if not any(row["discriminator"] or row["before"] for row in rows):
        unguided = not run.config.get("guidance_scale")
        why = "The run has no guidance, so none was trained" if unguided else "No discriminator is recorded"
        return section("discriminators", title, missing(why, "" if unguided else commands.resume(run.path)))
    spiked = [(r["curriculum"], loss(r["before"]), loss(r["after"])) for r in rows if r["before"]]
    ended = [row for row in spiked if math.isfinite(row[1]) and math.isfinite(row[2])]
    figures = []
    if ended:
        key = legend({"before": 0, "after": 1})
        figures.append(figure(join((tag("h3", "Loss spike"), key, spikes("spike", ended))), SPIKE))
    known = [row for row in rows if row["discriminator"]]
    if known:
        key, drawing = knowledge(known)
        figures.append(figure(join((tag("h3", "Accuracy"), key, drawing)), KNOWS))
    values = details("The values as a table", knowledge_table(rows))
    again = reproduce([commands.distill(run.path), commands.report(run.path)], facts_line(run.record))
    return section("discriminators", title, tag("div", join(figures), class_="plots"), values, again)


def knowledge(rows: list[dict[str, Any]]) -> tuple[Html, Html]:
    """The accuracies of the discriminators on sampled, newest and real images, and the names of the lines."""
    lines, names = [], {}
    for series, part in enumerate(("sampled", "newest", "real")):
        of = [(row["curriculum"], row["discriminator"].get(part)) for row in rows]
        points = [(x, Score(float(record["accuracy"]), 0.0)) for x, record in of if record]
        if points:
            names[{"sampled": "all sampled", "newest": "newest curriculum", "real": "real"}[part]] = series
            lines.append(Line(part, series, [x for x, _ in points], [score for _, score in points]))
    return legend(names), curves("knowledge", lines, "curriculum that it steers", "accuracy, %")


def knowledge_table(rows: list[dict[str, Any]]) -> Html:
    """Losses and accuracies by curriculum."""
    cells = []
    for row in rows:
        knew, pair = row["discriminator"] or {}, (loss(row["before"]), loss(row["after"]))
        accuracies = [number(float(knew[p]["accuracy"])) if knew.get(p) else DASH for p in PARTS]
        cells.append((row["curriculum"], *(number(v, 3) for v in (*pair, pair[0] - pair[1])), *accuracies))
    head = ("curriculum", "loss before", "loss after", "spike", "on sampled, %", "on newest, %", "on real, %")
    return table(head, cells, "Discriminators by the curriculum that they steer")


def loss(record: dict[str, Any] | None) -> float:
    """The loss of a record; NaN where there is none."""
    return math.nan if record is None or record["loss"] is None else float(record["loss"])


def sheet(run: RunFolder, name: str = "sheet") -> Html:
    """The contact sheet; a click shows it larger, another one smaller."""
    found = picture(run)
    if found is None:
        return missing("There is no contact sheet that can be read", commands.resume(run.path))
    data = base64.b64encode(found.data).decode()
    large = max(found.width * (2 if found.width < 1600 else 1), 600)
    text = f"contact sheet of {run.name}: a row a class, a block of columns a curriculum"
    image = Html(
        f'<img id="{name}" alt="{escape(text)}" width="{found.width}" height="{found.height}" '
        f'{"class=pixels " if found.pixels else ""}src="data:{found.kind};base64,{data}">'
    )
    return Html(f'<details class="sheet" style="--large: {large}px"><summary>{image}</summary></details>')


def contact(run: RunFolder) -> Html:
    """The section of the contact sheet."""
    note = "A row a class; S1, S2, … are the curricula, in the order of their sampling. A click enlarges it."
    again = reproduce([commands.distill(run.path)], facts_line(run.record))
    return section("images", "Contact sheet", sheet(run), tag("p", note, class_="fine"), again)


def configuration(run: RunFolder) -> Html:
    """Every setting as it was resolved, those that are not the default first and in bold."""
    defaults = {name: json.loads(json.dumps(value)) for name, value in vars(DistillConfig()).items()}
    resolved = {"out", "preset"}
    other = {k for k, v in run.config.items() if k not in resolved and defaults.get(k) != v}
    rows = [
        (tag("strong", name) if name in other else name, setting(value), setting(defaults.get(name)))
        for name, value in sorted(run.config.items(), key=lambda item: (item[0] not in other, item[0]))
    ]
    shown = table(("setting", "value", "default"), rows, "Every setting as resolved", numbers_from=3)
    title = f"{len(rows)} settings, {len(other)} of them other than the default (in bold)"
    return section("configuration", "Configuration", details(title, shown), details(*classes(run)))


def setting(value: object) -> str:
    """A value as it is written in JSON, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def classes(run: RunFolder) -> tuple[str, Html]:
    """The classes, as many as a page bears."""
    listed = ", ".join(run.classes[:SHOWN])
    more = f" and {len(run.classes) - SHOWN} more" if len(run.classes) > SHOWN else ""
    return count_classes(run), tag("p", f"{listed}{more}.", class_="fine")


def again(run: RunFolder) -> Html:
    """All commands, one after another, and what the run stood on."""
    lines = [commands.distill(run.path)]
    lines += [commands.evaluation(run.path, found) for found in run.results.evaluations]
    if run.results.redundancy:
        lines.append(commands.redundancy(run.path, run.results.redundancy))
    lines.append(commands.report(run.path))
    stood = facts_line(run.record) or "What the run stood on was not recorded"
    digest = run.record.get("model_sha256")
    note = f"Sampled with {stood}. SHA-256 of the model: {digest}."
    text = (
        "The first one samples the set again beside this one; on the same CPU with the same torch and number "
        "of threads its bytes are equal."
    )
    block = listing(lines)
    return section("reproduce", "How to reproduce", tag("p", text), block, tag("p", note, class_="fine"))
