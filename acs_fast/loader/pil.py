"""Decode and crop by Pillow, on threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.listing import Entry, open_rgb
from acs_fast.loader.request import Crop, Request

THREADS = 2


def decode(
    requests: Iterator[Request], size: int, channels: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Request, Tensor]]:
    """Each request with its images, fp32 [B, C, S, S] in [-1, 1]; the next one is decoded meanwhile."""
    with ThreadPoolExecutor(THREADS, "decode") as pool:

        def start(request: Request) -> tuple[Request, Iterator[Tensor]]:
            jobs = zip(request.entries, request.data, request.crops, strict=True)
            return request, pool.map(partial(_decode, size=size, channels=channels), jobs)

        waiting: list[tuple[Request, Iterator[Tensor]]] = []
        for request in requests:
            waiting.append(start(request))
            if len(waiting) > 1:
                yield _finish(*waiting.pop(0), device)
        for request, images in waiting:
            yield _finish(request, images, device)


def _decode(job: tuple[Entry, bytes, Crop], size: int, channels: int) -> Tensor:
    return decode_one(*job, size, channels)


def decode_one(entry: Entry, data: bytes, crop: Crop, size: int, channels: int) -> Tensor:
    """One image as uint8 [C, S, S]: its box resized by the triangle filter, widened where it shrinks.

    Beyond the box its border is repeated, as DALI does; Pillow alone would leave out what lies there.
    """
    try:
        image = open_rgb(data, channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {entry.name} cannot be read ({error}); remove or replace it") from error
    pixels = np.asarray(image)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if (crop.width, crop.height) != (size, size):
        reach = max(1, -(-max(crop.width, crop.height) // size))
        padding = ((reach, reach), (reach, reach), (0, 0))[: pixels.ndim]
        padded = Image.fromarray(np.pad(pixels, padding, mode="edge"))
        box = (reach, reach, reach + crop.width, reach + crop.height)
        pixels = np.asarray(padded.resize((size, size), Image.Resampling.BILINEAR, box))
    pixels = pixels.reshape(size, size, channels)
    pixels = pixels[:, ::-1] if crop.flip else pixels
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _finish(request: Request, images: Iterator[Tensor], device: torch.device) -> tuple[Request, Tensor]:
    return request, (torch.stack(list(images)).float() / 127.5 - 1.0).to(device)
