"""The teacher of `soft`: read from a file or trained on real images, kept, narrowed, refused, described."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from acs_fast.evaluation_parts import teacher as teachers
from acs_fast.evaluation_parts.teacher import Teacher, describe, load_teacher
from safetensors.torch import load_file, save_file
from torch import nn

from acs_fast import InputError
from acs_fast.augment import normalize, random_resized_crop
from acs_fast.data import LISTS, ImageSet, imagenet_classes
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")
WOOF = tuple(LISTS["imagewoof"].split())


def some_images(count: int = 6, channels: int = 3, size: int = 8, seed: int = 0) -> ImageSet:
    """Random pixels of two classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 2, ("a", "b"))


def trained(real: ImageSet, **settings: Any) -> Teacher:
    """A tiny teacher: two steps of a ConvNet unless told otherwise."""
    defaults: dict[str, Any] = {
        "network": "convnet-1", "classes": real.classes, "device": CPU, "seed": 0, "folder": None,
        "size": real.images.shape[-1], "channels": real.images.shape[1], "steps": 2,
    }  # fmt: skip
    return load_teacher(None, real_train=lambda: real, **{**defaults, **settings})


def never() -> ImageSet:
    raise AssertionError("a teacher from a file needs no real images")


def read(path: Path, classes: tuple[str, ...], size: int = 8, channels: int = 3) -> Teacher:
    return load_teacher(str(path), "resnet18", classes, never, CPU, 0, None, size, channels)


def weights(num_classes: int, size: int = 8, channels: int = 3, name: str = "resnet18") -> dict[str, Any]:
    """Random weights and statistics of their own."""
    torch.manual_seed(1)
    network = build_classifier(name, channels, num_classes, size)
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    return state


def test_training_is_the_recipe_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "BATCH_SIZE", 4)
    real, steps = some_images(6), 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    w = [p.detach().clone().requires_grad_() for p in model.parameters()]
    teachers.train(model, real, seed=5, steps=steps)
    generator, moving, order = torch.Generator().manual_seed(5), [torch.zeros_like(p) for p in w], []
    for step in range(steps):
        while len(order) < 4:
            order += torch.randperm(6, generator=generator).tolist()
        rows, order = order[:4], order[4:]
        x = normalize(random_resized_crop(real.images[rows] / 255.0, True, generator))
        logits = x.reshape(4, -1) @ w[0].T + w[1]
        gradients = torch.autograd.grad(F.cross_entropy(logits, real.labels[rows]), w)
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for p, m, g in zip(w, moving, gradients, strict=True):
            g = g + 1e-4 * p.detach()
            m.mul_(0.9).add_(g)
            p.data -= rate * (g + 0.9 * m)
    for p, expected in zip(model.parameters(), w, strict=True):
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_stated_recipe() -> None:
    stated = (teachers.STEPS, teachers.BATCH_SIZE, teachers.LR, teachers.MOMENTUM, teachers.WEIGHT_DECAY)
    assert stated == (1000, 128, 0.1, 0.9, 1e-4)


@pytest.mark.parametrize("count", [5, 128, 300])
def test_every_image_comes_once_before_any_comes_again(count: int) -> None:
    batches = teachers._batches(count, torch.Generator().manual_seed(0))
    rows = torch.cat([next(batches) for _ in range(7)])
    assert len(rows) == 7 * 128
    for epoch in rows[: len(rows) // count * count].split(count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_a_trained_teacher_is_a_resnet_that_is_frozen_and_judges() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    real = some_images(channels=1)
    teacher = trained(real, network="resnet18", steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.origin == "resnet18 trained on 6 real images"
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher(torch.zeros(3, 1, 8, 8)).shape == (3, 2)
    assert int(teacher.network.bn1.num_batches_tracked) == 1


def test_a_teacher_learns_its_images() -> None:
    real = some_images(6)
    real.images[real.labels == 0] //= 4  # dark
    assert describe(trained(real, steps=30), real).endswith("100.0 % on the test images")


def test_the_kept_teacher_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = some_images()
    first = trained(real, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher-convnet-1.safetensors"]
    monkeypatch.setattr(teachers, "train", lambda *args: pytest.fail("it was trained again"))
    second = trained(real, folder=tmp_path)
    assert second.origin == first.origin
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two) and not two.requires_grad


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "steps": {"steps": 3},
    "pixels": {"real": some_images(seed=1)},
    "fewer": {"real": some_images(4)},
    "labels": {"real": ImageSet(some_images().images, torch.tensor([1, 0] * 3), ("a", "b"))},
    "classes": {"real": ImageSet(some_images().images, some_images().labels, ("b", "a"))},
    "mirror": {"real": ImageSet(some_images().images, some_images().labels, ("a", "b"), mirror=False)},
    "damaged": {},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_teacher_of_something_else_is_trained_anew(tmp_path: Path, other: str) -> None:
    trained(some_images(), folder=tmp_path)
    path = tmp_path / "teacher-convnet-1.safetensors"
    if other == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    old = path.read_bytes()
    settings = {"real": some_images(), **OTHERS[other]}
    teacher = trained(folder=tmp_path, **settings)
    fresh = trained(**settings)
    assert path.read_bytes() != old
    for name, value in load_file(path).items():
        assert torch.equal(value, teacher.network.state_dict()[name])
        assert torch.equal(value, fresh.network.state_dict()[name])


def test_a_training_that_does_not_stay_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "LR", 1e30)
    with pytest.raises(InputError, match=r"training on 6 real images did not stay finite; give --teacher"):
        trained(some_images(), steps=4)


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_a_file_of_the_sets_own_classes(tmp_path: Path, suffix: str) -> None:
    state, path = weights(3), tmp_path / f"mine.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({name: nn.Parameter(v) if v.ndim > 1 else v for name, v in state.items()}, path)
    teacher = read(path, ("c", "a", "b"))
    assert teacher.origin == f"resnet18 of mine.{suffix}"
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.parameters())
    network = build_classifier("resnet18", 3, 3, 8).eval()
    network.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(teacher(x), network(x))


@pytest.mark.parametrize(
    ("classes", "origin"),
    [
        (WOOF, "resnet18 of resnet18-f37072fd.pth, narrowed to 10 of its 1000 classes"),
        (tuple(reversed(imagenet_classes())), "resnet18 of resnet18-f37072fd.pth"),
    ],
    ids=["woof", "all-reversed"],
)
def test_imagenets_outputs_are_those_of_the_sets_classes(
    tmp_path: Path, classes: tuple[str, ...], origin: str
) -> None:
    state = {name: v for name, v in weights(1000, 130).items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18-f37072fd.pth")
    teacher = read(tmp_path / "resnet18-f37072fd.pth", classes, size=224)
    assert teacher.origin == origin
    whole = build_classifier("resnet18", 3, 1000, 224).eval()
    whole.load_state_dict(state)
    x = torch.randn(2, 3, 160, 160)
    rows = [sorted(imagenet_classes()).index(name) for name in classes]
    expected = whole(x).softmax(1)[:, rows]
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(teacher(x).softmax(1), expected, rtol=1e-4, atol=1e-7)


def test_a_thousand_classes_of_ones_own_stay_in_their_order(tmp_path: Path) -> None:
    save_file(weights(1000), tmp_path / "mine.safetensors")
    teacher = read(tmp_path / "mine.safetensors", tuple(f"class {i}" for i in range(1000)))
    assert torch.equal(teacher.network.fc.weight, weights(1000)["fc.weight"])


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


REFUSED: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "missing": (lambda t: t / "none.pth", ("a",), r"none.pth is no file of weights; give a .pth, .pt or"),
    "folder": (lambda t: t, ("a",), "is no file of weights"),
    "suffix": (lambda t: saved(t / "x.bin", {}), ("a",), "x.bin is no file of weights"),
    "garbage": (lambda t: write(t / "x.pth", b"abc"), ("a",), r"x.pth cannot be read as plain weights"),
    "torn": (lambda t: write(t / "x.safetensors", b"abc"), ("a",), r"x.safetensors is damaged"),
    "object": (lambda t: saved(t / "x.pt", nn.Linear(1, 1)), ("a",), r"cannot be read as plain weights"),
    "nested": (lambda t: saved(t / "x.pt", {"model": {}}), ("a",), r"'model' is a dict, not a tensor"),
    "empty": (lambda t: saved(t / "x.pt", {}), ("a",), r"\(it lacks conv1.weight\); give one of that"),
    "scalar": (lambda t: saved(t / "x.pt", {"fc.weight": torch.ones(())}), ("a",), "it lacks conv1.weight"),
    "deeper": (
        lambda t: saved(t / "x.pt", weights(2, name="resnet50")),
        ("a", "b"),
        r"does not hold a resnet18 for images of 8 px \(it also holds layer1.0.conv3.weight\)",
    ),
    "foreign": (lambda t: saved(t / "x.pt", {**weights(2), "y": torch.ones(1)}), ("a", "b"), "also holds y"),
    "grey": (
        lambda t: saved(t / "x.pt", weights(2, channels=1)),
        ("a", "b"),
        r"its conv1.weight is \[64, 1, 3, 3\], not \[64, 3, 3, 3\]",
    ),
    "stem": (lambda t: saved(t / "x.pt", weights(2, 224)), ("a", "b"), r"is \[64, 3, 7, 7\], not \[64, 3, 3"),
    "count": (
        lambda t: saved(t / "x.pt", weights(3)),
        ("a", "b"),
        r"x.pt has 3 outputs, the set has 2 classes; give a teacher of these classes, or leave --teacher out",
    ),
    "unknown": (
        lambda t: saved(t / "x.pt", weights(1000)),
        (WOOF[0], "husky"),
        r"has 1000 outputs, the set has 2 classes, and husky is no class of ImageNet; give",
    ),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_files_are_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    make, classes, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        read(make(tmp_path), classes)
    assert "\n" not in str(caught.value)


class Reads(nn.Module):
    """Answers the first pixel's level, of white images 1."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        white = (x[:, 0, 0, 0] > normalize(torch.full((1, 3, 1, 1), 0.5))[0, 0, 0, 0]).float()
        return torch.stack((1 - white, white), dim=1) + self.bias


def test_the_description_states_origin_and_accuracy() -> None:
    images = torch.zeros(300, 3, 8, 8, dtype=torch.uint8)
    images[::2] = 255
    labels = torch.zeros(300, dtype=torch.long)
    labels[::2] = 1
    labels[-4:] = 1  # two of them black
    text = describe(Teacher(Reads(), "a judge"), ImageSet(images, labels, ("a", "b")))
    assert text == "a judge, 99.3 % on the test images"
