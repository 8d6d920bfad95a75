"""Decode and crop by Pillow, on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.listing import Entry, open_rgb
from acs_fast.loader.pixels import batch, resized
from acs_fast.loader.request import Crop, Request

THREADS = 2


def decode(
    requests: Iterator[Request], size: int, channels: int, device: torch.device
) -> Iterator[tuple[Request, Tensor]]:
    """Each request with its images, fp32 [B, C, S, S] in [-1, 1]; the next one is decoded meanwhile."""

    def one(job: tuple[Entry, bytes, Crop]) -> Tensor:
        return resized(box(*job, channels), size)

    with ThreadPoolExecutor(THREADS, "decode") as pool:
        waiting: deque[tuple[Request, Iterator[Tensor]]] = deque()
        for request in requests:
            jobs = zip(request.entries, request.data, request.crops, strict=True)
            waiting.append((request, pool.map(one, jobs)))
            if len(waiting) > 1:
                done, images = waiting.popleft()
                yield done, batch(list(images), done.crops, device)
        for done, images in waiting:
            yield done, batch(list(images), done.crops, device)


def box(entry: Entry, data: bytes, crop: Crop, channels: int) -> Tensor:
    """The wanted part of one image, uint8 [H, W, C], not mirrored."""
    try:
        image = open_rgb(data, channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {entry.name} cannot be read ({error}); remove or replace it") from error
    part = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    return torch.from_numpy(np.array(part).reshape(crop.height, crop.width, channels))
