"""What chance does to the images of a training step: drawn on the host, applied on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from acs_fast import augment

Draws = dict[str, Tensor]  # by name, as `draw` makes them


def draw(
    rows: Tensor, *, size: int, color: bool, patches: bool, mirror: bool, generator: torch.Generator
) -> Draws:
    """The draws of a batch, on the CPU, in the order of the transforms.

    rows: int64 [B], which images. `crops` fp32 [B, 5], `colors` fp32 [B, 9] where `color`, `patches` bool
    [B, 2] where so asked (soft), `box` int64 [4] and `order` int64 [B] of CutMix: see `augment`.
    """
    b, found = len(rows), {"rows": rows}
    if patches:
        found["patches"] = augment.draw_patches(b, generator)
    found["crops"] = augment.draw_crops(b, size, mirror, generator)
    if color:
        found["colors"] = augment.draw_colors(b, generator)
    found["box"], found["order"] = augment.draw_cutmix(b, size, generator)
    return found


def transformed(images: Tensor, draws: Draws) -> Tensor:
    """The images of a batch after all but CutMix, normalised: fp32 [B, C, S, S].

    images: uint8 [N, C, S, S], of the whole set. Hard: crop, flip, for RGB colour jitter and lighting.
    Soft: shuffled patches, crop, flip.
    """
    batch = images[draws["rows"]].float() / 255.0
    if "patches" in draws:
        batch = augment.shuffle_patches(batch, draws["patches"])
    batch = augment.crop(batch, draws["crops"])
    return augment.recolor(batch, draws["colors"]) if "colors" in draws else augment.normalize(batch)
