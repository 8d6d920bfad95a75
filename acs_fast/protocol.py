"""The field's training protocols (PROTOCOLS.md section 1): one fresh classifier trained and tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import cutmix, normalize, train_transform
from acs_fast.data import ImageSet
from acs_fast.models.classifier import build_classifier

VALIDATIONS = 100


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent of one trained classifier: the best of the validations, and the last."""

    best: float
    last: float


def protocol_epochs(ipc: int, num_classes: int) -> int:
    """The Minimax protocol's epochs by ipc; for exactly 100 classes two thirds, floored to hundreds."""
    limits = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((value for limit, value in limits if ipc <= limit), 300)
    return int(2 * epochs / 3) // 100 * 100 if num_classes == 100 else epochs


def make_optimizer(network: nn.Module, protocol: str, num_classes: int) -> torch.optim.Optimizer:
    """`hard-sgd`: SGD 0.01 (0.1 above 100 classes), momentum 0.9; `hard-adamw`: AdamW 1e-3, decay 0.01."""
    if protocol == "hard-adamw":
        return torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    large = num_classes > 100
    return torch.optim.SGD(
        network.parameters(), lr=0.1 if large else 0.01, momentum=0.9, weight_decay=1e-4 if large else 5e-4
    )


def train_and_test(
    train: ImageSet,
    test: ImageSet,
    network: str,
    protocol: str,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: tqdm[Any] | None = None,
) -> Accuracy:
    """Train one fresh classifier on `train` and test it on `test`, both preloaded on the device.

    Batches of 64 (128 above 100 classes), CutMix on each, rate times 0.2 at epochs 2E // 3 and 5E // 6,
    validated every E // 100 epochs.
    """
    num_classes, size = len(train.classes), train.images.shape[-1]
    images, labels = train.images.to(device).float() / 255.0, train.labels.to(device)
    test_images, test_labels = normalize(test.images.to(device).float() / 255.0), test.labels.to(device)
    torch.manual_seed(seed)
    model = build_classifier(network, images.shape[1], num_classes, size)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, protocol, num_classes)
    milestones = sorted({2 * epochs // 3, 5 * epochs // 6})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    generator = torch.Generator().manual_seed(seed)
    batch_size = 128 if num_classes > 100 else 64
    every = max(1, epochs // VALIDATIONS)
    best = last = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(batch_size):
            batch = train_transform(images[rows], train.mirror, generator)
            mixed, other, kept = cutmix(batch, labels[rows], generator)
            logits = model(mixed)
            loss = kept * F.cross_entropy(logits, labels[rows]) + (1.0 - kept) * F.cross_entropy(
                logits, other
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if progress is not None:
            progress.update()
        if epoch % every == 0 or epoch == epochs:
            last = top1(model, test_images, test_labels)
            best = max(best, last)
    return Accuracy(best, last)


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Top-1 accuracy in percent on normalised images."""
    model.eval()
    right = sum(
        (model(x).argmax(dim=1) == y).sum().item()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100.0 * right / len(labels)
