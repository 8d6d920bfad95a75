"""The evaluation's training transforms as batched tensor ops on the device (PROTOCOLS.md section 1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
EIGENVALUES = (0.2175, 0.0188, 0.0045)  # of ImageNet's colour covariance (AlexNet)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
GREY = (0.299, 0.587, 0.114)
CROP_ATTEMPTS = 10


def normalize(images: Tensor) -> Tensor:
    """[0, 1] to zero mean, unit deviation: ImageNet's statistics for RGB, (x - 0.5) / 0.5 for grey."""
    if images.shape[1] != 3:
        return (images - 0.5) / 0.5
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on `device`; through pinned memory to a GPU, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def random_resized_crop(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Crop of area 0.5 to 1, aspect 3/4 to 4/3 (first valid of 10 draws, else all), bilinear to full size.

    images: [B, C, S, S]. mirror: also flip every other image, in expectation.
    The boxes are integer, as torchvision draws them.
    """
    b, _, size, _ = images.shape
    draws = torch.rand(2, b, CROP_ATTEMPTS, generator=generator)
    area = (0.5 + 0.5 * draws[0]) * size * size
    ratio = torch.exp((2.0 * draws[1] - 1.0) * math.log(4.0 / 3.0))
    width, height = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    valid = (width <= size) & (height <= size)
    first = valid.int().argmax(dim=1, keepdim=True)
    width = torch.where(valid.any(dim=1), width.gather(1, first)[:, 0], float(size))
    height = torch.where(valid.any(dim=1), height.gather(1, first)[:, 0], float(size))
    position = torch.rand(2, b, generator=generator)
    left, top = (position[0] * (size - width + 1)).floor(), (position[1] * (size - height + 1)).floor()
    flip = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0) if mirror else torch.ones(b)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = flip * width / size, (2.0 * left + width) / size - 1.0
    theta[:, 1, 1], theta[:, 1, 2] = height / size, (2.0 * top + height) / size - 1.0
    # nothing outside of the box is mixed in: the sample points stay between its outermost pixel centres
    corner, extent = torch.stack((left, top), dim=1), torch.stack((width, height), dim=1)
    low = (2.0 * corner + 1.0) / size - 1.0
    high = (2.0 * (corner + extent) - 1.0) / size - 1.0
    theta, low, high = (to_device(values, images.device) for values in (theta, low, high))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grid = grid.clamp(low.view(b, 1, 1, 2), high.view(b, 1, 1, 2))
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def shift_and_flip(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its edge on both axes, the border repeated: for latents.

    images: [B, C, S, S]. mirror: also flip every other image, in expectation. Nothing is interpolated, since
    a resized latent is no latent of a resized image.
    """
    b, _, size, _ = images.shape
    reach = size // 8
    dy, dx = (torch.randint(-reach, reach + 1, (b, 1), generator=generator) for _ in range(2))
    place = torch.arange(size)
    rows, columns = (place + dy).clamp(0, size - 1), (place + dx).clamp(0, size - 1)  # [B, S]
    if mirror:
        flipped = torch.rand(b, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = to_device(rows, images.device), to_device(columns, images.device)
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def color_jitter(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast, saturation: each blended by a factor in 1 +- strength, random order per image."""
    b = len(images)
    factors = (1.0 + strength * (2.0 * torch.rand(b, 3, generator=generator) - 1.0)).to(images.device)
    order = torch.rand(b, 3, generator=generator).argsort(dim=1).to(images.device)
    images = images.clone()
    for stage in range(3):
        for operation in range(3):
            rows = torch.nonzero(order[:, stage] == operation)[:, 0]
            if len(rows) == 0:
                continue
            x, factor = images[rows], factors[rows, operation].view(-1, 1, 1, 1)
            grey = (x * torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
            other = (0.0, grey.mean(dim=(2, 3), keepdim=True), grey)[operation]
            images[rows] = factor * x + (1.0 - factor) * other
    return images


def lighting(images: Tensor, generator: torch.Generator, std: float = 0.1) -> Tensor:
    """AlexNet's PCA colour noise: add E (alpha * lambda), alpha ~ N(0, std^2) per image."""
    alpha = (std * torch.randn(len(images), 3, generator=generator)).to(images.device)
    vectors = torch.tensor(EIGENVECTORS, device=images.device)
    shift = (alpha * torch.tensor(EIGENVALUES, device=images.device)) @ vectors.T
    return images + shift.view(-1, 3, 1, 1)


def train_transform(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Crop, flip if `mirror`, for RGB also colour jitter and lighting, then normalise; images in [0, 1]."""
    images = random_resized_crop(images, mirror, generator)
    if images.shape[1] == 3:
        images = lighting(color_jitter(images, generator), generator)
    return normalize(images)


def cutmix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """CutMix, Beta(1, 1): paste a box of a permuted batch; returns images, box labels and the kept area."""
    size = images.shape[-1]
    kept = torch.rand(1, generator=generator).item()  # Beta(1, 1) is uniform
    edge = int(size * math.sqrt(1.0 - kept))
    center = torch.randint(0, size, (2,), generator=generator).tolist()
    y0, x0 = (max(0, c - edge // 2) for c in center)
    y1, x1 = (min(size, c + edge // 2) for c in center)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = images[order, :, y0:y1, x0:x1]
    return mixed, labels[order], 1.0 - (y1 - y0) * (x1 - x0) / size**2
