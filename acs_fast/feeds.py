"""What classifiers are trained on: endless batches of sampled and real images, augmented, on the device."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from acs_fast.augment import random_resized_crop, shift_and_flip, to_device
from acs_fast.distributed import Ranks
from acs_fast.latents import LatentCache
from acs_fast.loader import Balanced

Augment = Callable[[Tensor, bool, torch.Generator], Tensor]
DEPTH = 4  # batches that are read ahead


class Examples(NamedTuple):
    """A batch: images [n, C, H, W], labels int64 [n]; `real` [n], 1 for real and 0 for sampled images.

    total: the images of the batch on all ranks, where each has a part of it; None for a whole batch.
    """

    images: Tensor
    labels: Tensor
    real: Tensor | None = None
    total: int | None = None


def permuted(
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    mirror: bool,
    seed: int,
    device: torch.device,
    augment: Augment = random_resized_crop,
) -> Generator[Examples]:
    """Full batches of an image set in memory; every epoch is a new permutation drawn from `seed`.

    images: [N, C, H, W] in the model's range and any floating dtype, on `device` or, where they are many, on
    the CPU. labels: int64 [N]. A set smaller than a batch is a batch. What is left of an epoch is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(labels))
    labels = labels.to(device)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < batch_size:
            order = torch.randperm(len(labels), generator=generator)
        picked, order = order[:batch_size], order[batch_size:]
        rows = to_device(picked, device)
        chosen = images[rows] if images.device == device else to_device(images[picked], device)
        yield Examples(augment(chosen.float(), mirror, generator), labels[rows])


def from_cache(cache: LatentCache, *, batch_size: int, mirror: bool, seed: int) -> Generator[Examples]:
    """Class-balanced batches of real latents, each the image's or its mirror image's, shifted a little.

    On the host, and without end.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = Balanced(cache.labels, seed)
    for start in itertools.count(step=batch_size):
        picked = torch.tensor([draw(place) for place in range(start, start + batch_size)])
        flipped = torch.rand(batch_size, generator=generator) < (0.5 if mirror else 0.0)
        latents = shift_and_flip(cache.take(picked, flipped), False, generator)
        yield Examples(latents, cache.labels[picked])


def shared(batches: Generator[Examples], ranks: Ranks) -> Generator[Examples]:
    """This rank's part of each batch: all ranks draw the same ones, so that their number changes none."""
    with closing(batches):
        for images, labels, _, _ in batches:
            own = ranks.share(len(labels))
            rows = slice(own.start, own.stop)
            yield Examples(images[rows], labels[rows], total=len(labels))


def mixed(sampled: Generator[Examples], real: Generator[Examples]) -> Generator[Examples]:
    """A batch of each, together: what the real-against-sampled discriminator is trained on."""
    with closing(sampled), closing(real):
        while True:
            yield _together(next(sampled), next(real))


def _together(one: Examples, other: Examples) -> Examples:
    images = torch.cat((one.images, other.images))
    real = torch.zeros(len(images), device=images.device)
    real[len(one.images) :] = 1.0
    total = one.total + other.total if one.total and other.total else None
    return Examples(images, torch.cat((one.labels, other.labels)), real, total)


class Ahead:
    """An iterator that a thread of its own reads ahead; `waited` is what the reader had to wait for.

    The first batches do not count: nothing can be ready before it was asked for. Leave by `close`.
    """

    def __init__(self, batches: Generator[Examples]):
        self.waited, self._count = 0.0, 0
        self._queue: queue.Queue[Examples | BaseException] = queue.Queue(DEPTH)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(batches,), name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Examples:
        started = time.perf_counter()
        item = self._queue.get()
        self._count += 1
        if self._count > DEPTH:
            self.waited += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread, and the batches that it reads."""
        self._ended.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)

    def _read(self, batches: Generator[Examples]) -> None:
        try:
            with closing(batches):
                for batch in batches:
                    self._queue.put(batch)
                    if self._ended.is_set():
                        return
        except BaseException as error:
            self._queue.put(error)
