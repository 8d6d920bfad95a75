"""The real images of an evaluation, read as the distilled set needs them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.data import DIGITS, ImageSet, channels_of, load_images, random_rows, read_listed
from acs_fast.evaluation.protocols import SOFT_RESIZE
from acs_fast.listing import Listing, list_images

Training = Callable[[int], ImageSet]  # the images of a repeat, from its seed
REAL_BYTES = 4 * 2**30  # of real training images that are held in memory at once


@dataclass(frozen=True)
class Real:
    """The real images: their source, and how they are read to fit the distilled set.

    native: the edge in px in which the distilled set lies; size: the edge in which all is evaluated.
    """

    source: str
    classes: tuple[str, ...]
    channels: int
    native: int
    size: int
    _listings: dict[str, Listing] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def mirror(self) -> bool:
        """Whether a mirrored image still shows its class."""
        return self.source != DIGITS

    def load(self, split: str, size: int | None = None) -> ImageSet:
        """All images of a split, resized to `size`, default that of the evaluation."""
        size = size or self.size
        if self.source == DIGITS:
            return resized(load_images(DIGITS, split, self.classes, self.native, self.channels), size)
        listing = self.listing(split)
        return read_listed(listing, torch.arange(len(listing.entries)), size, self.channels)

    def check(self) -> None:
        """InputError where the test images are missing or do not fit; none is decoded in full."""
        if self.source == DIGITS:
            self.load("val")
        else:
            self.listing("val")

    def test(self, soft: bool) -> ImageSet:
        """The test images: shorter side to S, centre cropped to S; soft: shorter side to 256/224 S."""
        if not soft:
            return self.load("val")
        images = self.load("val", round(SOFT_RESIZE * self.size))
        start = (images.images.shape[-1] - self.size) // 2
        stop = start + self.size
        return dataclasses.replace(images, images=images.images[:, :, start:stop, start:stop].contiguous())

    def listing(self, split: str) -> Listing:
        """The files of a split; what is left out is said on stderr, and where the colours differ."""
        if split in self._listings:
            return self._listings[split]
        found = list_images(self.source, split, self.classes)
        if text := found.summary():
            print(text, file=sys.stderr)
        channels = 3 if found.converted else channels_of(found.entries[0])  # some are grey, or all are alike
        if self.channels < channels:
            raise InputError(
                f"the distilled images are grey and those of {self.source} are in colour; make both the same"
            )
        if self.channels > channels and not found.converted:
            print(f"{self.source}: grey images, read as RGB, which the distilled ones are", file=sys.stderr)
        return found

    @functools.cached_property
    def train_labels(self) -> Tensor:
        """int64 [N] of the training images."""
        return self._digits.labels if self.source == DIGITS else self.listing("train").labels

    @functools.cached_property
    def _digits(self) -> ImageSet:
        return self.load("train")

    def take(self, rows: Tensor) -> ImageSet:
        """The training images of these rows, in that order: not all of a data set fit into memory."""
        if self.source == DIGITS:
            return self._digits.take(rows)
        return read_listed(self.listing("train"), rows, self.size, self.channels)

    def random(self, ipc: int, seed: int) -> ImageSet:
        """`ipc` random training images of every class."""
        return self.take(random_rows(self.train_labels, len(self.classes), ipc, seed))

    def sample(self) -> ImageSet:
        """The training images: all, or of each class as many random ones (seed 0) as 4 GiB hold."""
        each = max(1, REAL_BYTES // (self.channels * self.size**2 * len(self.classes)))
        if len(self.train_labels) <= each * len(self.classes):
            return self.take(torch.arange(len(self.train_labels)))
        return self.random(each, 0)


def resized(images: ImageSet, size: int) -> ImageSet:
    """The set in another size, by the antialiased bilinear filter in integers."""
    if images.images.shape[-1] == size:
        return images
    pixels = F.interpolate(images.images, (size, size), mode="bilinear", antialias=True)
    return dataclasses.replace(images, images=pixels)


def fewest(labels: Tensor, num_classes: int) -> int:
    """The number of images of the smallest class."""
    return int(torch.bincount(labels, minlength=num_classes).min())
