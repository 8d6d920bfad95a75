"""No speed figure without a green check: what is timed against the plain model, sampler and training."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast import sampler
from acs_fast.augment import random_resized_crop
from acs_fast.discriminator import WEIGHT_DECAY, Trainer
from acs_fast.engine import StepEngine
from acs_fast.generator import ImageGenerator
from acs_fast.guidance import Guidance
from acs_fast.models.dit import DiT

# allowed relative errors, by the denoiser's dtype. Of x: beside a kink of the discriminator's ReLUs rounding
# turns the gradient, and an x without its push of 0.15 posterior deviations is off by several per cent
ALLOWED = {
    torch.bfloat16: {"denoiser": 5e-2, "x": 5e-2, "replay": 5e-2},
    torch.float32: {"denoiser": 1e-4, "x": 2e-3, "replay": 2e-3},
}
ALLOWED_LOSS = 1e-2  # on CUDA the convolutions may round to TF32
CHECKED_BLOCKS, CHECKED_STEPS = 2, 2
Batch = tuple[Tensor, Tensor, Tensor]  # class labels, indices, targets


def truncated(model: DiT, depth: int = CHECKED_BLOCKS) -> DiT:
    """The model with its first blocks alone, of the same tensors."""
    config = dataclasses.replace(model.config, depth=min(depth, model.config.depth))
    with torch.device("meta"):
        short = DiT(config)
    state = model.state_dict()
    short.load_state_dict({name: state[name] for name in short.state_dict()}, assign=True)
    return short.eval().requires_grad_(False)


def short_engine(subject: ImageGenerator, batch_size: int, classes: int) -> StepEngine:
    """The engine of a truncated model; the subject's own stays whole."""
    assert subject.attention is not None
    return StepEngine(
        truncated(subject.model), subject.config, subject.ops, subject.device,
        batch_size=batch_size, class_labels=range(classes), attention=subject.attention,
    )  # fmt: skip


@torch.no_grad()
def sampling_errors(
    subject: ImageGenerator, guidance: Guidance, batch: Batch, classes: int
) -> dict[str, float]:
    """Relative L2 errors against the plain DiT and the plain sampler in the same dtype, on two blocks.

    Of the denoiser's output, and of x after two steps: guided ones, unless the guidance needs the VAE, whose
    gradient would take longer than all that is timed.
    """
    engine, plain = short_engine(subject, len(batch[0]), classes), truncated(subject.model)
    seen = guidance if guidance.decode is None else None
    labels, indices, targets = (values.to(subject.device) for values in batch)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        expected = last(sampler.denoise(plain, labels, indices, subject.config, seen, targets), CHECKED_STEPS)
        engine.load(seen)
        errors = {"x": relative_error(last(engine.walk(*batch), CHECKED_STEPS), expected)}
        step, generator = len(engine.coefficients) // 2, torch.Generator().manual_seed(0)
        x = torch.randn(expected.shape, generator=generator).to(subject.device)
        whole = plain(torch.cat((x, x)).to(subject.dtype), engine.timesteps[step], engine.labels)
        got = engine.denoiser(x, step, engine.rows)
        errors["denoiser"] = relative_error(got, whole[:, : got.shape[1]])
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return errors


def training_error(trainer: Trainer, initial: nn.Module, data: tuple[Tensor, Tensor], lr: float) -> float:
    """The largest relative error of three losses of `Trainer` against a plain loop from the same seeds."""
    images, labels = data
    size, steps = len(images) // 4, 3
    generator = torch.Generator().manual_seed(0)
    network = copy.deepcopy(initial).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    order, error = torch.randperm(len(images), generator=generator).to(images.device), 0.0
    losses = fit(trainer, initial, data, size, steps, lr)
    for step, (rows, loss) in enumerate(zip(order.split(size), losses, strict=False)):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        expected = F.cross_entropy(network(random_resized_crop(images[rows], True, generator)), labels[rows])
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        error = max(error, relative_error(loss, expected.detach()))
    return error


def fit(
    trainer: Trainer, initial: nn.Module, data: tuple[Tensor, Tensor], size: int, steps: int, lr: float
) -> Iterator[Tensor]:
    """The losses of a training by `Trainer` with fixed seeds."""
    return trainer.fit(initial.state_dict(), *data, steps=steps, lr=lr, batch_size=size, mirror=True, seed=0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, inf where it is not finite."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if math.isfinite(error) else math.inf


def last(values: Iterable[Tensor], count: int | None = None) -> Tensor:
    """A copy of the last, or of the one after so many steps."""
    return deque(islice(values, count), maxlen=1).pop().clone()
