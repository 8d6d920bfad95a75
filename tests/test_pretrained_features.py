"""Feature networks of timm and torchvision, by small stand-ins with their public functions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acs_fast import InputError
from acs_fast.evaluation.features import feature_network

CPU = torch.device("cpu")
MEANS, DEVIATIONS = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


class Backbone(nn.Module):
    """A small network with a dropout, an auxiliary head before the last, and its head by a given name."""

    def __init__(self, head: str, layer: nn.Module):
        super().__init__()
        self.eyes = nn.Flatten()
        self.auxiliary = nn.Linear(3 * 12 * 12, 7)
        self.dropout = nn.Dropout(0.5)
        self.head_name = head
        self.add_module(head, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.eyes(x)
        self.auxiliary(x)
        return self.get_submodule(self.head_name)(self.dropout(x))


HEADS = {
    "fc": lambda: nn.Linear(3 * 12 * 12, 5),
    "classifier": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(3 * 12 * 12, 5)),
    "heads": lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(3 * 12 * 12, 5))),
}


def images_of(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, channels, 20, 20), generator=generator, dtype=torch.uint8)


def seen_by_hand(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEANS, DEVIATIONS))
    resized = F.interpolate(images / 255.0, (12, 12), mode="bilinear", antialias=True)
    return (resized.expand(-1, 3, -1, -1) - mean) / std


def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    package, calls = ModuleType("timm"), []

    def create_model(name: str, pretrained: bool = False, num_classes: int = 1000) -> nn.Module:
        calls.append((name, pretrained, num_classes))
        if name != "tiny.in1k":
            raise RuntimeError(f"Unknown model ({name})\nand more")
        network = Backbone("head", nn.Identity() if num_classes == 0 else HEADS["fc"]())
        network.pretrained_cfg = {
            "input_size": (3, 12, 12),
            "mean": MEANS,
            "std": DEVIATIONS,
            "crop_pct": 0.9,
        }
        return network

    package.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", package)
    return calls


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, head: str, **preset: object) -> list[tuple]:
    package, calls = ModuleType("torchvision"), []
    settings = {
        "crop_size": [12],
        "resize_size": [16],
        "mean": list(MEANS),
        "std": list(DEVIATIONS),
        **preset,
    }

    def get_model(name: str, weights: str | None = None) -> nn.Module:
        calls.append((name, weights))
        return Backbone(head, HEADS[head]()) if head in HEADS else nn.Conv2d(3, 2, 1)

    def get_model_weights(name: str) -> SimpleNamespace:
        if name != "tiny":
            raise ValueError(f"Unknown model {name}")
        return SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: SimpleNamespace(**settings)))

    package.models = SimpleNamespace(get_model=get_model, get_model_weights=get_model_weights)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    return calls


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_model(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    calls = fake_timm(monkeypatch)
    network = feature_network("timm:tiny.in1k", None, CPU, 0, None)
    assert calls == [("tiny.in1k", True, 0)]
    assert network.describe == "timm:tiny.in1k with its pretrained weights"
    images = images_of(channels)
    torch.testing.assert_close(network.of(images), seen_by_hand(images).flatten(1))


@pytest.mark.parametrize("head", HEADS)
def test_a_torchvision_model(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    calls = fake_torchvision(monkeypatch, head)
    network = feature_network("torchvision:tiny", None, CPU, 0, None)
    assert calls == [("tiny", "DEFAULT")]
    assert network.describe == "torchvision:tiny with its pretrained weights"
    images = images_of(3)
    torch.testing.assert_close(network.of(images), seen_by_hand(images).flatten(1))


@pytest.mark.parametrize(
    ("name", "head", "preset", "reason"),
    [
        ("timm:huge", "fc", {}, r"RuntimeError: Unknown model \(huge\)"),
        ("torchvision:huge", "fc", {}, "ValueError: Unknown model huge"),
        ("torchvision:tiny", "none", {}, "ValueError: it has no linear layer to take the features before"),
        ("torchvision:tiny", "fc", {"crop_size": [8, 9]}, "ValueError: it is no classifier of images"),
    ],
)
def test_models_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, name: str, head: str, preset: dict, reason: str
) -> None:
    fake_timm(monkeypatch), fake_torchvision(monkeypatch, head, **preset)
    with pytest.raises(InputError, match=rf"{name} cannot be had \({reason}\); check the name") as refusal:
        feature_network(name, None, CPU, 0, None)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist.; check"),
        ("import no_such_part_of_it", "No module named 'no_such_part_of_it'.; check"),
    ],
)
def test_a_package_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sentence: str
) -> None:
    (tmp_path / "torchvision.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(InputError, match=f"torchvision:resnet50 cannot be had .*{sentence}"):
        feature_network("torchvision:resnet50", None, CPU, 0, None)
