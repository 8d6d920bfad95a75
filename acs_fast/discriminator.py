"""Train the K-way classifiers that guide sampling: a curriculum's discriminator f_i, real-image f_real."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast import graph
from acs_fast.config import DistillConfig, InputError
from acs_fast.distributed import Ranks
from acs_fast.feeds import Examples, permuted
from acs_fast.models.classifier import seeded_classifier
from acs_fast.session import Session
from acs_fast.writer import read_tensors, write_tensors

WEIGHT_DECAY = 0.01
SHOWN_EVERY = 20  # steps: reading the loss for the progress bar waits for the device


class Classifiers:
    """A run's classifiers by name (`2`, `3`, ... and `real`): each trained once and kept in its folder."""

    def __init__(
        self,
        config: DistillConfig,
        in_channels: int,
        size: int,
        num_classes: int,
        device: torch.device,
        folder: Path,
        session: Session | None = None,
    ):
        self.config, self.device, self.folder = config, device, folder
        self.session = session or Session()
        self.ranks = self.session.ranks
        self.learners = Ranks() if config.deterministic else self.ranks  # those that share a training
        self.shape = (in_channels, num_classes, size)
        self.trainer: Trainer | None = None  # made by the first training, kept: its step is captured once
        self.build("check")  # a network that does not fit is refused before anything is written

    def build(self, name: str) -> nn.Module:
        """An untrained network; its weights are a function of the run's seed and the name."""
        network = seeded_classifier(self.config.discriminator, *self.shape, self._seed(name))
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def get(
        self,
        name: str,
        title: str,
        feed: Callable[[int], Generator[Examples]],
        steps: int,
        previous: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The trained classifier: from the folder, or trained now (a bar shows it) and put there.

        feed: makes the endless batches to train on, from a seed: this rank's part of each, and with
        `deterministic` whole ones, of which rank 0 alone makes use. previous: makes the classifier from
        whose weights to start, instead of new ones. Neither is called for one that is in the folder.
        """
        network = self.build(name)
        state = self.ranks.lead(lambda: read_tensors(self._path(name)))
        if state is None:
            initial, started = (network if previous is None else previous()).state_dict(), time.perf_counter()
            state = self._train_together(name, title, initial, feed, steps)
            seconds = round(time.perf_counter() - started, 3)
            self.session.event("discriminator", name=name, seconds=seconds)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)

    def _train_together(
        self,
        name: str,
        title: str,
        initial: dict[str, Any],
        feed: Callable[[int], Generator[Examples]],
        steps: int,
    ) -> dict[str, Any]:
        """The weights, on the CPU, put into the folder: trained on every rank's part of the batches, or on
        rank 0 alone. InputError if they are not finite."""
        batches = feed(self._seed(name))  # collects the samples of all ranks

        def train() -> dict[str, Any]:
            return {key: value.cpu() for key, value in self._train(title, initial, batches, steps).items()}

        own = train() if self.learners.num_ranks > 1 else None

        def keep() -> dict[str, Any]:
            state = train() if own is None else own  # equal on all ranks but for surprises
            if not all(bool(torch.isfinite(values).all()) for values in state.values()):
                raise InputError(
                    f"{title}: the trained weights are not finite; lower --discriminator-lr, which is "
                    f"{self.config.discriminator_lr:g}, or check the images it was trained on"
                )
            write_tensors(self._path(name), state)
            return state

        state = self.ranks.lead(keep)
        batches.close()  # of a rank that did not train
        return state

    def _train(
        self, title: str, initial: dict[str, Any], batches: Generator[Examples], steps: int
    ) -> dict[str, Any]:
        """The weights that training from `initial` ends with."""
        self.trainer = self.trainer or Trainer(self.build("trainer"), ranks=self.learners)
        losses = self.trainer.learn(initial, batches, steps=steps, lr=self.config.discriminator_lr)
        quiet = None if self.ranks.leads else True
        with tqdm(losses, total=steps, desc=title, unit="step", disable=quiet) as progress:
            for step, loss in enumerate(progress, start=1):
                shown = step % SHOWN_EVERY == 0 or step == steps
                if self.learners.num_ranks == 1:
                    self.session.check()
                elif shown:
                    self.session.check_together()
                if shown:
                    progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        batches.close()  # ends the threads that read ahead
        return self.trainer.network.state_dict()

    def is_trained(self, name: str) -> bool:
        """Whether the folder holds the classifier, readable."""
        return read_tensors(self._path(name)) is not None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _seed(self, name: str) -> int:
        return random.Random(f"{self.config.seed} {name}").getrandbits(63)


class Bucket(NamedTuple):
    """The static memory of a batch shape, and the training step on what lies in it."""

    batch: Tensor
    labels: Tensor
    real: Tensor | None
    step: Callable[[], None]

    def write(self, examples: Examples) -> None:
        """Put a batch there."""
        self.batch.copy_(examples.images)
        self.labels.copy_(examples.labels)
        if self.real is not None and examples.real is not None:
            self.real.copy_(examples.real)


class Trainer:
    """Trains one network again and again, from other weights on other images, in the same memory.

    Network, AdamW's state, the batch and its labels stay where they are. So on a GPU the training step is
    one CUDA graph for each batch shape, captured when the shape first comes and replayed ever after: a new
    discriminator is copied into it.
    """

    def __init__(self, network: nn.Module, capture: bool | None = None, ranks: Ranks | None = None):
        """capture: whether the step is captured; default: on a GPU. ranks: those that share each batch."""
        self.ranks = ranks or Ranks()
        self.network = network.train().requires_grad_(True)
        self.device = next(network.parameters()).device
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.loss = torch.zeros((), device=self.device)
        options: dict[str, Any] = {"lr": 0.0}
        if self.capture:  # a graph reads the rate when it is replayed, so that it must lie on the device
            options = {"lr": torch.zeros((), device=self.device), "capturable": True, "fused": True}
        self.optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, **options)
        self.buckets: dict[tuple[torch.Size, bool, int | None], Bucket] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def fit(
        self,
        initial: dict[str, Any],
        images: Tensor,
        labels: Tensor,
        *,
        steps: int,
        lr: float,
        batch_size: int,
        mirror: bool,
        seed: int,
    ) -> Iterator[Tensor]:
        """Train `network` from the weights `initial` with AdamW and a cosine rate on hard labels.

        images: [N, C, H, W] in the model's range and any floating dtype, on the network's device or, where
        they are many, on the CPU. labels: int64 [N]. Every epoch is a new permutation drawn from `seed`.
        Yields every step's loss, a 0-d tensor on the device: nothing waits before somebody reads it.
        """
        batches = permuted(
            images, labels, batch_size=batch_size, mirror=mirror, seed=seed, device=self.device
        )
        yield from self.learn(initial, batches, steps=steps, lr=lr)

    def learn(
        self, initial: dict[str, Any], batches: Generator[Examples], *, steps: int, lr: float
    ) -> Iterator[Tensor]:
        """Train `network` from the weights `initial` on a batch a step, with AdamW and a cosine rate.

        Yields every step's loss, a 0-d tensor on the device: nothing waits before somebody reads it.
        """
        rates = [lr * 0.5 * (1.0 + math.cos(math.pi * step / steps)) for step in range(steps)]
        initial = {name: values.clone() for name, values in initial.items()}  # may be the network's own
        table, first = torch.tensor(rates, device=self.device), True
        for step, (rate, examples) in enumerate(zip(rates, batches, strict=False)):
            bucket = self._bucket(examples)
            if first:  # after the bucket, whose capture trains
                graph.start_anew(self.network, self.optimizer, initial)
                first = False
            bucket.write(examples)
            graph.set_rate(self.optimizer, table[step] if self.capture else rate)
            bucket.step()
            yield self.loss.clone()

    def _bucket(self, examples: Examples) -> Bucket:
        total = examples.total if self.ranks.num_ranks > 1 else None
        key = (examples.images.shape, examples.real is not None, total)
        if key not in self.buckets:
            batch = torch.zeros(examples.images.shape, device=self.device)
            labels = torch.zeros(len(batch), dtype=torch.long, device=self.device)
            real = None if examples.real is None else torch.zeros(len(batch), device=self.device)
            step: Callable[[], None]
            loss = partial(_loss, self.network, batch, labels, real, total)
            step = partial(_train_step, loss, self.optimizer, self.loss, self.ranks)
            if self.capture:
                step = graph.captured_training(step, self.device, self.pool)
            self.buckets[key] = Bucket(batch, labels, real, step)
        return self.buckets[key]


def _loss(
    network: nn.Module, batch: Tensor, labels: Tensor, real: Tensor | None, total: int | None
) -> Tensor:
    """The mean loss of a batch; of a part of it, of `total` images, what the part adds to that."""
    if total is not None:
        return losses(network(batch), labels, real).sum() / total
    if real is None:
        return F.cross_entropy(network(batch), labels)
    return losses(network(batch), labels, real).mean()


def _train_step(
    part: Callable[[], Tensor], optimizer: torch.optim.Optimizer, loss_out: Tensor, ranks: Ranks
) -> None:
    """One AdamW step: what is run eagerly on a CPU and captured on a GPU, the all-reduce included."""
    loss = part()
    optimizer.zero_grad()  # to None: a captured backward pass then makes the gradients in the graph's memory
    loss.backward()
    loss_out.copy_(loss.detach())
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    ranks.add([*gradients, loss_out])
    optimizer.step()


def losses(logits: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
    """Cross-entropy of each label; with `real`, of D(z, y) = sigmoid(logit_y) against it: fp [n].

    The second trains D towards p_real(z | y) / (p_real(z | y) + p_sampled(z | y)) of each class, where both
    come in equal numbers: the class-conditional density-ratio discriminator of `density_ratio`.
    """
    if real is None:
        return F.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels[:, None])[:, 0]
    return F.binary_cross_entropy_with_logits(own, real, reduction="none")


@torch.no_grad()
def score(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    real: bool | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Whether each image is judged right (bool [N]) and its loss (fp32 [N]), on the network's device.

    real: None judges the class; else the network tells real (True) from sampled images, and what these are.
    images: on any device.
    """
    parameter = next(network.parameters(), images)
    logits = torch.cat(
        [network(part.to(parameter.device, parameter.dtype)) for part in images.split(batch_size)]
    )
    logits, labels = logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.to(logits.device)
    if real is None:
        return logits.argmax(dim=1) == labels, losses(logits, labels, None)
    own = logits.gather(1, labels[:, None])[:, 0]
    return (own > 0) == real, losses(logits, labels, torch.full_like(own, float(real)))
