"""The manifest: a row an image, written by every process for itself and merged in the images' order.

`manifest.jsonl` holds the merged rows; a process appends to `manifest.<rank>.jsonl`, a batch in one write,
once the batch's images are on disk. A row that a kill cut short is none. Of an image's rows the last counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from acs_fast.images import Images, Key
from acs_fast.writer import MANIFEST, fsync_folder, write_whole

VERIFIERS = 4  # threads that read and hash images
FIELDS = {"class": str, "index": int, "curriculum": int, "sha256": str}  # what makes a line a row


class Manifest:
    """What one process writes: encoded images, then their rows."""

    def __init__(self, out: Path, images: Images | None = None, rank: int = 0):
        self.out, self.images = out, images or Images(out)
        self.path = out / f"manifest.{rank}.jsonl"

    def append(
        self, encoded: Iterable[bytes], rows: list[dict[str, Any]], pool: Executor | None = None
    ) -> None:
        """Write a batch's encoded images, then its rows, to which it adds each file's SHA-256.

        pool: writes the images, several at once: each waits for the disk. None of them goes on after this
        has returned or raised the first error.
        """
        if pool is None:
            for data, row in zip(encoded, rows, strict=True):
                self._put(data, row)
        else:
            pairs = list(zip(encoded, rows, strict=True))  # an error of the encoding before the first write
            futures = [pool.submit(self._put, data, row) for data, row in pairs]
            wait(futures)
            for future in futures:
                future.result()
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            # after a line that a kill cut short, or a full disk, the next one begins anew
            file.write(lines if new or whole_end(self.path) else b"\n" + lines)
            os.fsync(file.fileno())

    def _put(self, data: bytes, row: dict[str, Any]) -> None:
        self.images.write((row["class"], row["index"]), data)
        row["sha256"] = hashlib.sha256(data).hexdigest()


class Rows:
    """The rows of a run folder, by the images' numbers: where each lies, not what it says.

    order: the number 0..total-1 of an image, None for one that is not of the run. num_ranks: the processes
    whose files are there though the folder's listing may not have them yet, as on a network.
    """

    def __init__(self, out: Path, order: Callable[[str, int], int | None], total: int, num_ranks: int = 0):
        self.out, self.files = out, row_files(out, num_ranks)
        self.places = np.full((total, 2), -1, np.int64)  # file, offset
        for number, path in enumerate(self.files):
            for offset, row in rows_of(path):
                if (place := order(row["class"], row["index"])) is not None:
                    self.places[place] = number, offset

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Every image that has a row, in order: its number and its line."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "rb")) for path in self.files]
            for place in np.nonzero(self.places[:, 0] >= 0)[0].tolist():
                number, offset = self.places[place].tolist()
                files[number].seek(offset)
                yield place, files[number].readline()

    def verify(self, images: Images) -> Iterator[tuple[int, bool]]:
        """Every image that has a row, in order: its number, and if its file is the one written then."""

        def same(item: tuple[int, bytes]) -> tuple[int, bool]:
            row = json.loads(item[1])
            data = images.read((row["class"], row["index"]))
            return item[0], data is not None and hashlib.sha256(data).hexdigest() == row["sha256"]

        with ThreadPoolExecutor(VERIFIERS, "verify") as pool:
            pending: list[Any] = []
            for item in self.read():
                pending.append(pool.submit(same, item))
                if len(pending) == 64:
                    yield from (future.result() for future in pending)
                    pending = []
            yield from (future.result() for future in pending)

    def merge(self) -> None:
        """Make `manifest.jsonl` of these rows, in order, and remove the processes' own files."""
        write_whole(self.out / MANIFEST, (line.rstrip(b"\n") + b"\n" for _, line in self.read()))
        fsync_folder(self.out)
        for path in self.files:
            if path.name != MANIFEST:
                path.unlink(missing_ok=True)


def row_files(out: Path, num_ranks: int = 0) -> list[Path]:
    """The merged rows first, then those of the processes; those of `num_ranks` are looked for by name."""
    merged = [out / MANIFEST] if (out / MANIFEST).is_file() else []
    known = {path for rank in range(num_ranks) if (path := Manifest(out, rank=rank).path).is_file()}
    return merged + sorted(known.union(out.glob("manifest.*.jsonl")))


def read_rows(out: Path) -> dict[Key, dict[str, Any]]:
    """Every image's row."""
    found = {}
    for path in row_files(out):
        for _, row in rows_of(path):
            found[row["class"], row["index"]] = row
    return found


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one file with the offsets of their lines; what is no row is left out."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):  # cut short by a kill
                row = json.loads(line)
                if isinstance(row, dict) and all(type(row.get(k)) is kind for k, kind in FIELDS.items()):
                    yield offset, row
            offset += len(line)


def whole_end(path: Path) -> bool:
    """Whether a file is empty or ends with a whole line."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"
