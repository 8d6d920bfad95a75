"""The contact sheet: all images of a run, or an even part of them, in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from acs_fast.config import InputError
from acs_fast.images import Images, Key

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
