"""From decoded boxes to a batch: resize, mirror, normalise. The same code after either decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.loader.request import Crop


def resized(box: Tensor, size: int) -> Tensor:
    """uint8 [H, W, C] resized to [C, S, S]: the triangle filter, widened by the scale where it shrinks.

    This is torchvision's and Pillow's antialiased bilinear filter, renormalised at the border. On a CPU in
    integers, uint8 out; on a GPU in fp32, 0 to 255, not rounded.
    """
    image = box.permute(2, 0, 1)
    if image.shape[1:] == (size, size):
        return image if image.is_cpu else image.float()
    image = image if image.is_cpu else image.float()
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def batch(images: Sequence[Tensor], crops: Sequence[Crop], device: torch.device) -> Tensor:
    """Resized images [C, S, S], each 0 to 255, as fp32 [B, C, S, S] in [-1, 1] on `device`; some mirrored."""
    pairs = zip(images, crops, strict=True)
    stacked = torch.stack([image.flip(2) if crop.flip else image for image, crop in pairs])
    return stacked.to(device).float().div_(127.5).sub_(1.0)
