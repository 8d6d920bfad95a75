"""Train the K-way classifiers that guide sampling: a curriculum's discriminator f_i, real-image f_real."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import random_resized_crop
from acs_fast.config import DistillConfig
from acs_fast.data import DIGITS
from acs_fast.models.classifier import build_classifier
from acs_fast.writer import read_tensors, write_tensors

WEIGHT_DECAY = 0.01


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
    ):
        self.config, self.device, self.folder = config, device, folder
        self.shape = (in_channels, num_classes, size)
        self.build("check")  # a network that does not fit is refused before anything is written

    def build(self, name: str) -> nn.Module:
        """An untrained network; its weights are a function of the run's seed and the name."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(name))
            network = build_classifier(self.config.discriminator, *self.shape)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def get(
        self,
        name: str,
        title: str,
        data: Callable[[], tuple[Tensor, Tensor]],
        steps: int,
        previous: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The trained classifier: from the folder, or trained now (a bar shows it) and put there.

        data: makes the images and labels to train on. previous: makes the classifier from whose weights to
        start, instead of new ones. Neither is called for a classifier that is in the folder.
        """
        network, c = self.build(name), self.config
        state = read_tensors(self._path(name))
        if state is not None:
            network.load_state_dict(state)
        else:
            if previous is not None:
                network.load_state_dict(previous().state_dict())
            images, labels = data()
            losses = train_classifier(
                network.requires_grad_(True),
                images,
                labels,
                steps=steps,
                lr=c.discriminator_lr,
                batch_size=c.discriminator_batch_size,
                mirror=c.real != DIGITS,
                seed=self._seed(name),
            )
            with tqdm(losses, total=steps, desc=title, unit="step", disable=None) as progress:
                for loss in progress:
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            write_tensors(self._path(name), network.state_dict())
        return network.eval().requires_grad_(False)

    def is_trained(self, name: str) -> bool:
        """Whether the folder holds the classifier, readable."""
        return read_tensors(self._path(name)) is not None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _seed(self, name: str) -> int:
        return random.Random(f"{self.config.seed} {name}").getrandbits(63)


def train_classifier(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    mirror: bool,
    seed: int,
) -> Iterator[float]:
    """Train in place with AdamW and a cosine rate on hard labels, and yield the loss of every step.

    images: fp32 [N, C, H, W] in the model's range; labels: int64 [N].
    Every epoch is a new permutation drawn from `seed`.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(labels))
    order = torch.empty(0, dtype=torch.long)
    network.train()
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:batch_size].to(images.device), order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        batch = random_resized_crop(images[rows], mirror, generator)
        loss = F.cross_entropy(network(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def score(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Whether each image is classified right (bool [N]) and its cross-entropy (fp32 [N])."""
    logits = torch.cat([network(part) for part in images.split(batch_size)])
    return logits.argmax(dim=1) == labels, F.cross_entropy(logits, labels, reduction="none")
