"""The images of a run folder: one file each, `images/<class>/<index>.png`."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from acs_fast.writer import write_atomic

IMAGES = "images"
Key = tuple[str, int]  # class folder, index


class Images:
    """Where the images of a run lie; every method takes one image's (class, index).

    out: the run folder. format: the run's `--format`.
    """

    def __init__(self, out: Path, format: str = "png"):
        self.out, self.format = out, format
        self.suffix = ".png"

    def encode(self, image: Tensor) -> bytes:
        """uint8 [H, W, C] as the file's bytes."""
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
        return buffer.getvalue()

    def write(self, key: Key, data: bytes) -> None:
        """Put an encoded image where it belongs, whole or not at all."""
        write_atomic(self.path(key), data)

    def read(self, key: Key) -> bytes | None:
        """The encoded image; None where it is missing."""
        path = self.path(key)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def path(self, key: Key) -> Path:
        """The image's own file."""
        return self.out / IMAGES / key[0] / f"{key[1]}{self.suffix}"
