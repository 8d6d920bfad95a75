"""Batches of real images from a listing, decoded by DALI or by Pillow: the same pixels, within a grey level.

Both decoders get the same encoded bytes and the same integer crop boxes, drawn on the host; resize, flip
and normalisation are PyTorch's after either (`pixels.py`). So a batch is a function of (seed, step), a
stream is resumed by its step, ranks and workers change nothing, and the loaders differ by their JPEG
decoder's rounding at most.

DALI runs on threads and, on a GPU, a stream of its own; batches are copied into tensors of PyTorch's
outside of every captured graph. A capture is `thread_local` and the graphs own their memory, so neither
sees the other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.listing import Entry, Listing, read_bytes
from acs_fast.loader import dali, pil
from acs_fast.loader.request import Crop, Request

AREA, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of a training crop
ATTEMPTS = 10
READ_AHEAD = 3  # batches whose files are read while another is decoded


class Batch(NamedTuple):
    """images: fp32 [B, C, S, S] in [-1, 1]; labels: int64 [B]; rows: int64 [B], places in the listing."""

    images: Tensor
    labels: Tensor
    rows: Tensor


def resolve_loader(choice: str) -> str:
    """`dali` or `pil`; `auto` is DALI where it is installed. InputError for a DALI that is not."""
    if choice == "auto":
        return "dali" if dali.why_not() is None else "pil"
    if choice == "dali" and (reason := dali.why_not()):
        raise InputError(f"--loader dali: {reason}; pip install 'acs-fast[dali]', or use --loader pil")
    return choice


def ordered(
    listing: Listing,
    rows: Sequence[int],
    *,
    size: int,
    channels: int,
    batch_size: int,
    loader: str,
    device: torch.device,
) -> Iterator[Batch]:
    """Every row once, in that order: the central square, resized to `size`; the last batch may be short."""
    parts = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    requests = ([(row, centre(listing.entries[row])) for row in part] for part in parts)
    yield from _batches(listing, requests, size, channels, batch_size, loader, device)


def stream(
    listing: Listing,
    *,
    size: int,
    channels: int,
    batch_size: int,
    loader: str,
    device: torch.device,
    seed: int,
    mirror: bool,
    rank: int = 0,
    num_ranks: int = 1,
    step: int = 0,
) -> Iterator[Batch]:
    """Training batches without end: class-balanced, shuffled, random-resized crops, flips if `mirror`.

    Batch number `step` is a function of the arguments alone, so a stream goes on where another ended. A rank
    gets its own part of each batch of `batch_size`. Every class comes equally often.
    """
    draw = Balanced(listing.labels, seed)
    own = range(batch_size * rank // num_ranks, batch_size * (rank + 1) // num_ranks)

    def requests() -> Iterator[list[tuple[int, Crop]]]:
        number = step
        while True:
            places = range(number * batch_size + own.start, number * batch_size + own.stop)
            picked = [(draw(place), place) for place in places]
            yield [(row, training_crop(listing.entries[row], seed, place, mirror)) for row, place in picked]
            number += 1

    yield from _batches(listing, requests(), size, channels, len(own), loader, device)


class Balanced:
    """The row at each place of an endless order: rounds of all classes, each class a permutation in turn."""

    def __init__(self, labels: Tensor, seed: int):
        self.seed, self.members = (
            seed,
            [torch.nonzero(labels == y)[:, 0] for y in range(int(labels.max()) + 1)],
        )
        self._round: tuple[int, list[int]] = (-1, [])
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __call__(self, place: int) -> int:
        number, position = divmod(place, len(self.members))
        if self._round[0] != number:
            self._round = number, torch.randperm(len(self.members), generator=self._by(0, number)).tolist()
        label = self._round[1][position]
        turn, within = divmod(number, len(self.members[label]))
        if label not in self._orders or self._orders[label][0] != turn:
            order = torch.randperm(len(self.members[label]), generator=self._by(1 + label, turn))
            self._orders[label] = turn, self.members[label][order].tolist()
        return self._orders[label][1][within]

    def _by(self, stream: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(_mix(self.seed, stream, number))


def centre(entry: Entry) -> Crop:
    """The central square."""
    edge = min(entry.width, entry.height)
    return Crop((entry.width - edge) // 2, (entry.height - edge) // 2, edge, edge, False)


def training_crop(entry: Entry, seed: int, place: int, mirror: bool) -> Crop:
    """A box of area 0.5 to 1 and aspect 3/4 to 4/3, the first of ten draws that fits, else the centre."""
    u = torch.rand(ATTEMPTS + 1, 4, generator=torch.Generator().manual_seed(_mix(seed, -1, place))).tolist()
    flip = mirror and u[ATTEMPTS][0] < 0.5
    for area, ratio, left, top in u[:ATTEMPTS]:
        pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * entry.width * entry.height
        aspect = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
        width, height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < width <= entry.width and 0 < height <= entry.height:
            x, y = int(left * (entry.width - width + 1)), int(top * (entry.height - height + 1))
            return Crop(x, y, width, height, flip)
    return centre(entry)._replace(flip=flip)


def _mix(*numbers: int) -> int:
    """A seed of several numbers: splitmix64's steps over them."""
    value = 0x9E3779B97F4A7C15
    for number in numbers:
        value = (value ^ (number % 2**64)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value % 2**63


def _batches(
    listing: Listing,
    requests: Iterator[list[tuple[int, Crop]]],
    size: int,
    channels: int,
    batch_size: int,
    loader: str,
    device: torch.device,
) -> Iterator[Batch]:
    if not batch_size:  # a rank of more than there are images in a batch
        images, none = torch.empty(0, channels, size, size, device=device), torch.empty(0, dtype=torch.long)
        yield from (Batch(images, none.to(device), none) for _ in requests)
        return
    with ThreadPoolExecutor(4, "read") as readers:

        def read(picked: list[tuple[int, Crop]]) -> Request:
            entries = [listing.entries[row] for row, _ in picked]
            data = [read_bytes(entry) for entry in entries]
            crops = [crop for _, crop in picked]
            return Request([row for row, _ in picked], entries, data, crops)

        def ahead() -> Iterator[Request]:
            under_way: deque[Future[Request]] = deque()
            for picked in requests:
                under_way.append(readers.submit(read, picked))
                if len(under_way) > READ_AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

        if loader == "dali":
            decoded = dali.decode(ahead(), size, channels, batch_size, device)
        else:
            decoded = pil.decode(ahead(), size, channels, device)
        for request, images in decoded:
            rows = torch.tensor(request.rows)
            labels = torch.tensor([entry.label for entry in request.entries])
            yield Batch(images, labels.to(device), rows)
