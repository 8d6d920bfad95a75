"""The teacher of `soft`: read from a file, narrowed, refused, or trained on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acs_fast import InputError
from acs_fast.data import LISTS, ImageSet, imagenet_classes
from acs_fast.evaluation import trained
from acs_fast.evaluation.teacher import Teacher, load_teacher
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")
WOOF = tuple(LISTS["imagewoof"].split())


def some_images(count: int = 6, channels: int = 3, size: int = 8, seed: int = 0) -> ImageSet:
    """Random pixels of two classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 2, ("a", "b"))


def never() -> ImageSet:
    raise AssertionError("a teacher from a file needs no real images")


def read(path: Path, classes: tuple[str, ...], size: int = 8, channels: int = 3) -> Teacher:
    return load_teacher(str(path), classes, never, CPU, None, size, channels)


def weights(num_classes: int, size: int = 8, channels: int = 3, name: str = "resnet18") -> dict[str, Any]:
    """Random weights and statistics of their own."""
    torch.manual_seed(1)
    network = build_classifier(name, channels, num_classes, size)
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    return state


def test_without_a_file_it_is_trained_on_the_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "STEPS", 1)
    real = some_images(channels=1)
    for _ in range(2):  # trained, then taken from the folder
        teacher = load_teacher(None, real.classes, lambda: real, CPU, tmp_path, 8, 1)
        assert teacher.origin == "resnet18 trained on 6 real images (1 steps)"
        assert not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        assert teacher(torch.zeros(3, 1, 8, 8)).shape == (3, 2)
        assert int(teacher.network.bn1.num_batches_tracked) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["teacher-resnet18.safetensors"]
        monkeypatch.setattr(trained, "_train", lambda *args: pytest.fail("it was trained again"))


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
