"""Pictures and pages of a run: the contact sheet and report.html."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from acs_fast.config import InputError
from acs_fast.images import Images, Key
from acs_fast.manifest import read_rows
from acs_fast.writer import write_atomic

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222 }}
table {{ border-collapse: collapse }}
th, td {{ padding: .25rem 1rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; image-rendering: pixelated }}
.plot {{ image-rendering: auto }}
pre {{ background: #f6f6f6; padding: 1rem; overflow: auto }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Accuracy on real images</h2>
<table><tr><th>set<th>best<th>last</tr>{rows}</table>
<p>Protocol {protocol}: top-1 accuracy in percent on {test_images} real test images of {network} trained for
{epochs} on {ipc} images of {image_size} px per class, mean &plusmn; standard deviation over the repeats.
&ldquo;Best&rdquo; is the best of the validations on the test set, which flatters every row.</p>
<h2>The distilled set</h2>
<p>A row a class, a block of columns a curriculum.</p>
<img alt="contact sheet" src="data:image/png;base64,{sheet}">
{curves}<h2>Configuration</h2>
<pre>{config}</pre>
</html>
"""

CURVES = """<h2>What each discriminator made of the images it steered</h2>
<img class="plot" alt="discriminator loss and accuracy by curriculum" src="data:image/png;base64,{curves}">
"""

MIN_CELL = 32  # pixels: small images are enlarged by a whole factor to at least this
MAX_PIXELS = 40_000_000  # of all cells: large sets are shown small
MAX_CELLS = 2500  # a set of more images is shown in part
SHOWN_CLASSES = 50  # then
GAP, BLOCK_GAP, LINE = 2, 12, 16


def contact_sheet(images: Images, classes: tuple[str, ...], curricula: Sequence[Sequence[int]]) -> bytes:
    """The PNG bytes of all images: a row a class, a block of columns a curriculum, both labelled.

    Of more than MAX_CELLS images it shows some, and says which in a line below. InputError names an image
    that is missing or damaged.
    """
    classes, blocks, note = choose_cells(classes, curricula)
    edge = load_cell(images, (classes[0], blocks[0][1][0]), None).width
    edge *= max(1, -(-MIN_CELL // edge))
    columns = sum(len(block) for _, block in blocks)
    edge = max(8, min(edge, math.isqrt(MAX_PIXELS // (len(classes) * columns))))
    text_width = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    label_width = 8 + max(int(text_width(name)) for name in classes)
    width = label_width + columns * (edge + GAP) + (len(blocks) - 1) * BLOCK_GAP
    width, bottom = max(width, 8 + int(text_width(note))), LINE + len(classes) * (edge + GAP)
    sheet = Image.new("RGB", (width, bottom + (LINE if note else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    left = label_width
    for number, block in blocks:
        draw.text((left, 2), f"S{number}", fill="black")
        for index in block:
            for row, name in enumerate(classes):
                sheet.paste(load_cell(images, (name, index), edge), (left, LINE + row * (edge + GAP)))
            left += edge + GAP
        left += BLOCK_GAP
    for row, name in enumerate(classes):
        draw.text((4, LINE + row * (edge + GAP) + edge // 2 - 6), name, fill="black")
    draw.text((4, bottom + 2), note, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def choose_cells(
    classes: tuple[str, ...], curricula: Sequence[Sequence[int]]
) -> tuple[tuple[str, ...], list[tuple[int, Sequence[int]]], str]:
    """The classes, and the curricula (number, indices), that the sheet shows, and what is to be said of them.

    All, or of each curriculum the first indices; at most SHOWN_CLASSES classes and as many curricula as
    leave each an index, both evenly chosen.
    """
    blocks = [(number, block) for number, block in enumerate(curricula, start=1) if len(block)]
    if len(classes) * sum(len(block) for _, block in blocks) <= MAX_CELLS:
        return classes, blocks, ""
    shown = tuple(evenly(classes, SHOWN_CLASSES))
    chosen = evenly(blocks, MAX_CELLS // len(shown))
    most = max(len(block) for _, block in chosen)
    count = min(most, MAX_CELLS // (len(shown) * len(chosen)))
    parts = [f"{len(shown)} of {len(classes)} classes"] if len(shown) < len(classes) else []
    parts += [f"{len(chosen)} of {len(blocks)} curricula"] if len(chosen) < len(blocks) else []
    parts += [f"the first {count} indices of each curriculum"] if count < most else []
    return shown, [(number, block[:count]) for number, block in chosen], f"shown: {', '.join(parts)}"


def evenly(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, at equal distances, the first among them."""
    count = min(count, len(values))
    return [values[place * len(values) // count] for place in range(count)]


def load_cell(images: Images, key: Key, edge: int | None) -> Image.Image:
    """An image as RGB, square of that edge in px, or as it is; InputError where it cannot be read."""
    data = images.read(key)
    try:
        if data is None:
            raise FileNotFoundError("it is missing")
        with Image.open(io.BytesIO(data)) as image:
            whole = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {images.path(key)} cannot be read ({error}); run distill again") from error
    if edge is None:
        return whole
    sharp = edge >= whole.width  # pixels stay visible; photographs are averaged
    return whole.resize((edge, edge), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)


def write_report(run: Path, results: dict[str, Any]) -> Path:
    """Write `report.html` of an evaluated run, with its pictures inside, and return its path."""
    record = json.loads((run / "config.json").read_text())
    config = record["config"]
    rows = "".join(
        f"<tr><td>{html.escape(name)}"
        + "".join(f"<td>{row[key]['mean']:.1f} &plusmn; {row[key]['std']:.1f}" for key in ("best", "last"))
        + "</tr>"
        for name, row in results["sets"].items()
    )
    curves = discriminator_curves(run)
    page = PAGE.format(
        title=html.escape(f"Distilled set {run.name}"),
        summary=html.escape(
            f"{config['ipc'] * len(record['classes'])} images of {len(record['classes'])} classes in "
            f"{config['num_curricula']} curricula; objective {config['objective']}, guidance scale "
            f"{config['guidance_scale']:g}, CFG {config['cfg_scale']:g}, seed {config['seed']}. "
            f"{record['device']}, torch {record['versions']['torch']}, "
            f"commit {record['commit'] or 'of an installed package'}."
        ),
        rows=rows,
        sheet=base64.b64encode((run / "contact_sheet.png").read_bytes()).decode(),
        curves=CURVES.format(curves=base64.b64encode(curves).decode()) if curves else "",
        epochs=html.escape(epochs_text(results)),
        config=html.escape(json.dumps(config, indent=2)),
        **{
            key: html.escape(str(results[key]))
            for key in ("protocol", "test_images", "network", "ipc", "image_size")
        },
    )
    write_atomic(run / "report.html", page.encode())
    return run / "report.html"


def epochs_text(results: dict[str, Any]) -> str:
    """The epochs trained, and the protocol's own if they are more."""
    fewer = results["epochs"] < results["protocol_epochs"]
    of = f" of the protocol's {results['protocol_epochs']}" if fewer else ""
    return f"{results['epochs']}{of} epochs"


def discriminator_curves(run: Path) -> bytes | None:
    """The PNG bytes of each discriminator's mean loss and accuracy on images it steered, by curriculum.

    None for a run without guidance; ValueError for one without a manifest.
    """
    rows, of = read_rows(run).values(), defaultdict[int, list[dict[str, Any]]](list)
    if not rows:
        raise ValueError(f"{run} has no rows in its manifest")
    for row in rows:
        if row["discriminator_loss"] is not None:
            of[row["curriculum"]].append(row)
    guided = sorted(of)
    if not guided:
        return None
    # deferred: only the report draws, and the import takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    losses = [statistics.fmean(row["discriminator_loss"] for row in of[i]) for i in guided]
    right = [100 * statistics.fmean(row["discriminator_correct"] for row in of[i]) for i in guided]
    loss.plot(guided, losses, "o-")
    loss.set(xlabel="curriculum", ylabel="cross-entropy", xticks=guided, ylim=(0, 1.1 * max(losses)))
    accuracy.plot(guided, right, "o-")
    accuracy.set(xlabel="curriculum", ylabel="accuracy, %", xticks=guided, ylim=(0, 105))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
