"""The field's training protocols (PROTOCOLS.md sections 1 and 2): what a classifier is trained by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acs_fast.models.classifier import default_network
from acs_fast.models.resnet import LAYOUTS

PROTOCOL_SIZE = 224  # px that the published protocols crop to; the setting --image-size says another
SOFT_RESIZE = 256 / 224  # the soft protocol's test images: shorter side to 256, centre cropped to 224
SOFT_EPOCHS = 300
TEMPERATURE = 20.0  # of the soft protocol; its loss has no factor T^2
SOFT_NETWORKS = tuple(LAYOUTS)
REPEATS = {"hard-sgd": 3, "hard-adamw": 5, "soft": 3}  # trainings behind a published mean
VALIDATIONS = 100  # of a hard protocol


@dataclass(frozen=True)
class Recipe:
    """How one classifier is trained: a protocol, for so many images a class and so many classes.

    `hard-sgd` (Minimax, MGD3, CoDA): hard labels, CutMix on every batch, SGD of rate 0.01, momentum 0.9,
    weight decay 5e-4, batches of 64; above 100 classes rate 0.1, decay 1e-4, batches of 128.
    `hard-adamw` (IGD, LGD, DAP): the same by AdamW, rate 1e-3, decay 0.01.
    `soft` (RDED): a teacher's labels at temperature 20, AdamW of rate 1e-3 whose decay of 0.01 is on weights
    of more than one dimension, batches of 50 up to 10 images a class and of 100 above, twice that from
    100 classes.

    epochs: those to train, which an override may make other than `protocol_epochs`.
    """

    protocol: str
    ipc: int
    num_classes: int
    epochs: int

    @property
    def soft(self) -> bool:
        """Whether a teacher gives the labels."""
        return self.protocol == "soft"

    @property
    def protocol_epochs(self) -> int:
        """The protocol's own epochs."""
        return protocol_epochs(self.protocol, self.ipc, self.num_classes)

    @property
    def batch_size(self) -> int:
        """Images of a training step."""
        if self.soft:
            return (50 if self.ipc <= 10 else 100) * (2 if self.num_classes >= 100 else 1)
        return 128 if self.num_classes > 100 else 64

    def rate(self, epoch: int) -> float:
        """The learning rate of epoch 0..E-1.

        Hard: the base rate, times 0.2 at 2E // 3 and again at 5E // 6. Soft: times
        (1 + cos(pi epoch / 2E)) / 2, which ends at half.
        """
        if self.soft:
            return 1e-3 * 0.5 * (1.0 + math.cos(math.pi * epoch / (2 * self.epochs)))
        base = 1e-3 if self.protocol == "hard-adamw" else 0.1 if self.num_classes > 100 else 0.01
        passed = sum(epoch >= milestone for milestone in {2 * self.epochs // 3, 5 * self.epochs // 6})
        return float(base * 0.2**passed)

    def validates(self, epoch: int) -> bool:
        """Whether the classifier is tested after epoch 0..E-1; always after the last.

        Hard: every E // 100 epochs. Soft: every tenth in the last fifth, so 249, 259, ... 299 of 300.
        """
        if epoch == self.epochs - 1:
            return True
        if self.soft:
            return epoch % 10 == 9 and epoch > 0.8 * self.epochs
        return (epoch + 1) % max(1, self.epochs // VALIDATIONS) == 0

    def optimizer(self, network: nn.Module, captured: bool = False) -> torch.optim.Optimizer:
        """The protocol's optimizer. captured: its step goes into a CUDA graph, and its rate lies there."""
        options: dict[str, Any] = {"lr": self.rate(0)}
        if captured:
            device = next(network.parameters()).device
            options = {"lr": torch.tensor(self.rate(0), device=device), "fused": True}
        if self.protocol == "hard-sgd":
            decay = 1e-4 if self.num_classes > 100 else 5e-4
            return torch.optim.SGD(network.parameters(), momentum=0.9, weight_decay=decay, **options)
        parameters: Any = network.parameters()
        if self.soft:
            split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for parameter in network.parameters():
                split[parameter.dim() > 1].append(parameter)
            parameters = [{"params": split[True]}, {"params": split[False], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.999), weight_decay=0.01, capturable=captured, **options
        )
        optimizer._warned_capturable_if_run_uncaptured = True  # by the warm-up before the capture
        return optimizer


def make_recipe(protocol: str, ipc: int, num_classes: int, epochs: int | None = None) -> Recipe:
    """A protocol's recipe; epochs: other than its own."""
    return Recipe(protocol, ipc, num_classes, epochs or protocol_epochs(protocol, ipc, num_classes))


def protocol_epochs(protocol: str, ipc: int, num_classes: int) -> int:
    """`soft`: 300. Else Minimax's, by ipc; for exactly 100 classes two thirds, floored to hundreds."""
    if protocol == "soft":
        return SOFT_EPOCHS
    limits = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((value for limit, value in limits if ipc <= limit), 300)
    return int(2 * epochs / 3) // 100 * 100 if num_classes == 100 else epochs


def deviations(
    recipe: Recipe,
    network: str,
    *,
    size: int,
    channels: int,
    mirror: bool,
    bf16: bool,
    repeats: int,
    teacher: str | None,
) -> list[str]:
    """What is not as the protocol has it, to print beside a result."""
    found = []
    if recipe.epochs != recipe.protocol_epochs:
        found.append(f"{recipe.epochs} of the protocol's {recipe.protocol_epochs} epochs")
    if repeats != REPEATS[recipe.protocol]:
        found.append(f"{repeats} repeats; the protocol has {REPEATS[recipe.protocol]}")
    if size != PROTOCOL_SIZE:
        found.append(f"images of {size} px; the protocol resizes to {PROTOCOL_SIZE}")
    if not mirror:
        found.append("no image is mirrored")
    if channels != 3:
        found.append("grey images: no colour jitter, no lighting, (x - 0.5) / 0.5 for ImageNet's statistics")
    if bf16:
        found.append("convolutions in bf16; the published code has fp32")
    own = SOFT_NETWORKS if recipe.soft else (default_network(size), "resnetap-10", "resnet-18")
    if network not in own:
        found.append(f"{network}; the protocol has {', '.join(own)}")
    if teacher is not None:
        found.append(f"teacher: {teacher}; the protocol's is torchvision's resnet18 of ImageNet-1K")
    if recipe.soft and recipe.ipc not in (10, 50):
        found.append(f"batches of {recipe.batch_size}; the protocol states those of ipc 10 and 50 alone")
    elif recipe.soft and recipe.num_classes > 100 and recipe.num_classes != 1000:
        found.append(f"batches of {recipe.batch_size}; the protocol doubles them for 100 or 1000 classes")
    return found
