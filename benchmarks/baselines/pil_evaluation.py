"""`hard-sgd` as the relatives' scripts run it on a CPU: a DataLoader over PIL images, an eager fp32 network.

From the facts of PROTOCOLS.md section 1; no code of theirs. Pillow does here what torchvision does to PIL
images, so that it need not be installed. Every random number is the image's own, drawn in the worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from acs_fast.models.classifier import build_classifier

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
BATCH_SIZE, WORKERS = 64, 2
Picture = Image.Image


def uniform(low: float, high: float) -> float:
    """One number of PyTorch's generator, which a worker has seeded for itself."""
    return low + (high - low) * torch.rand(()).item()


def resize_shorter(image: Picture, size: int) -> Picture:
    """The shorter side to `size`, the longer in proportion, rounded down; bilinear."""
    width, height = image.size
    if min(width, height) == size:
        return image
    shape = (size, size * height // width) if width <= height else (size * width // height, size)
    return image.resize(shape, Image.Resampling.BILINEAR)


def center_crop(image: Picture, size: int) -> Picture:
    """The central square."""
    left, top = (round((edge - size) / 2) for edge in image.size)
    return image.crop((left, top, left + size, top + size))


def crop_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of area 0.5 to 1 and aspect 3/4 to 4/3: the first of 10 draws that fits.

    Else all of the image, which is square here.
    """
    for _ in range(10):
        area = uniform(0.5, 1.0) * width * height
        aspect = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(0, width - w + 1, ()))
            top = int(torch.randint(0, height - h + 1, ()))
            return left, top, left + w, top + h
    return 0, 0, width, height


def color_jitter(image: Picture) -> Picture:
    """Brightness, contrast and saturation by factors of 0.6 to 1.4, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in torch.randperm(3).tolist():
        image = kinds[kind](image).enhance(uniform(0.6, 1.4))
    return image


def train_transform(image: Picture, size: int) -> Tensor:
    """The training transforms in the protocol's order: RGB image to normalised fp32 [3, size, size]."""
    image = center_crop(resize_shorter(image, size), size)
    image = image.crop(crop_box(*image.size)).resize((size, size), Image.Resampling.BILINEAR)
    if torch.rand(()).item() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = color_jitter(image)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    alpha = torch.randn(3) * 0.1
    x = x + (EIGENVECTORS @ (alpha * EIGENVALUES)).view(3, 1, 1)
    return (x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


class PilImages(Dataset[tuple[Tensor, int]]):
    """The files <folder>/<class>/*.png, opened and augmented whenever they are asked for."""

    def __init__(self, folder: Path, classes: tuple[str, ...], size: int):
        self.files = [(p, y) for y, name in enumerate(classes) for p in sorted((folder / name).iterdir())]
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.files[row]
        with Image.open(path) as file:
            return train_transform(file.convert("RGB"), self.size), label


class Endless(Sampler[list[int]]):
    """Epochs of a batch sampler one after another, so that workers read ahead into the next epoch."""

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self.batches


def cutmix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """CutMix with Beta(1, 1), in place: images, the labels in the box, the exact kept area."""
    size = images.shape[-1]
    edge = int(size * math.sqrt(1.0 - np.random.beta(1.0, 1.0)))
    order = torch.randperm(len(images))
    (y0, y1), (x0, x1) = (
        np.clip([center - edge // 2, center + edge // 2], 0, size)
        for center in np.random.randint(0, size, size=2)
    )
    images[:, :, y0:y1, x0:x1] = images[order, :, y0:y1, x0:x1]
    return images, labels[order], 1.0 - float((y1 - y0) * (x1 - x0)) / size**2


class PilTraining:
    """One run of `hard-sgd` on a folder.

    keep_workers: as Minimax's script has it, workers live through the run and read ahead into the next
    epoch; else they are started for every epoch, as a DataLoader does when it is told nothing.
    """

    def __init__(
        self,
        folder: Path,
        classes: tuple[str, ...],
        size: int,
        network: str,
        seed: int,
        epochs: int,
        keep_workers: bool,
    ):
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.network: nn.Module = build_classifier(network, 3, len(classes), size)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, milestones=[2 * epochs // 3, 5 * epochs // 6], gamma=0.2
        )
        images = PilImages(folder, classes, size)
        sampler = BatchSampler(RandomSampler(images), BATCH_SIZE, drop_last=False)
        self.num_batches = len(sampler)
        self.loader = DataLoader(
            images,
            batch_sampler=Endless(sampler) if keep_workers else sampler,
            num_workers=WORKERS,
            persistent_workers=keep_workers,
        )
        self.kept: Iterator[list[Tensor]] | None = iter(self.loader) if keep_workers else None

    def batches(self) -> Iterator[list[Tensor]]:
        """The augmented images and labels of one epoch."""
        if self.kept is None:
            yield from self.loader
        else:
            for _ in range(self.num_batches):
                yield next(self.kept)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """CutMix and one step of SGD on augmented images."""
        self.learn(*cutmix(images, labels), labels)

    def learn(self, mixed: Tensor, other: Tensor, kept: float, labels: Tensor) -> float:
        """One step of SGD on a mixed batch; returns its loss, as the scripts read it for their log."""
        logits = self.network(mixed)
        loss = kept * F.cross_entropy(logits, labels) + (1.0 - kept) * F.cross_entropy(logits, other)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self) -> None:
        """Train for one epoch."""
        self.network.train()
        for images, labels in self.batches():
            self.step(images, labels)
        self.schedule.step()

    def close(self) -> None:
        """End the workers that were kept."""
        self.kept = None
        del self.loader
