"""The samples of a run before they are decoded: what the discriminators are trained on.

`samples/<curriculum>-<start>-<stop>.safetensors` holds `samples` fp32 [stop - start, C, h, w] of the images
start..stop-1 of a curriculum, in the order of `plan.Layout`. How they are cut is left to who wrote them:
another number of ranks cuts otherwise, and files may overlap, with the same samples.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.distributed import Ranks
from acs_fast.plan import Layout, cut
from acs_fast.writer import write_tensors

FOLDER = "samples"
NAME = re.compile(r"(\d+)-(\d+)-(\d+)\.safetensors")
KEPT = 512  # samples of a file that stays


class Samples:
    """The samples of a run folder; shape: (C, h, w) of one."""

    def __init__(self, out: Path, layout: Layout, shape: tuple[int, ...]):
        self.folder, self.layout, self.shape = out / FOLDER, layout, shape
        self.files: dict[int, list[range]] = {}

    def scan(self) -> Samples:
        """Find the files that are there and whole; returns itself."""
        self.files = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if match := NAME.fullmatch(path.name):
                curriculum, start, stop = map(int, match.groups())
                known = 1 <= curriculum <= len(self.layout.ranges)
                if (
                    known
                    and start < stop <= self.layout.size(curriculum)
                    and self._is_whole(path, stop - start)
                ):
                    self.files.setdefault(curriculum, []).append(range(start, stop))
        return self

    def path(self, curriculum: int, numbers: range) -> Path:
        """Where a batch's samples lie."""
        return self.folder / f"{curriculum}-{numbers.start}-{numbers.stop}.safetensors"

    def add(self, curriculum: int, batches: list[range], ranks: Ranks) -> None:
        """Make known to every rank what each has written of a curriculum: no rank looks into the folder.

        Folders on a network show new names late, but a file that is opened by name is there.
        """
        self.files.setdefault(curriculum, []).extend(part for own in ranks.collect(batches) for part in own)

    def held(self, curriculum: int) -> np.ndarray:
        """Which images of a curriculum have their sample here, bool [size]."""
        found = np.zeros(self.layout.size(curriculum), bool)
        for part in self.files.get(curriculum, ()):
            found[part.start : part.stop] = True
        return found

    def read(self, curriculum: int, numbers: range) -> Tensor:
        """fp32 [n, C, h, w] of images of a curriculum. InputError for a file that is gone or damaged."""
        found = torch.empty(len(numbers), *self.shape)
        left = np.ones(len(numbers), bool)
        for part in sorted(self.files.get(curriculum, ()), key=lambda part: part.start):
            start, stop = max(part.start, numbers.start), min(part.stop, numbers.stop)
            own = slice(start - numbers.start, stop - numbers.start)
            if start < stop and left[own].any():
                found[own] = self._read_part(
                    self.path(curriculum, part), start - part.start, stop - part.start
                )
                left[own] = False
        if left.any():
            raise gone(self.folder / f"{curriculum}-*.safetensors")
        return found

    def keep(self, ranks: Ranks) -> None:
        """Cut the files of a whole run anew, the same for every way it came about, or leave them so."""
        wanted = {
            curriculum: cut(self.layout.size(curriculum), KEPT)
            for curriculum in range(1, len(self.layout.ranges) + 1)
        }
        parts = [(curriculum, part) for curriculum, cuts in wanted.items() for part in cuts]
        for curriculum, part in (parts[i] for i in ranks.share(len(parts))):
            if part not in self.files.get(curriculum, ()):
                write_tensors(self.path(curriculum, part), {"samples": self.read(curriculum, part)})
        ranks.barrier()
        if ranks.leads:
            names = {self.path(curriculum, part).name for curriculum, part in parts}
            known = {
                self.path(curriculum, part) for curriculum in self.files for part in self.files[curriculum]
            }
            for path in known.union(self.folder.iterdir()):  # the folder may show new names late
                if path.name not in names:
                    path.unlink(missing_ok=True)
        self.files = wanted

    def remove(self) -> None:
        """Remove them all: the run is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_whole(self, path: Path, count: int) -> bool:
        try:
            with safe_open(path, "pt") as file:
                return tuple(file.get_slice("samples").get_shape()) == (count, *self.shape)
        except (SafetensorError, OSError):
            return False

    def _read_part(self, path: Path, start: int, stop: int) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                part: Tensor = file.get_slice("samples")[start:stop]
                return part
        except (SafetensorError, OSError) as error:
            raise gone(path) from error


def gone(path: Path) -> InputError:
    """What to do about samples that cannot be read."""
    return InputError(f"{path} is gone or damaged; run the command again to make it anew")
