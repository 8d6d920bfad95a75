"""Decode boxes by NVIDIA DALI: on the CPU, or half on the GPU (nvJPEG) where that is the device.

What follows the decode is PyTorch's. DALI has operators for it, but its resize on a CPU takes longer than
its decode (benchmarks/README.md), and so both loaders share every later step.
"""

from __future__ import annotations

import importlib.util
import io
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.loader import pil
from acs_fast.loader.pixels import batch, resized
from acs_fast.loader.request import Crop, Request

THREADS = 2
JPEG = b"\xff\xd8"  # how one begins
AHEAD = 2  # batches that DALI holds ready


def why_not() -> str | None:
    """Why DALI cannot serve, or None."""
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return None if found else "nvidia-dali is not installed"


def decode(
    requests: Iterator[Request], size: int, channels: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Request, Tensor]]:
    """Each request with its images, fp32 [B, C, S, S] in [-1, 1] on `device`; the next ones are under way."""
    from nvidia.dali import fn, pipeline_def, types  # deferred: an optional package

    on_gpu = device.type == "cuda"
    grey = channels == 1

    under_way: deque[Request] = deque()

    def served(request: Request) -> list[bool]:
        """Which images DALI decodes as Pillow does; as grey only JPEGs, whose luma both take."""
        pairs = zip(request.entries, request.data, strict=True)
        return [entry.plain and (not grey or data.startswith(JPEG)) for entry, data in pairs]

    def source() -> Iterator[tuple[list[np.ndarray], ...]]:
        for request in requests:
            plain = served(request)
            data = [d if p else PLACEHOLDER for d, p in zip(request.data, plain, strict=True)]
            boxes = [c if p else WHOLE for c, p in zip(request.crops, plain, strict=True)]
            under_way.append(request)
            yield (
                [np.frombuffer(d, np.uint8) for d in data],
                list(np.array([(c.top, c.left) for c in boxes], np.int32)),
                list(np.array([(c.height, c.width) for c in boxes], np.int32)),
            )

    @pipeline_def(
        batch_size=batch_size,
        num_threads=THREADS,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=AHEAD,
    )
    def pipeline() -> Any:
        encoded, start, shape = fn.external_source(source=source(), num_outputs=3, batch=True)
        return fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.GRAY if grey else types.RGB,
            jpeg_fancy_upsampling=True,  # as libjpeg and Pillow do
            device="mixed" if on_gpu else "cpu",
        )

    pipe = pipeline()
    pipe.build()
    while True:
        try:
            (output,) = pipe.run()
        except StopIteration:
            return
        except RuntimeError as error:
            first, last = under_way[0].entries[0].name, under_way[0].entries[-1].name
            reason = str(error).strip().splitlines()[0][:120]
            raise InputError(
                f"DALI cannot decode one of {first} ... {last} ({reason}); use --loader pil"
            ) from error
        request = under_way.popleft()
        jobs = zip(request.entries, request.data, request.crops, strict=True)
        images = []
        for row, (job, own) in enumerate(zip(jobs, served(request), strict=True)):
            box = torch.utils.dlpack.from_dlpack(output[row]) if own else pil.box(*job, channels).to(device)
            images.append(resized(box, size))
        done = batch(images, request.crops, device)
        if on_gpu:  # DALI may write into the boxes' memory again as soon as they are dropped
            torch.cuda.current_stream(device).synchronize()
        yield request, done


def _placeholder() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, format="PNG")
    return buffer.getvalue()


PLACEHOLDER = _placeholder()  # decoded instead of what is left to Pillow
WHOLE = Crop(0, 0, 2, 2, False)
