"""Redundancy: what is trained on and tested on what, the means, and the whole through `evaluate`."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tqdm import tqdm

from acs_fast import EvaluateConfig, InputError, distill, evaluate
from acs_fast.cli import main
from acs_fast.data import ImageSet, load_images, read_image
from acs_fast.evaluation import judging, redundancy
from acs_fast.evaluation.protocols import Recipe
from acs_fast.evaluation.redundancy import epochs_of, increments, measure, off_diagonal, summarised
from acs_fast.evaluation.training import Accuracy, TestSet

CPU = torch.device("cpu")
RANGES = [range(0, 2), range(2, 3), range(3, 6)]


def numbered() -> ImageSet:
    """Six images of two classes, whose pixels are their number within the class and the class."""
    places = [(y, k) for y in range(2) for k in range(6)]
    images = torch.tensor([10 * y + k for y, k in places], dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images.expand(-1, 1, 8, 8), torch.tensor([y for y, _ in places]), ("a", "b"))


def test_increments_are_the_places_of_each_class() -> None:
    parts = [part.images[:, 0, 0, 0].tolist() for part in increments(numbered(), RANGES)]
    assert parts == [[0, 1, 10, 11], [2, 12], [3, 4, 5, 13, 14, 15]]


def test_epochs_are_those_of_the_images_trained_on() -> None:
    assert epochs_of("hard-sgd", [range(0, 1), range(1, 12)], 10, None) == [3000, 1500, 1500]
    assert epochs_of("hard-sgd", [range(0, 1), range(1, 12)], 10, 7) == [7, 7, 7]


def test_the_mean_is_off_the_diagonal() -> None:
    assert off_diagonal([[100.0, 40.0, 60.0], [50.0, 100.0, 70.0], [10.0, 20.0, 100.0]]) == pytest.approx(
        (40 + 60 + 50 + 70 + 10 + 20) / 6
    )


def test_who_is_trained_on_what_and_tested_on_what(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self, train: ImageSet, network: str, recipe: Recipe, *rest: object, **options: object):
            self.seen, self.recipe = sorted(train.images[:, 0, 0, 0].tolist()), recipe

        def epoch(self) -> None:
            trained.append(self.seen)

        def top1(self, test: TestSet) -> float:
            tested.append((self.seen, sorted(test.images[:, 0, 0, 0].tolist())))
            return float(len(tested))

    trained: list[list[int]] = []
    tested: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(redundancy, "Learner", Recorder)
    real = TestSet(torch.full((2, 1, 8, 8), 99, dtype=torch.uint8), torch.tensor([0, 1]))
    with tqdm(disable=True) as progress:
        matrix, curve = measure(
            numbered(), RANGES, real, network="convnet-1", protocol="hard-sgd", epochs=1, seed=0,
            device=CPU, progress=progress,
        )  # fmt: skip
    parts = [[0, 1, 10, 11], [2, 12], [3, 4, 5, 13, 14, 15]]
    first, second, third = parts
    joined = [sorted(first + second), sorted(first + second + third)]
    assert trained == [*parts, *joined]
    expected = [(first, [99, 99])]  # the first increment alone is the curve's first point too
    for part in parts:
        expected += [(part, other) for other in parts]
    assert tested == expected + [(part, [99, 99]) for part in joined]
    assert matrix == [[2, 3, 4], [5, 6, 7], [8, 9, 10]] and [last for _, last in curve] == [1, 11, 12]


def test_repeats_are_summarised() -> None:
    def repeat(x: float) -> tuple[list[list[float]], list[tuple[float, float]]]:
        return [[100.0, x], [x + 2, 100.0]], [(x, x - 1), (x + 5, x)]

    found = summarised([repeat(40.0), repeat(60.0)], [range(0, 2), range(2, 5)])
    assert found["cross_increment"] == {
        "matrix": [[100.0, 50.0], [52.0, 100.0]], "values": [41.0, 61.0], "mean": 51.0, "std": 10.0,
    }  # fmt: skip
    assert [(row["curriculum"], row["ipc"], row["last"]["mean"]) for row in found["incremental"]] == [
        (1, 2, 49.0),
        (2, 5, 50.0),
    ]


def test_a_set_of_one_image_repeated_overlaps_and_one_of_different_halves_does_not() -> None:
    digits = load_images("digits", "train").first(12)
    ranges = [range(0, 6), range(6, 12)]
    repeated = digits.take(torch.cat([torch.nonzero(digits.labels == y)[:6, 0].repeat(2) for y in range(10)]))
    test = TestSet.of(load_images("digits", "val"), CPU)
    values = []
    for images in (repeated, digits):
        with tqdm(disable=True) as progress:
            matrix, _ = measure(
                images, ranges, test, network="convnet-2", protocol="hard-adamw", epochs=60, seed=0,
                device=CPU, progress=progress,
            )  # fmt: skip
        values.append(off_diagonal(matrix))
    assert values[0] > values[1] + 3


def test_the_command(tiny, capsys) -> None:
    out = distill(tiny())
    command = ["evaluate", str(out), "--epochs", "1", "--repeats", "2", "--baselines", "random,herding"]
    assert main([*command, "--redundancy", "--features", "convnet-1"]) == 0
    printed = capsys.readouterr().out
    assert "redundancy: hard-adamw, convnet-3, 2 repeats" in printed and "cross-increment %" in printed
    found = json.loads((out / "results.json").read_text())["redundancy"]
    assert list(found["sets"]) == ["distilled", "random real", "herding"]
    for values in found["sets"].values():
        assert len(values["cross_increment"]["values"]) == 2
        assert [row["curriculum"] for row in values["incremental"]] == [1, 2, 3]
        assert 0 <= values["coverage"]["coverage"] <= 1 and values["coverage"]["images"] == 8
    assert found["features"].startswith("convnet-1 trained on ")
    page = (out / "report.html").read_text()
    assert "Cross-increment" in page and "convnet-1 trained on" in page
    again = [re.sub("<.*?>", "", code) for code in re.findall("<code>.*?</code>", page)]
    again = [command for command in again if "--redundancy" in command]
    assert again and "--features convnet-1" in again[0] and "--repeats 2" in again[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_curricula": 1}, "has not more than one"), ({"ipc": 4, "evaluated": 3}, "--ipc 3 does not go")],
    ids=["one", "ipc"],
)
def test_what_has_no_increments_is_refused(tiny, settings, message) -> None:
    evaluated = settings.pop("evaluated", None) if "evaluated" in settings else None
    out = distill(tiny(**settings))
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(path=str(out), redundancy=True, ipc=evaluated))
    with pytest.raises(InputError, match="compares curricula"):
        evaluate(EvaluateConfig(path=str(out / "images"), real="digits", redundancy=True))


def test_increments_of_a_run_are_its_curricula_beyond_ten_images(tiny, monkeypatch) -> None:
    out = distill(tiny(ipc=12, num_curricula=3))
    seen = []

    def record(images, ranges, *rest, **options):
        seen.append([part.images for part in increments(images, ranges)])
        return [[50.0] * 3] * 3, [(1.0, 1.0)] * 3

    monkeypatch.setattr(redundancy, "measure", record)
    monkeypatch.setattr(judging, "train_and_test", lambda *rest: Accuracy(1.0, 1.0))
    evaluate(EvaluateConfig(path=str(out), redundancy=True, repeats=1, features="convnet-1"))
    for number, part in enumerate(seen[0]):
        files = [out / "images" / y / f"{i}.png" for y in "38" for i in range(4 * number, 4 * number + 4)]
        assert torch.equal(part, torch.stack([read_image(file, None, 1) for file in files]))
