"""Tar shards of a run's images: their bytes, and where in them each image lies.

A shard holds of every image `<class>_<index>.png` and `<class>_<index>.cls`, as WebDataset has it: a sample's
name ends at its first dot. The class is percent-encoded, so that any folder name can stand there and be read
back. The bytes are a function of the images alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

SHARD = 1000  # images, at most
BLOCK = 512  # bytes, of a tar file
NAME = re.compile(r"\d{2,}-\d{5,}\.tar")
RACY = 2_000_000_000  # ns: a folder that changed so lately may change again without another time of change


def shard_name(curriculum: int, number: int) -> str:
    """The file of the number-th shard of a curriculum."""
    return f"{curriculum:02d}-{number:05d}.tar"


def stem(name: str, index: int) -> str:
    """What the members of an image are called before the dot: ASCII, and one image's alone."""
    return f"{quote(name, safe='').replace('.', '%2E')}_{index:06d}"


def key_of(member: str) -> tuple[str, int] | None:
    """(class, index) of an image's member; None for another member."""
    head, _, suffix = member.partition(".")
    name, _, digits = head.rpartition("_")
    if suffix != "png" or not (name and digits.isascii() and digits.isdigit()):
        return None
    return unquote(name), int(digits)


def tar_parts(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of a tar file of (name, content), a part a member; owner, mode and time never differ."""
    for name, data in members:
        info = tarfile.TarInfo(name)  # mode 644, owner 0, time 0
        info.size = len(data)
        yield info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)
    yield bytes(2 * BLOCK)


def read_members(path: Path) -> Iterator[tuple[tuple[str, int], int, int]]:
    """The images of a shard of ours: (class, index), offset in bytes, length.

    Headers alone are read. It ends before a damaged header or a member that is cut short; of a file that is
    not there, there are none.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        position, long = 0, b""
        while header := parse(os.pread(descriptor, BLOCK, position)):
            name, length, kind = header
            position += BLOCK
            if position + length > size:
                return
            if kind == tarfile.GNUTYPE_LONGNAME:
                long = os.pread(descriptor, length, position).rstrip(b"\0")
            else:
                key = key_of((long or name).decode("ascii", "replace"))
                if key is not None:
                    yield key, position, length
                long = b""
            position += -(-length // BLOCK) * BLOCK


def parse(block: bytes) -> tuple[bytes, int, bytes] | None:
    """Name, length and type of a tar header; None at the archive's end and for a damaged one."""
    if len(block) < BLOCK or not block[0]:
        return None
    try:
        checksum, length = int(block[148:156].rstrip(b"\0 "), 8), int(block[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    return block[:100].partition(b"\0")[0], length, block[156:157]


class ShardIndex:
    """Where each image of a folder's shards lies; 32 bytes of memory an image.

    A shard's headers are read once. Shards that came, went or were replaced since, whoever did it, are
    noticed by the folder's time of change. Threads may share an index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._changed: int | None = None  # ns: the folder's time of change when it was last read
        self._stamps: dict[str, tuple[int, int, int]] = {}  # of each shard file
        self._shards: list[str] = []  # by number; a file that is replaced gets a new one
        self._classes: dict[str, int] = {}
        # codes int64 [N], ascending, of class and index; shard number, offset, length int64 [N, 3]
        self._table = np.empty(0, np.int64), np.empty((0, 3), np.int64)

    def find(self, key: tuple[str, int]) -> tuple[Path, int, int] | None:
        """The shard's path, the offset in bytes and the length of an image; None for one in no shard."""
        self._refresh()
        codes, places = self._table
        code = self._code(key)
        row = int(np.searchsorted(codes, code)) if code is not None else len(codes)
        if row == len(codes) or codes[row] != code:
            return None
        shard, offset, length = places[row].tolist()
        return self.folder / self._shards[shard], offset, length

    def _code(self, key: tuple[str, int]) -> np.int64 | None:
        number = self._classes.get(key[0])
        return None if number is None else np.int64(number << 32 | key[1])

    def _refresh(self) -> None:
        """Read the headers of shards that are new, forget those that are gone, if the folder has changed."""
        if folder_time(self.folder) == self._changed:
            return
        with self._lock:
            changed = folder_time(self.folder)
            if changed == self._changed:
                return  # another thread has been faster
            stamps = shard_stamps(self.folder)
            known = {name for name, stamp in self._stamps.items() if stamps.get(name) == stamp}
            if len(known) < len(stamps) or len(known) < len(self._stamps):
                self._rebuild(known, sorted(stamps.keys() - known))
            self._stamps = stamps
            settled = changed is not None and abs(time.time_ns() - changed) > RACY
            self._changed = changed if settled else None

    def _rebuild(self, known: set[str], new: list[str]) -> None:
        """Keep the rows of known shards and add those of new ones."""
        codes, places = self._table
        latest = {name: number for number, name in enumerate(self._shards)}
        kept = np.isin(places[:, 0], [latest[name] for name in known])
        all_codes, all_places = [codes[kept]], [places[kept]]
        for name in new:
            self._shards.append(name)
            rows = list(read_members(self.folder / name))
            for (label, _), _, _ in rows:
                self._classes.setdefault(label, len(self._classes))
            all_codes.append(np.array([self._code(key) for key, _, _ in rows], np.int64))
            found = [(len(self._shards) - 1, offset, length) for _, offset, length in rows]
            all_places.append(np.array(found, np.int64).reshape(-1, 3))
        codes, places = np.concatenate(all_codes), np.concatenate(all_places)
        order = np.argsort(codes, kind="stable")
        self._table = codes[order], places[order]


def folder_time(folder: Path) -> int | None:
    """When names in a folder last changed, in ns; None where there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except FileNotFoundError:
        return None


def shard_stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells a shard's file from one that takes its place, by name."""
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if NAME.fullmatch(path.name):
                stat = path.stat()
                found[path.name] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found
