"""How synthetic images lie among real ones in a feature space: precision, recall, density, coverage."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from acs_fast.config import InputError

BLOCK = 1 << 24  # distances that are held at a time: 128 MiB in fp64
EXACT_BITS = 53  # of fp64: integers up to 2^53 are added and multiplied without an error


def prdc(real: Tensor, synthetic: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of synthetic features over real ones, as fractions.

    real: [N, D], synthetic: [M, D], finite, of any floating dtype, on one device. With R_i the Euclidean
    distance of real image i to its k-th nearest other real image, S_j that of synthetic image j to its k-th
    nearest other synthetic image, and d_ij the distance from real i to synthetic j:

        precision = 1/M      sum_j  [d_ij < R_i for some i]       synthetic images within the real ones
        recall    = 1/N      sum_i  [d_ij < S_j for some j]       real images within the synthetic ones
        density   = 1/(k M)  sum_ij [d_ij < R_i]                  1 where both have one distribution; no limit
        coverage  = 1/N      sum_i  [d_ij < R_i for some j]       real images with a synthetic one near

    All four compare by `<`, as the authors' package `prdc` does, so that an image with k duplicates in its
    own set has no neighbourhood. Where both sets have one distribution, coverage is expected to be
    1 - prod_{i=1..k} (N - i) / (N + M - i), which hangs on N and M: compare sets of equal size.

    The memory is that of the features in fp64 and of `BLOCK` distances. Raises InputError for a k that leaves
    no k-th neighbour, and for features that are not finite.
    Source: Naeem et al. 2020, arXiv 2002.09797 (density, coverage; lemma 2); Kynkaanniemi et al. 2019, arXiv
    1904.06991 (precision, recall).
    """
    n, m = len(real), len(synthetic)
    if not 1 <= k < min(n, m):
        raise InputError(
            f"coverage needs more than k = {k} images on either side (k at least 1), and there are {n} real "
            f"and {m} synthetic ones; give more images"
        )
    real, synthetic = _on_a_grid(real, synthetic)
    real_radii, synthetic_radii = _squared_radii(real, k), _squared_radii(synthetic, k)
    around = torch.zeros(m, dtype=torch.long, device=real.device)  # real neighbourhoods that j lies in
    recalled = covered = 0
    for rows, distances in _squared_distances(real, synthetic):
        inside = distances < real_radii[rows, None]
        around += inside.sum(dim=0)
        covered += int(inside.any(dim=1).sum())
        recalled += int((distances < synthetic_radii).any(dim=1).sum())
    return {
        "precision": int((around > 0).sum()) / m,
        "recall": recalled / n,
        "density": int(around.sum()) / (k * m),
        "coverage": covered / n,
    }


def expected_coverage(real: int, synthetic: int, k: int) -> float:
    """The coverage to expect of as many synthetic images of the real ones' very distribution.

    1 - prod_{i=1..k} (N - i) / (N + M - i), N real and M synthetic images: the k nearest neighbours of a real
    image are not all real.
    """
    return 1.0 - math.prod((real - i) / (real + synthetic - i) for i in range(1, k + 1))


def _on_a_grid(real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets moved, scaled by a power of two and rounded to integers, in fp64; comparisons stay.

    Squared distances of the integers are exact when taken as |a|^2 + |b|^2 - 2ab, the fast way: with
    |q| <= 2^b no sum exceeds 4 D 2^2b <= 2^53. So duplicates are at distance 0, ties are ties, and neither
    the blocks nor the device change a comparison. The grid has 2^(b+1) steps over the widest feature: b is
    22 for D = 128 and 19 for D = 4096.
    """
    low = torch.minimum(real.amin(dim=0), synthetic.amin(dim=0)).double()
    high = torch.maximum(real.amax(dim=0), synthetic.amax(dim=0)).double()
    reach = ((high - low) / 2).max().item()
    if not math.isfinite(reach):
        raise InputError("the features of some images are not finite; use another feature network")
    bits = (EXACT_BITS - 2 - math.ceil(math.log2(real.shape[1]))) // 2
    scale = math.ldexp(1.0, bits - math.frexp(reach)[1])  # reach < 2^exponent
    middle = (low + high) / 2
    first, second = (((part.double() - middle) * scale).round_() for part in (real, synthetic))
    return first, second


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `a` and their squared distances [rows, len(b)] to all of `b`: integers, exact."""
    a_norms, b_norms = a.square().sum(dim=1), b.square().sum(dim=1)
    step = max(1, BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, torch.addmm(b_norms, a[rows], b.T, alpha=-2.0).add_(a_norms[rows, None])


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest other one: the point is itself the nearest."""
    parts = [
        distances.topk(k + 1, dim=1, largest=False, sorted=False).values.amax(dim=1)
        for _, distances in _squared_distances(points, points)
    ]
    return torch.cat(parts)
