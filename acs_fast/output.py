"""What follows sampling: decode, bytes, files; on a stream and threads of their own beside the next batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.manifest import Manifest
from acs_fast.ops import Op
from acs_fast.writer import write_tensors

FILES = 8  # images that are on their way to the disk at once: each waits for it some milliseconds
Scores = tuple[Tensor, Tensor]  # correct bool [n], loss fp32 [n]
Locate = Callable[[], tuple[int, int] | None]


@dataclass(frozen=True)
class Batch:
    """A batch on the host, or on its way there: the tensors are filled once `ready` has come."""

    samples: Tensor  # fp32 [n, C, h, w]
    images: Tensor  # uint8 [n, H, W, C]
    finite: Tensor  # bool [2, n]: the sample, the decoded image
    scores: Scores | None
    ready: torch.cuda.Event | None
    samples_path: Path | None  # None: the samples are not needed any more
    rows: list[dict[str, Any]]
    locate: Locate | None


class NotFinite(Exception):
    """A batch that may not be written; the main thread says where it went wrong."""

    def __init__(self, batch: Batch):
        super().__init__()
        samples, images = batch.finite.tolist()
        self.sampled = all(samples)  # then it was the VAE
        self.row = (images if self.sampled else samples).index(False)
        self.rows, self.locate = batch.rows, batch.locate


class Output:
    """The half of a batch that follows sampling: decode, bytes, files; on its own stream and threads.

    decode: latents [n, C, h, w] to images [n, C', H, W] in [-1, 1]; None where samples are images.
    to_uint8: the op. workers: threads that encode. depth: batches in flight, at most.
    On CUDA decoding runs on a second stream beside the next batch; on a CPU within `submit`. One thread
    writes the batches in the order of their submission: samples, images, manifest rows; the images of a
    batch several at once. The manifest and its files are that thread's until `flush` returns. Leave by
    `with`: a clean exit flushes; one by an exception finishes what is in flight and keeps the exception.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        decode: Callable[[Tensor], Tensor] | None,
        to_uint8: Op,
        workers: int = 2,
        depth: int = 2,
    ):
        self.manifest, self.decode, self.to_uint8, self.depth = manifest, decode, to_uint8, depth
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0  # seconds that submit() was blocked because `depth` batches were in flight
        self._in_flight: deque[Future[None]] = deque()
        self._failed = False
        self._writer = ThreadPoolExecutor(1, "write")  # one thread: batches stay in order
        self._encoders = ThreadPoolExecutor(workers, "encode")
        self._files = ThreadPoolExecutor(FILES, "file")

    def submit(
        self,
        samples: Tensor,
        samples_path: Path | None,
        rows: list[dict[str, Any]],
        scores: Scores | None = None,
        locate: Locate | None = None,
    ) -> None:
        """Take over a batch; returns before it is written, and blocks while `depth` batches are in flight.

        samples: fp32 [m, C, h, w] on the device, from now on Output's. rows: class, index, curriculum and
        what else the manifest is to say of each of the first n samples (the others are padding); scores fill
        `discriminator_correct` and `discriminator_loss`. samples_path: None where samples are not kept.
        locate: runs the batch again and returns (row, step) where it first was not finite, or None; called
        by a later submit or flush, if at all. Raises the first error of an earlier batch, once (InputError
        where one was not finite), and RuntimeError after that.
        """
        self._raise_error()
        if len(self._in_flight) >= self.depth:
            started = time.perf_counter()
            wait([self._in_flight[0]])
            self.waited += time.perf_counter() - started
            self._raise_error()
        if self._failed:
            self.flush()  # raises the error, unless that was done
            raise RuntimeError("an earlier batch failed, so this one would not be written")
        batch = Batch(*self._start(samples, scores, len(rows)), samples_path, rows, locate)
        self._in_flight.append(self._writer.submit(self._write, batch))

    def flush(self) -> None:
        """Wait until all that was submitted is on disk; raises the first error, once."""
        wait(self._in_flight)
        self._raise_error()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
            else:
                wait(self._in_flight)
        finally:  # interrupted once more, it gives up the batches that no thread has begun
            self._writer.shutdown(cancel_futures=True)
            self._encoders.shutdown()
            self._files.shutdown()

    def _start(
        self, samples: Tensor, scores: Scores | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Scores | None, torch.cuda.Event | None]:
        """Decode and copy to the host: on CUDA only enqueued, and there when the returned event has come."""
        scores = None if scores is None else (scores[0][:count], scores[1][:count])
        if self.stream is None:
            return (*self._decode(samples, count), scores, None)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for tensor in (samples, *(scores or ())):
                tensor.record_stream(self.stream)  # Python may free it before this stream has read it
            kept, images, finite = (to_host(tensor) for tensor in self._decode(samples, count))
            if scores is not None:
                scores = to_host(scores[0]), to_host(scores[1])
            ready = torch.cuda.Event(blocking=True)  # the thread that waits sleeps
            ready.record(self.stream)
        return kept, images, finite, scores, ready

    @torch.no_grad()
    def _decode(self, samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first samples, images as bytes [n, H, W, C], and which of both are finite [2, n]."""
        images = samples if self.decode is None else self.decode(samples)
        samples, images = samples[:count].contiguous(), images[:count].contiguous()
        finite = [torch.isfinite(values).flatten(1).all(dim=1) for values in (samples, images)]
        return samples, self.to_uint8(images), torch.stack(finite)

    def _write(self, batch: Batch) -> None:
        """One batch, in the writing thread; after an error it writes no later one."""
        if self._failed:
            return
        try:
            if batch.ready is not None:
                batch.ready.synchronize()
            if not batch.finite.all():
                raise NotFinite(batch)
            encoded = self._encoders.map(self.manifest.images.encode, batch.images)
            if batch.samples_path is not None:
                write_tensors(batch.samples_path, {"samples": batch.samples})
            none: list[None] = [None] * len(batch.rows)
            correct, loss = (values.tolist() for values in batch.scores) if batch.scores else (none, none)
            for row, right, value in zip(batch.rows, correct, loss, strict=True):
                row |= {"discriminator_correct": right, "discriminator_loss": value}
            self.manifest.append(encoded, batch.rows, self._files)
        except BaseException:  # the future hands it to the main thread
            self._failed = True
            raise

    def _raise_error(self) -> None:
        """Forget the batches that are written; raise what befell one that is not."""
        while self._in_flight and self._in_flight[0].done():
            try:
                self._in_flight.popleft().result()
            except NotFinite as error:
                raise InputError(explain(error)) from None


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, filled when the current stream comes to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def explain(error: NotFinite) -> str:
    """The sentence for a sample that is not finite; runs the batch again to find the step, if it can."""
    place = error.locate() if error.locate is not None and not error.sampled else None
    row, step = place or (error.row, None)
    item = error.rows[row]
    text = f"class {item['class']} index {item['index']} of curriculum {item['curriculum']} is not finite"
    if error.sampled:
        return f"{text} after the VAE; use --dtype fp32"
    where = "" if step is None else f" at step {step}"
    return f"{text}{where}; check the model's weights or lower --guidance-scale"
