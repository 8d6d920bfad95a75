"""How much of a set is new: accuracy across increments, and after each of them (METHOD.md section 4)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from acs_fast.data import ImageSet
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.results import summary
from acs_fast.evaluation.training import Accuracy, Learner, TestSet, fit


def increments(images: ImageSet, ranges: Sequence[range]) -> list[ImageSet]:
    """The images of each curriculum: those at its places within every class."""
    of_class = [torch.nonzero(images.labels == y)[:, 0] for y in range(len(images.classes))]
    return [images.take(torch.cat([members[r.start : r.stop] for members in of_class])) for r in ranges]


def by_index(images: ImageSet, ipc: int) -> ImageSet:
    """A run's images of a class by their indices, as curricula are cut; they are read by name (0, 1, 10)."""
    read = torch.tensor(sorted(range(ipc), key=lambda index: f"{index}."))  # the index at each place
    rows = [torch.nonzero(images.labels == y)[:, 0][read.argsort()] for y in range(len(images.classes))]
    return images.take(torch.cat(rows))


def epochs_of(protocol: str, ranges: Sequence[range], num_classes: int, epochs: int | None) -> list[int]:
    """The epochs of the classifiers of `measure`, in the order in which they are trained."""
    single = [len(r) for r in ranges]
    joined = [r.stop for r in ranges[1:]]
    return [make_recipe(protocol, ipc, num_classes, epochs).epochs for ipc in single + joined]


def measure(
    images: ImageSet,
    ranges: Sequence[range],
    test: TestSet,
    *,
    network: str,
    protocol: str,
    epochs: int | None,
    seed: int,
    device: torch.device,
    progress: tqdm[Any],
    dtype: torch.dtype = torch.float32,
) -> tuple[list[list[float]], list[tuple[float, float]]]:
    """One repeat: the matrix of accuracies across increments, and the accuracy after curricula 1..i.

    The matrix has a row for the classifier trained on increment i alone and a column for the images of
    increment j, in percent (LGD's cross-increment accuracy is the mean over i != j: less is less overlap);
    images are judged as they are, without augmentation, by the classifier at the end of its training. The
    accuracies are on the real test images. A classifier's epochs are the protocol's for its images, or
    `epochs`.
    """
    classes, parts = len(images.classes), increments(images, ranges)
    on_device = [TestSet.of(part, device) for part in parts]
    matrix, curve = [], []

    def train(part: ImageSet, ipc: int, tested: TestSet | None) -> tuple[Learner, tuple[float, float]]:
        recipe = make_recipe(protocol, ipc, classes, epochs)
        learner = Learner(part, network, recipe, seed, device, dtype=dtype)
        accuracy = fit(learner, tested, progress)
        return learner, (accuracy.best, accuracy.last)

    for number, (part, r) in enumerate(zip(parts, ranges, strict=True)):
        learner, accuracy = train(part, len(r), None if number else test)
        matrix.append([learner.top1(other) for other in on_device])
        del learner  # and its graphs, before the next one's
        if number == 0:
            curve.append(accuracy)
    curve += [train(images.first(r.stop), r.stop, test)[1] for r in ranges[1:]]
    return matrix, curve


def off_diagonal(matrix: list[list[float]]) -> float:
    """The mean over i != j."""
    n = len(matrix)
    return statistics.fmean(matrix[i][j] for i in range(n) for j in range(n) if i != j)


def summarised(
    repeats: Sequence[tuple[list[list[float]], list[tuple[float, float]]]], ranges: Sequence[range]
) -> dict[str, Any]:
    """`cross_increment` and `incremental` of a set's repeats, for results.json."""
    matrices = torch.tensor([matrix for matrix, _ in repeats], dtype=torch.float64)
    values = [off_diagonal(matrix) for matrix, _ in repeats]
    return {
        "cross_increment": {
            "matrix": [[round(v, 3) for v in row] for row in matrices.mean(dim=0).tolist()],
            "values": values,
            "mean": statistics.fmean(values),
            "std": statistics.pstdev(values),
        },
        "incremental": [
            {"curriculum": i + 1, "ipc": r.stop, **summary([Accuracy(*curve[i]) for _, curve in repeats])}
            for i, r in enumerate(ranges)
        ],
    }
