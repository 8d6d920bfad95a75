"""The evaluation's training transforms as batched tensor ops on the device (PROTOCOLS.md section 1)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
EIGENVALUES = (0.2175, 0.0188, 0.0045)  # of ImageNet's colour covariance (AlexNet)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
GREY = (0.299, 0.587, 0.114)
CROP_ATTEMPTS = 10
JITTER, LIGHTING = 0.4, 0.1  # of the colour jitter's factors, and the deviation of the lighting's alpha


class Constants(NamedTuple):
    """On a device: what recolouring and normalising take."""

    mean: Tensor
    std: Tensor
    grey: Tensor
    lighting: Tensor  # [3, 3]: alpha [B, 3] times it is the shift of the channels


@functools.cache
def constants(device: torch.device) -> Constants:
    """Copied there once: a copy from the host is forbidden while a graph is captured."""
    lighting = torch.tensor(EIGENVALUES)[:, None] * torch.tensor(EIGENVECTORS).T
    return Constants(*(v.to(device) for v in (*map(torch.tensor, (MEAN, STD, GREY)), lighting)))


def normalize(images: Tensor) -> Tensor:
    """[0, 1] to zero mean, unit deviation: ImageNet's statistics for RGB, (x - 0.5) / 0.5 for grey."""
    if images.shape[1] != 3:
        return (images - 0.5) / 0.5
    known = constants(images.device)
    return (images - known.mean.view(1, 3, 1, 1)) / known.std.view(1, 3, 1, 1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on `device`; through pinned memory to a GPU, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def random_resized_crop(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Crop of area 0.5 to 1, aspect 3/4 to 4/3 (first valid of 10 draws, else all), bilinear to full size.

    images: [B, C, S, S]. mirror: also flip every other image, in expectation.
    The boxes are integer, as torchvision draws them.
    """
    crops = draw_crops(len(images), images.shape[-1], mirror, generator)
    return crop(images, to_device(crops, images.device))


def draw_crops(b: int, size: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """The boxes of `random_resized_crop`, fp32 [B, 5]: left, top, width, height in px; flip, 1 or -1."""
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
    return torch.stack((left, top, width, height, flip), dim=1)


def crop(images: Tensor, crops: Tensor) -> Tensor:
    """The boxes of `draw_crops` [B, 5], bilinear to full size; both on one device, the host does not wait.

    images: [B, C, S, S]. Nothing outside of a box is mixed in: the sample points stay between its outermost
    pixel centres.
    """
    b, size = len(images), images.shape[-1]
    corner, extent, flip = crops[:, :2], crops[:, 2:4], crops[:, 4]
    centre = (2.0 * corner + extent) / size - 1.0
    theta = torch.zeros(b, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = flip * extent[:, 0] / size, extent[:, 1] / size
    theta[:, :, 2] = centre
    low = (2.0 * corner + 1.0) / size - 1.0
    high = (2.0 * (corner + extent) - 1.0) / size - 1.0
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


def draw_colors(b: int, generator: torch.Generator) -> Tensor:
    """What `recolor` does to each image, fp32 [B, 9].

    Three factors in 1 +- 0.4 (brightness, contrast, saturation), the order of the three (operation 0, 1 or 2
    of each stage), and alpha ~ N(0, 0.1^2) of the lighting.
    """
    factors = 1.0 + JITTER * (2.0 * torch.rand(b, 3, generator=generator) - 1.0)
    order = torch.rand(b, 3, generator=generator).argsort(dim=1)
    return torch.cat((factors, order.float(), LIGHTING * torch.randn(b, 3, generator=generator)), dim=1)


def recolor(images: Tensor, colors: Tensor) -> Tensor:
    """Colour jitter, AlexNet's PCA lighting and `normalize`, as one linear map of each image's pixels.

    Each stage blends x with another image by a factor f: brightness f x; contrast f x + (1 - f) m, m the mean
    grey of the image; saturation f x + (1 - f) grey(x). All are linear, as are the lighting's shift
    E (alpha * lambda) and the normalisation, hence x -> A x + c with A [3, 3] and c [3] of the image, where m
    follows from the channels' means alone. images: [B, 3, S, S] in [0, 1], not clamped between the stages.
    colors: of `draw_colors`, on the same device; the host does not wait.
    """
    known, b = constants(images.device), len(images)
    eye = torch.eye(3, device=images.device)
    a, c = eye.expand(b, 3, 3), torch.zeros(b, 3, 1, device=images.device)
    means = images.mean(dim=(2, 3))[:, :, None]
    for stage in range(3):
        operation = colors[:, 3 + stage, None].long()
        factor = colors[:, :3].gather(1, operation)[:, :, None]  # [B, 1, 1]
        operation = operation[:, :, None]
        blend = torch.where(operation == 2, (1.0 - factor) * known.grey.expand(3, 3), 0.0)
        matrix = factor * eye + blend
        mean_grey = known.grey @ (a @ means + c)  # [B, 1]
        shift = torch.where(operation == 1, (1.0 - factor) * mean_grey[:, :, None], 0.0)
        a, c = matrix @ a, matrix @ c + shift
    c = c + (colors[:, 6:] @ known.lighting)[:, :, None]
    mean, std = known.mean[:, None], known.std[:, None]
    return torch.baddbmm((c - mean) / std, a / std, images.flatten(2)).view_as(images)


def draw_cutmix(b: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix, Beta(1, 1): the box int64 [4] (top, bottom, left, right; to be pasted) and the order int64 [B].

    The box has the area 1 - u of the image, u uniform, before it is cut off at the border.
    """
    kept = torch.rand(1, generator=generator).item()  # Beta(1, 1) is uniform
    edge = int(size * math.sqrt(1.0 - kept))
    center = torch.randint(0, size, (2,), generator=generator).tolist()
    y0, x0 = (max(0, c - edge // 2) for c in center)
    y1, x1 = (min(size, c + edge // 2) for c in center)
    return torch.tensor([y0, y1, x0, x1]), torch.randperm(b, generator=generator)


def cutmix(images: Tensor, box: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Paste the box of the batch in that order into the batch; also the exact area that is kept, 0-d.

    images: [B, C, S, S]; all on one device, the host does not wait.
    """
    place = torch.arange(images.shape[-1], device=images.device)
    inside = (place >= box[0::2, None]) & (place < box[1::2, None])  # [2, S]: rows, columns
    mixed = torch.where(inside[0, :, None] & inside[1], images[order], images)
    area = (box[1] - box[0]) * (box[3] - box[2])
    return mixed, 1.0 - area / images.shape[-1] ** 2


def draw_patches(b: int, generator: torch.Generator) -> Tensor:
    """Which images have their left and right halves swapped, and which top and bottom: bool [B, 2]."""
    return torch.rand(b, 2, generator=generator) < 0.5


def shuffle_patches(images: Tensor, swaps: Tensor) -> Tensor:
    """RDED's shuffle of 2x2 patches: columns, then rows, swapped where `swaps` [B, 2] says so: [B, C, S, S].

    With an odd edge the second half is the larger one; swapped, it stands first.
    """
    size = images.shape[-1]
    start = swaps.long() * (size // 2)  # [B, 2]
    place = (torch.arange(size, device=images.device) + start[:, :, None]) % size  # [B, 2, S]
    columns, rows = place[:, 0, None, None, :], place[:, 1, None, :, None]
    images = images.gather(3, columns.expand_as(images))
    return images.gather(2, rows.expand_as(images))
