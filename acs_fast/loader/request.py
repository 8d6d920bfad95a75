"""What a decoder is asked for: encoded images and the part of each that is wanted."""

from __future__ import annotations

from typing import NamedTuple

from acs_fast.listing import Entry


class Crop(NamedTuple):
    """A box in px of the upright image, mirrored afterwards if `flip`."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


class Request(NamedTuple):
    """A batch to decode."""

    rows: list[int]
    entries: list[Entry]
    data: list[bytes]
    crops: list[Crop]
