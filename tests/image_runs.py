"""What the tests of a run's images share: pictures, and run folders of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from acs_fast.images import Images, Key


def picture(number: int, shape: tuple[int, ...] = (6, 6, 3)) -> torch.Tensor:
    pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    return torch.from_numpy(pixels)


def decoded(data: bytes | None) -> np.ndarray:
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def record(out: Path, classes: tuple[str, ...]) -> Path:
    """What a run folder says of its classes."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps({"classes": classes}))
    return out


def keys_of(classes: tuple[str, ...], indices: range) -> list[Key]:
    return [(name, index) for name in classes for index in indices]


def fill(images: Images, keys: list[Key], shape: tuple[int, ...] = (6, 6, 3)) -> dict[Key, bytes]:
    """Write an image for each key; all different."""
    written = {key: images.encode(picture(number, shape)) for number, key in enumerate(keys)}
    for key, data in written.items():
        images.write(key, data)
    return written


def packed(out: Path, classes: tuple[str, ...] = ("ant", "bee"), curricula: int = 2) -> dict[Key, bytes]:
    """A run folder of two images a class and curriculum, in shards."""
    images = Images(record(out, classes), "wds")
    written = {}
    for curriculum in range(1, curricula + 1):
        keys = keys_of(classes, range(2 * curriculum - 2, 2 * curriculum))
        written |= fill(images, keys)
        images.pack(curriculum, 0, keys)
    images.sweep()
    return written
