"""Herding and k-centre against their definitions, an example by hand, and what both must keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from acs_fast import InputError
from acs_fast.evaluation.coresets import herding, k_centre

CHOOSERS = pytest.mark.parametrize("choose", [herding, k_centre])


def draw(n: int, dim: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, labels in no order; every class has images."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % classes
    return torch.randn(n, dim, generator=generator) + 3.0 * labels[:, None], labels


def members(labels: Tensor, label: int) -> list[int]:
    return [row for row, own in enumerate(labels.tolist()) if own == label]


def herding_transcribed(features: Tensor, labels: Tensor, ipc: int) -> list[int]:
    features, rows = features.double(), []
    for label in range(int(labels.max()) + 1):
        own, chosen = members(labels, label), []
        mean = features[own].mean(dim=0)
        for _ in range(ipc):
            left = [row for row in own if row not in chosen]
            chosen.append(min(left, key=lambda r: (mean - features[[*chosen, r]].mean(dim=0)).norm().item()))
        rows += chosen
    return rows


def k_centre_transcribed(features: Tensor, labels: Tensor, ipc: int) -> list[int]:
    features, rows = features.double(), []

    def distance(a: Tensor, b: Tensor) -> float:
        return (a - b).norm().item()

    for label in range(int(labels.max()) + 1):
        own = members(labels, label)
        mean = features[own].mean(dim=0)
        chosen = [min(own, key=lambda r: distance(features[r], mean))]
        while len(chosen) < ipc:
            left = [row for row in own if row not in chosen]
            chosen.append(max(left, key=lambda r: min(distance(features[r], features[c]) for c in chosen)))
        rows += chosen
    return rows


@pytest.mark.parametrize(("n", "dim", "ipc"), [(9, 1, 3), (40, 4, 10), (50, 30, 16), (31, 2, 1)])
@pytest.mark.parametrize(
    ("choose", "transcribed"), [(herding, herding_transcribed), (k_centre, k_centre_transcribed)]
)
def test_equal_to_the_definitions(choose, transcribed, n: int, dim: int, ipc: int) -> None:
    features, labels = draw(n, dim, seed=n)
    rows = choose(features, labels, ipc)
    assert rows.dtype == torch.int64 and rows.tolist() == transcribed(features, labels, ipc)


def test_an_example_by_hand() -> None:
    # the mean is 3.25; with 2 chosen, the means 1, 1.5 and 6 are at hand; then 1 and 4.33
    features, labels = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.zeros(4, dtype=torch.long)
    assert herding(features, labels, 4).tolist() == [2, 1, 3, 0]
    assert k_centre(features, labels, 4).tolist() == [2, 3, 0, 1]  # 8 from 2; then 2 and 1; then 1


@CHOOSERS
def test_a_smaller_choice_begins_a_larger_one(choose) -> None:
    features, labels = draw(60, 5, seed=1)
    large = choose(features, labels, 12).view(3, 12)
    for ipc in (1, 2, 5):
        assert choose(features, labels, ipc).tolist() == large[:, :ipc].flatten().tolist()


@CHOOSERS
def test_class_by_class(choose) -> None:
    features, labels = draw(60, 5, seed=2)
    assert labels[choose(features, labels, 4)].tolist() == 4 * [0] + 4 * [1] + 4 * [2]


@CHOOSERS
def test_no_image_twice_even_among_duplicates(choose) -> None:
    features, labels = draw(4, 3, seed=3, classes=2)
    features, labels = features.repeat(5, 1), labels.repeat(5)
    rows = choose(features, labels, 10)
    assert sorted(rows.tolist()) == list(range(20))


@CHOOSERS
def test_equals_come_in_their_order(choose) -> None:
    assert choose(torch.ones(6, 4), torch.zeros(6, dtype=torch.long), 4).tolist() == [0, 1, 2, 3]


@CHOOSERS
def test_fp32_features_far_from_the_origin(choose) -> None:
    features, labels = draw(60, 5, seed=4)
    features = (8.0 * features).round()  # so that they can be moved without an error
    assert choose(features + 2.0**23, labels, 10).tolist() == choose(features.double(), labels, 10).tolist()


@CHOOSERS
def test_a_class_with_too_few_images_is_refused(choose) -> None:
    features, labels = draw(9, 2, seed=5)
    labels[labels == 1] = torch.tensor([0, 1, 1])
    assert len(choose(features, labels, 2)) == 6
    with pytest.raises(InputError, match="class 1 has 2 real images, 3 are to be chosen; lower --ipc"):
        choose(features, labels, 3)
    with pytest.raises(InputError, match="class 1 has 0 real images"):
        choose(features, torch.where(labels == 1, 2, labels), 1)


def test_herded_images_have_nearly_the_mean_of_their_class() -> None:
    features, _ = draw(300, 4, seed=6, classes=1)

    def off(rows: Tensor) -> float:
        return (features[rows].mean(dim=0) - features.mean(dim=0)).norm().item()

    assert off(herding(features, torch.zeros(300, dtype=torch.long), 10)) < off(torch.arange(10)) / 5


@pytest.mark.parametrize("seed", range(5))
def test_centres_leave_no_image_twice_as_far_off_as_the_best_ones(seed: int) -> None:
    features, labels = draw(14, 2, seed, classes=1)

    def farthest(rows: Iterable[int]) -> float:
        return torch.cdist(features, features[list(rows)]).amin(dim=1).max().item()

    best = min(map(farthest, itertools.combinations(range(14), 4)))
    assert farthest(k_centre(features, labels, 4).tolist()) <= 2.0 * best
