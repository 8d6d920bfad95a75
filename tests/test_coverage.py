"""Precision, recall, density and coverage against their definitions, examples by hand and known limits."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from acs_fast import InputError
from acs_fast.evaluation import coverage
from acs_fast.evaluation.coverage import prdc

KEYS = ["precision", "recall", "density", "coverage"]


def draw(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def line(*places: float) -> Tensor:
    return torch.tensor(places).view(-1, 1)


def transcribed(real: Tensor, synthetic: Tensor, k: int) -> dict[str, float]:
    """The definitions, a pair at a time."""
    x, y = real.double().tolist(), synthetic.double().tolist()

    def radii(points: list[list[float]]) -> list[float]:
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1]
                for i, p in enumerate(points)]  # fmt: skip

    within_real = [[math.dist(a, b) < radius for b in y] for a, radius in zip(x, radii(x), strict=True)]
    within_synthetic = [[math.dist(a, b) < radius for b, radius in zip(y, radii(y), strict=True)] for a in x]
    return {
        "precision": sum(map(any, zip(*within_real, strict=True))) / len(y),
        "recall": sum(map(any, within_synthetic)) / len(x),
        "density": sum(map(sum, within_real)) / (k * len(y)),
        "coverage": sum(map(any, within_real)) / len(x),
    }


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("n", "m", "dim"), [(6, 6, 1), (31, 17, 2), (12, 40, 5), (40, 40, 130)])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_equal_to_the_definitions(n: int, m: int, dim: int, k: int, shift: float) -> None:
    real, synthetic = draw(n, dim, seed=n), draw(m, dim, seed=m + 100, shift=shift)
    found = prdc(real, synthetic, k)
    assert list(found) == KEYS
    assert found == transcribed(real, synthetic, k)


def test_five_neighbours_unless_told() -> None:
    real, synthetic = draw(30, 2, seed=1), draw(30, 2, seed=2)
    assert prdc(real, synthetic) == transcribed(real, synthetic, 5) != transcribed(real, synthetic, 4)


def test_an_example_by_hand() -> None:
    # radii 10, 1, 1, 2, 3 and 1.5, 1.5, 0, 0, 11.5; the pair 1, 2 is at 1 = its radius: not within
    found = prdc(line(-10, 0, 1, 3, 6), line(0.5, 2, 8.5, 8.5, 20), k=1)
    assert found == {"precision": 4 / 5, "recall": 3 / 5, "density": 5 / 5, "coverage": 4 / 5}


def test_an_example_by_hand_with_two_neighbours() -> None:
    # radii 2, 1, 2, 9 and 9, 5, 9: 0 is within that of 0, and no further than its ties with 1 and 2
    found = prdc(line(0, 1, 2, 10), line(0, 4, 9), k=2)
    assert found == {"precision": 3 / 3, "recall": 4 / 4, "density": 3 / 6, "coverage": 2 / 4}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_identical_sets(k: int) -> None:
    # each neighbourhood holds the image itself and the k - 1 before the one that bounds it
    points = draw(60, 7, seed=3)
    assert prdc(points, points.clone(), k) == dict.fromkeys(KEYS, 1.0)


def test_sets_far_apart() -> None:
    assert prdc(draw(20, 3, seed=4), draw(25, 3, seed=5, shift=1000.0)) == dict.fromkeys(KEYS, 0.0)


def test_one_distribution() -> None:
    n, m, k, draws = 40, 25, 5, 150
    found = [prdc(draw(n, 3, seed=2 * i), draw(m, 3, seed=2 * i + 1), k) for i in range(draws)]
    expected = {"density": 1.0, "coverage": 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))}
    for key, value in expected.items():
        column = [row[key] for row in found]
        assert abs(statistics.fmean(column) - value) < 4 * statistics.stdev(column) / math.sqrt(draws)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    real, synthetic = draw(33, 20, seed=6), draw(21, 20, seed=7)
    synthetic = torch.cat([synthetic, real[::3]])  # ties and duplicates are what blocks could change
    whole, shapes = prdc(real, synthetic, 3), []
    addmm = torch.addmm

    def watched(*arguments: Tensor, **options: float) -> Tensor:
        shapes.append(addmm(*arguments, **options).shape)
        return addmm(*arguments, **options)

    monkeypatch.setattr(coverage, "BLOCK", block)
    monkeypatch.setattr(torch, "addmm", watched)
    assert prdc(real, synthetic, 3) == whole == transcribed(real, synthetic, 3)
    assert all(rows * columns <= max(block, columns) for rows, columns in shapes)
    assert len(shapes) == sum(math.ceil(rows / max(1, block // columns))
                              for rows, columns in [(33, 33), (32, 32), (33, 32)])  # fmt: skip


def test_an_image_with_k_duplicates_has_no_neighbourhood() -> None:
    # at such values |a|^2 + |b|^2 - 2ab of fp64 is not 0 for a = b
    one, others = 100.0 * draw(1, 300, seed=8), 100.0 * draw(4, 300, seed=9)
    real = torch.cat([one, one, one, others])
    assert prdc(real, one.repeat(4, 1), k=2)["density"] == 0.0
    assert prdc(real, one.repeat(4, 1), k=3)["density"] == 3 * 4 / (3 * 4)


def test_ties_far_from_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "BLOCK", 40)  # a row at a time, so that products come from other code
    real = draw(40, 64, seed=10, shift=500.0)
    synthetic = real[torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]]
    for k in (1, 4):
        assert prdc(real, synthetic, k) == transcribed(real, synthetic, k)


@pytest.mark.parametrize("factor", [2.0**-20, 3.0, 2.0**30])
def test_the_scale_of_the_features_does_not_matter(factor: float) -> None:
    real, synthetic = draw(30, 6, seed=11), draw(30, 6, seed=12)
    assert prdc(factor * real, factor * synthetic) == prdc(real, synthetic)


def test_all_images_equal() -> None:
    assert prdc(torch.ones(9, 4), torch.ones(7, 4)) == dict.fromkeys(KEYS, 0.0)


def test_squared_distances_are_exact_integers() -> None:
    for dim in (1, 3, 128, 4096):
        a, b = coverage._on_a_grid(draw(9, dim, seed=13, shift=50.0), draw(8, dim, seed=14, shift=53.0))
        ((_, found),) = coverage._squared_distances(a, b)
        whole = [[sum((int(p) - int(q)) ** 2 for p, q in zip(x, y, strict=True)) for y in b.tolist()]
                 for x in a.tolist()]  # fmt: skip
        assert max(map(max, whole)) <= 2**coverage.EXACT_BITS and found.tolist() == whole
        assert max(a.abs().max(), b.abs().max()) >= 2**18  # the grid is no coarser than it must be


@pytest.mark.parametrize(("n", "m", "k"), [(5, 9, 5), (9, 5, 5), (9, 9, 0), (0, 9, 5), (3, 3, 7)])
def test_too_few_images_are_refused(n: int, m: int, k: int) -> None:
    with pytest.raises(InputError, match=f"more than k = {k} images .* {n} real and {m} synthetic ones"):
        prdc(draw(n, 2, seed=15), draw(m, 2, seed=16), k)


def test_the_fewest_images_that_will_do() -> None:
    assert prdc(draw(6, 2, seed=17), draw(6, 2, seed=18), 5) == transcribed(
        draw(6, 2, seed=17), draw(6, 2, seed=18), 5
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    real, synthetic = draw(9, 2, seed=19), draw(9, 2, seed=20)
    synthetic[3, 1] = value
    for first, second in ((real, synthetic), (synthetic, real)):
        with pytest.raises(InputError, match="not finite"):
            prdc(first, second)
