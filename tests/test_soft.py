"""Stored soft labels: they train the same student, whatever stops their making; others are refused."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from acs_fast import EvaluateConfig, InputError, distill, evaluate
from acs_fast.data import ImageSet
from acs_fast.evaluation import judging
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.sets import Real
from acs_fast.evaluation.soft import SoftLabels, identity
from acs_fast.evaluation.training import Learner

CPU = torch.device("cpu")


def examples(n: int = 60, size: int = 9) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 3, ("a", "b", "c"))


def a_teacher(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 81, 3)).eval()


def learner(
    seed: int = 4, train: ImageSet | None = None, teacher: nn.Module | None = None, **options
) -> Learner:
    recipe = make_recipe("soft", 10, 3, 3)
    return Learner(train or examples(), "convnet-2", recipe, seed, CPU, teacher or a_teacher(), **options)


def labels(folder: Path, seed: int = 4, train: ImageSet | None = None, teacher: int = 0) -> SoftLabels:
    train, taught = train or examples(), a_teacher(teacher)
    made = learner(seed, train, taught)
    found = SoftLabels(folder, identity(train, taught, made.recipe, seed))
    found.complete(lambda: made)
    return found


def test_a_student_of_stored_labels_is_that_of_the_teacher(tmp_path: Path) -> None:
    stored = labels(tmp_path)
    one, two = learner(), learner(batches=partial(stored.draws, batch_size=50))
    two.teacher = None  # it is not asked
    initial = {name: values.clone() for name, values in one.network.state_dict().items()}
    for _ in range(3):
        one.epoch(), two.epoch()
    for name, values in one.network.state_dict().items():
        if name not in ("features.0.bias", "features.4.bias"):  # before a norm: rounding alone
            error = (two.network.state_dict()[name] - values).norm()
            assert error < 0.05 * (values - initial[name]).norm(), name


def test_what_is_stored(tmp_path: Path) -> None:
    labels(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"epoch-00{i}.safetensors" for i in range(3)), "labels.json"]
    stored = load_file(tmp_path / "epoch-001.safetensors")
    kinds = {name: (values.dtype, tuple(values.shape)) for name, values in stored.items()}
    assert kinds == {
        "rows": (torch.int32, (60,)),
        "crops": (torch.int16, (60, 5)),
        "patches": (torch.bool, (60, 2)),
        "order": (torch.int32, (60,)),
        "box": (torch.int16, (2, 4)),
        "logits": (torch.float16, (60, 3)),
    }


def test_made_again_only_where_missing_and_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "epoch-001.safetensors").unlink()
    calls: list[int] = []
    real = Learner.teach
    monkeypatch.setattr(Learner, "teach", lambda self, mixed: calls.append(len(mixed)) or real(self, mixed))
    labels(tmp_path)
    assert calls == [50, 10]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def one_pixel(train: ImageSet) -> ImageSet:
    images = train.images.clone()
    images[3, 0, 0, 0] ^= 1
    return dataclasses.replace(train, images=images)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 5}, "seed is 4, here 5"),
        ({"teacher": 1}, "teacher is"),
        ({"train": one_pixel(examples())}, "images is"),
        ({"train": dataclasses.replace(examples(), mirror=False)}, "mirror is True, here False"),
    ],
    ids=["seed", "teacher", "images", "mirror"],
)
def test_others_are_refused(tmp_path: Path, changed: dict, named: str) -> None:
    labels(tmp_path)
    with pytest.raises(InputError, match=named):
        labels(tmp_path, **changed)


def test_the_identity_differs_where_the_labels_would() -> None:
    recipe, train = make_recipe("soft", 10, 3, 3), examples()
    found = [
        identity(train, a_teacher(), recipe, 4),
        identity(train, a_teacher(1), recipe, 4),
        identity(one_pixel(train), a_teacher(), recipe, 4),
        identity(train, a_teacher(), dataclasses.replace(recipe, epochs=4), 4),
        identity(train, a_teacher(), recipe, 5),
    ]
    assert len({str(value) for value in found}) == len(found)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    stored = labels(tmp_path)
    path = tmp_path / "epoch-002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"epoch-002.safetensors cannot be read; delete the file"):
        list(stored.draws(2, 50))


class Brightness(nn.Module):
    """A teacher that needs no training."""

    origin = "a teacher"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.stack((x.mean(dim=(1, 2, 3)), -x.mean(dim=(1, 2, 3))), dim=1)


def test_evaluate_by_soft_labels(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: soft test images, the teacher in the record, labels stored and used."""
    seen: list[tuple] = []
    real = judging.train_and_test

    def spy(*arguments):
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(judging, "train_and_test", spy)
    monkeypatch.setattr(judging, "load_teacher", lambda *rest: Brightness())
    out, folder = distill(tiny()), tmp_path / "labels"
    settings = {"path": str(out), "protocol": ("soft",), "network": ("convnet-1",), "epochs": 2, "repeats": 2}
    (row,) = evaluate(EvaluateConfig(**settings, stored_soft_labels=str(folder), dtype="bf16"))["evaluations"]
    test = Real("digits", ("3", "8"), 1, 8, 8).test(True)
    for _, tested, _, recipe, *_, teacher, batches, dtype in seen:
        assert torch.equal(tested.images, test.images) and recipe.soft and dtype is torch.bfloat16
        assert isinstance(teacher, Brightness) and "logits" in next(iter(batches(0)))
    assert any(text.startswith("teacher: a teacher, ") for text in row["deviations"])
    assert {path.name for path in folder.iterdir()} == {"distilled-0", "distilled-1"}
    evaluate(EvaluateConfig(**settings))
    assert seen[-1][-2] is None and seen[-1][-1] is torch.float32  # taught as it goes
