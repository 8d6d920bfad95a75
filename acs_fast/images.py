"""The images of a run folder: a file each, `images/<class>/<index>.<suffix>`, or tar shards of them.

With `--format wds` an image is written as a file of its own (loose) and moves into a shard when its
curriculum is complete. A kill in between leaves images that lie in both. Then the loose file is read: if the
two differ, it is the one made anew because the shard was damaged, and packing puts it there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from acs_fast.shards import SHARD, ShardIndex, read_members, shard_name, stem, tar_parts
from acs_fast.writer import RUN_CONFIG, TEMPORARY, fsync_folder, read_json, write_atomic, write_whole

IMAGES = "images"
CLASSES = "classes.txt"  # beside shards: the class names in label order
Key = tuple[str, int]  # class folder, index
CODECS: dict[str, tuple[str, dict[str, Any]]] = {  # suffix, what Pillow is to write
    "png": (".png", {"format": "PNG"}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),
    "webp": (".webp", {"format": "WEBP", "lossless": True}),
    "wds": (".png", {"format": "PNG"}),
}


class Images:
    """Where the images of a run lie; every method takes one image's (class, index).

    out: the run folder. format: the run's `--format`. Threads may read together.
    """

    def __init__(self, out: Path, format: str = "png"):
        self.out, self.format = out, format
        self.folder = out / IMAGES
        self.suffix, self._settings = CODECS[format]
        self._index = ShardIndex(self.folder) if format == "wds" else None

    def encode(self, image: Tensor) -> bytes:
        """uint8 [H, W, C] with C 1 or 3 as the file's bytes; grey WebP is read as RGB with equal channels."""
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, **self._settings)
        return buffer.getvalue()

    def write(self, key: Key, data: bytes) -> None:
        """Put an encoded image where it belongs, whole or not at all."""
        write_atomic(self.path(key), data)

    def read(self, key: Key) -> bytes | None:
        """The encoded image; None where it is missing, or its shard is cut short before its end."""
        try:
            return self.path(key).read_bytes()
        except FileNotFoundError:
            place = self._index and self._index.find(key)
        if not place:
            return None
        path, offset, length = place
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        except FileNotFoundError:
            return None
        return data if len(data) == length else None

    def holds(self, key: Key) -> bool:
        """Whether the image lies there; it is not read."""
        return self.path(key).is_file() or (self._index is not None and self._index.find(key) is not None)

    def size(self, key: Key) -> int | None:
        """The bytes of the encoded image; None where it is missing."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            place = self._index and self._index.find(key)
        return place[2] if place else None

    def path(self, key: Key) -> Path:
        """The image's own file; one in a shard has it no more."""
        return self.folder / key[0] / f"{key[1]}{self.suffix}"

    def pack(self, curriculum: int, number: int, keys: Sequence[Key]) -> None:
        """Put at most 1000 images into shard `images/<curriculum>-<number>.tar`, in this order.

        The shard is written whole or not at all, and its images' loose files are removed once it is on the
        disk. Images that lie in an earlier shard of that name are taken over. A shard that is as it should be
        stays. Raises FileNotFoundError for an image that is nowhere, OSError naming the shard.
        """
        if not 0 < len(keys) <= SHARD:
            raise ValueError(f"{len(keys)} images for a shard of 1 to {SHARD}")
        path = self.folder / shard_name(curriculum, number)
        loose = [file for key in keys if (file := self.path(key)).is_file()]
        if not loose and [key for key, _, _ in read_members(path)] == list(keys):
            return
        for key in keys:
            if not self.holds(key):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path(key)))
        self._list_classes(path)
        write_whole(path, tar_parts(self._members(keys)))
        fsync_folder(self.folder)
        for file in loose:
            file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove loose files whose bytes lie in a shard, and the class folders that are left empty.

        For a time when no process writes images: a folder may be removed that one is about to write into.
        """
        if self._index is None or not self.folder.is_dir():
            return
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            for file in sorted(folder.glob(f"*{self.suffix}")):
                if file.stem.isdecimal() and self._is_packed(file):
                    file.unlink()
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()

    def _is_packed(self, file: Path) -> bool:
        place = self._index and self._index.find((file.parent.name, int(file.stem)))
        if not place:
            return False
        path, offset, length = place
        with open(path, "rb", buffering=0) as shard:
            return os.pread(shard.fileno(), length, offset) == file.read_bytes()

    def _members(self, keys: Sequence[Key]) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            data = self.read(key)
            if data is None:  # it went since `pack` looked
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path(key)))
            yield f"{stem(*key)}{self.suffix}", data
            yield f"{stem(*key)}.cls", self._labels.get(key[0], key[0]).encode()

    @functools.cached_property
    def _labels(self) -> dict[str, str]:
        """What shards call each class of the run, in label order; nothing where the folder has no record.

        That is its number, as is usual, or its name where a class's name could be taken for a number.
        """
        record = read_json(self.out / RUN_CONFIG) if (self.out / RUN_CONFIG).is_file() else None
        names = record["classes"] if isinstance(record, dict) and "classes" in record else []
        plain = all(name == name.strip() and not name.isdecimal() for name in names)
        return {name: str(number) if plain else name for number, name in enumerate(names)}

    def _list_classes(self, shard: Path) -> None:
        """Write `classes.txt`; several processes may, each beside its own shard."""
        path, text = self.folder / CLASSES, "".join(f"{name}\n" for name in self._labels)
        if not text or (path.is_file() and path.read_text() == text):
            return
        own = shard.with_name(f"{CLASSES}.{shard.stem}{TEMPORARY}")
        write_atomic(own, text.encode())
        os.replace(own, path)
