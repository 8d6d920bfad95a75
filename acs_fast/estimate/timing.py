"""Seconds of a run's parts, each from a few calls on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast.augment import random_resized_crop, shift_and_flip
from acs_fast.estimate.needs import Work
from acs_fast.generator import ImageGenerator
from acs_fast.models.classifier import build_classifier
from acs_fast.networks import LARGE

LONG = 1.0  # seconds: what takes longer on a CPU is called once more at most, and for fewer images
ONCE = 10.0  # seconds: what takes longer on a CPU is not called again
ENOUGH, CALLS = 0.2, 10  # a call is repeated until all took so many seconds, and at most so often


@dataclass(frozen=True)
class Seconds:
    """Of one part each, and of what is left of the run on the rank that has most to do."""

    step: float  # of the denoiser and the update, a batch
    guidance: float  # that a guided step takes longer, a batch
    decode: float  # a batch
    training_step: float
    sampling: float
    training: float

    @property
    def total(self) -> float:
        """Until the last image."""
        return self.sampling + self.training


def measure(
    generator: ImageGenerator, work: Work, *, bucket: int, num_ranks: int, num_classes: int
) -> Seconds:
    """Times what `work` needs; a part that it does not need takes no time, and is not timed."""
    step = guidance = decode = training_step = 0.0
    if work.images:
        label = generator.engine.class_labels[0] if generator.engine is not None else 0
        step = generator.seconds_per_step(bucket, label)
        decode = _seconds_per_decode(generator, bucket)
    if work.rank_guided_batches and work.guided_steps:
        guidance = _seconds_of_guidance(generator, num_classes, bucket, step)
    if work.training_steps:
        batch = -(-work.training_images // work.training_steps)
        learners = 1 if generator.config.deterministic else num_ranks
        training_step = _seconds_per_training_step(generator, num_classes, batch, learners)
    batches = work.rank_images / bucket  # a batch that is not full is decoded as it is
    guided = work.rank_guided_batches * work.guided_steps
    sampling = work.rank_batches * work.steps * step + guided * guidance + batches * decode
    return Seconds(step, guidance, decode, training_step, sampling, work.training_steps * training_step)


def timed(
    make: Callable[[int], Callable[[], object]], count: int, device: torch.device, together: int | None = None
) -> float:
    """Seconds of a call for `count` images, at most `together` at a time; make(n): the call for n images.

    On a CPU a sixteenth of the images is tried first, and stands for all of them if they would take long.
    """
    n = min(count, together or count)
    if device.type == "cpu" and (seconds := _clock(make(part := max(1, n // 16)), device)) * n / part > LONG:
        return seconds * count / part
    return _clock(make(n), device) * count / n


def _clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: the mean of those after a first one.

    On a CPU a first call that was long is tried once more and the shorter counts: threads that start while
    the machine is busy can take a hundred times as long. One of more than `ONCE` is taken as it is.
    """
    seconds: list[float] = []
    while len(seconds) < 2 or (sum(seconds[1:]) < ENOUGH and len(seconds) < CALLS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        if device.type == "cpu" and (seconds[0] > ONCE or (seconds[0] > LONG and len(seconds) == 2)):
            return min(seconds)
    return sum(seconds[1:]) / (len(seconds) - 1)


def _network(generator: ImageGenerator, num_classes: int) -> nn.Module:
    """An untrained discriminator; the state of the random numbers stays as it is."""
    channels, size = generator.seen_shape()
    with torch.random.fork_rng(devices=[]):
        network = build_classifier(generator.config.discriminator, channels, num_classes, size)
    return network.to(generator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _samples(generator: ImageGenerator, count: int) -> Tensor:
    shape = generator.shape
    size = (count, shape.in_channels, shape.input_size, shape.input_size)
    return torch.full(size, 0.1, device=generator.device)


def _seconds_per_decode(generator: ImageGenerator, bucket: int) -> float:
    """Of a batch."""
    vae, edge = generator.vae, generator.shape.input_size
    if vae is None:
        return 0.0
    together = max(1, vae.budget // vae.bytes_per_image(edge, edge))
    return timed(lambda n: partial(vae.decode, _samples(generator, n)), bucket, generator.device, together)


def _seconds_of_guidance(generator: ImageGenerator, num_classes: int, bucket: int, step: float) -> float:
    """What the gradient of (3) adds to an unguided step of `step` seconds, by autograd.

    With the full Jacobian a quarter of a large model's batch is timed.
    """
    device, dtype = generator.device, torch.float32
    if device.type == "cuda" and generator.dtype == torch.bfloat16:
        dtype = torch.bfloat16  # as the engine has it
    network = _network(generator, num_classes).to(dtype).eval().requires_grad_(False)
    guidance = generator.steer(network, network)
    full, together = generator.config.jacobian == "full", guidance.decode_batch or bucket
    if full and generator.shape.hidden_size >= LARGE:
        together = min(together, max(1, bucket // 4))

    def make(n: int) -> Callable[[], object]:
        x = _samples(generator, n).requires_grad_(full)
        targets = torch.zeros(n, dtype=torch.long, device=device)
        return lambda: guidance.gradient(x, _through_denoiser(generator, x) if full else x, targets)

    seconds = timed(make, bucket, device, together)
    return max(0.0, seconds - step) if full else seconds


def _through_denoiser(generator: ImageGenerator, x: Tensor) -> Tensor:
    """A differentiable function of x that costs what the predicted x0 costs."""
    model, n = generator.model, len(x)
    labels = torch.zeros(2 * n, dtype=torch.long, device=x.device)
    with torch.enable_grad():
        denoised = model(torch.cat((x, x)).to(generator.dtype), labels, labels)
        return denoised[:, : x.shape[1]].to(x.dtype).view(2, *x.shape).sum(dim=0)


def _seconds_per_training_step(
    generator: ImageGenerator, num_classes: int, batch: int, learners: int
) -> float:
    """Of a discriminator: augmentation, forward, backward and AdamW, launched one by one.

    learners: ranks that share a batch; each augments all of it and learns from its part.
    """
    device, (channels, size) = generator.device, generator.seen_shape()
    network = _network(generator, num_classes).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    optimizer.step()  # loads what it needs
    pixels = generator.vae is None or generator.seen_by is not None
    augment = random_resized_crop if pixels else shift_and_flip
    numbers = torch.Generator().manual_seed(0)

    def make(n: int) -> Callable[[], object]:
        images = torch.full((n, channels, size, size), 0.1, device=device)
        return partial(step, images, torch.zeros(n, dtype=torch.long, device=device))

    def step(images: Tensor, labels: Tensor) -> None:
        own = -(-len(images) // learners)
        loss = F.cross_entropy(network(augment(images, False, numbers)[:own]), labels[:own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.enable_grad():
        return timed(make, batch, device)
