"""Noise that belongs to an image, not to its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acs_fast import ops
from acs_fast.config import InputError
from acs_fast.parts.checks import Whole, check_whole, whole_numbers


def philox_normal(
    class_labels: Whole, indices: Whole, step: int, *, seed: int = 0, shape: Sequence[int]
) -> Tensor:
    """Standard normals of the images (class_labels[i], indices[i]): fp32 [n, *shape], whatever the batch.

    Element e of an image takes word pair (e mod 4) // 2 of the Philox-4x32-10 counter (e // 4, step, index,
    class) under the key (seed mod 2^32, seed div 2^32) (Salmon et al. 2011), u = word 2^-32 + 2^-33, and
    Box-Muller: z_even = sqrt(-2 ln u0) cos(2 pi u1), z_odd = sqrt(-2 ln u0) sin(2 pi u1).

    class_labels, indices: whole numbers in [0, 2^32), one or n of them; a single one counts for all images.
    step: in [0, 2^32); a run has 1000 for the noise that it starts from, and for what a step adds the number
    of steps after it. seed: in [0, 2^63). shape: of an image, as [channels, height, width].
    On the device of class_labels or, where these are no tensor, of indices; else on the CPU. InputError for
    anything out of its range.
    """
    given = [values for values in (class_labels, indices) if isinstance(values, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    labels, places = whole_numbers(class_labels, "class_labels"), whole_numbers(indices, "indices")
    if len(labels) != len(places) and 1 not in (len(labels), len(places)):
        raise InputError(
            f"there are {len(labels)} class_labels and {len(places)} indices; give as many, or one of either"
        )
    check_whole(step, "step", 0, 2**32 - 1)
    check_whole(seed, "seed", 0, 2**63 - 1)
    for edge in shape:
        check_whole(edge, "an edge of shape", 1)
    labels, places = torch.broadcast_tensors(labels.to(device), places.to(device))
    key = (torch.tensor([number], device=device) for number in (seed, step))
    draw = ops.select("auto", device).philox_normal
    noise: Tensor = draw(labels.contiguous(), places.contiguous(), *key, shape=tuple(shape))
    return noise
