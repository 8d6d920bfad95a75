"""Coresets of real images: the few of each class that stand for it in a feature space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from acs_fast.config import InputError


def herding(features: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """Rows of `ipc` images of each class whose mean is near the class's, chosen greedily.

    Of class y with mean mu, the t-th choice is the image x, not yet chosen, with the smallest

        | mu - 1/t (f_x + sum of the features chosen before) |

    the first of equals; features are taken as they are, not scaled to unit length.
    features: [N, D], labels: int64 [N]. Returns int64 [classes * ipc], class by class and in the order
    chosen: the first of a class are its choice for a smaller ipc. InputError for a class with fewer images.
    Source: Welling 2009, "Herding dynamical weights to learn"; Rebuffi et al. 2017, arXiv 1611.07725.
    """
    return _by_class(features, labels, ipc, _herd)


def k_centre(features: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """Rows of `ipc` images of each class that leave no image of it far off, chosen greedily.

    The first is the image nearest to the class's mean, each further one the image that is farthest from its
    nearest chosen one; the first of equals, and none twice.
    Shapes, order and errors as in `herding`. Source: Sener & Savarese 2018, arXiv 1708.00489, algorithm 1.
    """
    return _by_class(features, labels, ipc, _spread)


def _by_class(
    features: Tensor, labels: Tensor, ipc: int, choose: Callable[[Tensor, int], list[int]]
) -> Tensor:
    """The rows that `choose` picks among each class's own; it sees fp64 features, their mean at 0."""
    counts = torch.bincount(labels).tolist()
    for label, count in enumerate(counts):
        if count < ipc:
            raise InputError(f"class {label} has {count} real images, {ipc} are to be chosen; lower --ipc")
    chosen = []
    for label in range(len(counts)):
        members = torch.nonzero(labels == label)[:, 0]
        own = features[members].double()
        chosen.append(members[choose(own - own.mean(dim=0), ipc)])
    return torch.cat(chosen)


def _herd(points: Tensor, ipc: int) -> list[int]:
    """t mu - sum of the chosen is, with mu at 0, minus their sum: so x is to end it nearest to 0."""
    lengths, total, chosen = points.square().sum(dim=1), torch.zeros_like(points[0]), list[int]()
    for _ in range(ipc):
        costs = lengths + 2.0 * (points @ total)
        costs[chosen] = torch.inf
        chosen.append(int(costs.argmin()))
        total += points[chosen[-1]]
    return chosen


def _spread(points: Tensor, ipc: int) -> list[int]:
    chosen = [int(points.square().sum(dim=1).argmin())]
    distances = torch.full_like(points[:, 0], torch.inf)
    for _ in range(ipc - 1):
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(dim=1))
        distances[chosen] = -1.0  # below a duplicate of a chosen one, which is at 0
        chosen.append(int(distances.argmax()))
    return chosen
