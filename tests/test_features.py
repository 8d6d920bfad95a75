"""Feature networks: how the reference is trained and kept, what features are, what is refused."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from acs_fast import InputError
from acs_fast.augment import normalize, random_resized_crop
from acs_fast.data import ImageSet, load_images
from acs_fast.evaluation import features, trained
from acs_fast.evaluation.features import Features, feature_network
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")


def make_set(channels: int = 3, size: int = 8, n: int = 70, seed: int = 0, mirror: bool = True) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 2, ("ant", "bee"), mirror)


def reference(
    train: ImageSet, folder: Path | None = None, name: str = "reference", seed: int = 5
) -> Features:
    return feature_network(name, lambda: train, CPU, seed, folder)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "STEPS", 3)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, short: None) -> list[int]:
    """A growing list, an entry for each training."""
    done: list[int] = []

    def train(model: nn.Module, images: ImageSet, steps: int, seed: int, kind: str) -> None:
        done.append(seed)
        with torch.no_grad():
            for values in model.parameters():
                values.mul_(1.0 + len(done))

    monkeypatch.setattr(trained, "_train", train)
    return done


# ---- the training


def trained_by_hand(train: ImageSet, network: str, seed: int, steps: int) -> dict[str, Tensor]:
    """AdamW 1e-3, decay 0.01, half a cosine, full batches of 64 of a permutation an epoch; crops, flips."""
    torch.manual_seed(seed)
    model = build_classifier(network, train.images.shape[1], 2, train.images.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(train), generator=generator)[:64]
        batch = normalize(random_resized_crop(train.images[rows] / 255.0, train.mirror, generator))
        optimizer.zero_grad()
        F.cross_entropy(model(batch), train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


@pytest.mark.parametrize(("channels", "mirror"), [(1, False), (3, True)])
def test_trained_as_stated(tmp_path: Path, short: None, channels: int, mirror: bool) -> None:
    train = make_set(channels, mirror=mirror)
    found = reference(train, tmp_path)
    expected = trained_by_hand(train, "convnet-3", seed=5, steps=3)
    kept = load_file(tmp_path / "reference-convnet-3.safetensors")
    assert kept.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(kept[name], values, rtol=1e-4, atol=1e-5)
    assert found.describe == "convnet-3 trained on 70 real images (3 steps)"


def test_the_callers_random_numbers_stay(short: None) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    reference(make_set())
    assert torch.equal(torch.rand(3), expected)


def test_the_network_follows_the_size_or_is_named(trainings: list[int]) -> None:
    assert reference(make_set(size=64, n=4)).describe.startswith("convnet-4 trained on 4 real images")
    assert reference(make_set(), name="convnet-2").describe.startswith("convnet-2 trained")
    small = reference(make_set(size=16, n=4), name="resnet-18")
    assert small.describe.startswith("resnet-18") and small.of(make_set(size=16).images).shape == (70, 512)


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "LEARNING_RATE", math.inf)
    with pytest.raises(InputError, match="not finite"):
        reference(make_set(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_reference_of_the_digits_knows_them() -> None:
    train, test = load_images("digits", "train"), load_images("digits", "val")
    network = reference(train)
    assert network.describe == "convnet-3 trained on 1297 real images (450 steps)"
    nearest = torch.cdist(network.of(test.images), network.of(train.images)).argmin(dim=1)
    assert (train.labels[nearest] == test.labels).double().mean() > 0.97


# ---- the cache


def test_kept_and_used_again(tmp_path: Path, trainings: list[int]) -> None:
    first, again = reference(make_set(), tmp_path), reference(make_set(), tmp_path)
    assert trainings == [5] and again.describe == first.describe
    assert [path.name for path in tmp_path.iterdir()] == ["reference-convnet-3.safetensors"]
    assert torch.equal(first.of(make_set().images), again.of(make_set().images))
    made_by = trained.safe_open(tmp_path / "reference-convnet-3.safetensors", framework="pt").metadata()
    digest = trained.images_digest(make_set())
    assert made_by == {"network": "convnet-3", "seed": "5", "steps": "3", "real_sha256": digest}
    reference(make_set(), tmp_path, "convnet-3")  # the same network by its own name
    assert trainings == [5]


def test_without_a_folder_nothing_is_kept(trainings: list[int]) -> None:
    reference(make_set()), reference(make_set())
    assert len(trainings) == 2


def one_pixel(train: ImageSet) -> ImageSet:
    images = train.images.clone()
    images[-1, -1, -1, -1] ^= 1
    return dataclasses.replace(train, images=images)


OTHERS = {
    "images": one_pixel,
    "labels": lambda train: dataclasses.replace(train, labels=train.labels.flip(0)),
    "fewer images": lambda train: train.take(torch.arange(68)),
    "mirror": lambda train: dataclasses.replace(train, mirror=False),
    "classes": lambda train: dataclasses.replace(train, classes=("ant", "bee", "cat")),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_real_images_train_anew(tmp_path: Path, trainings: list[int], other: str) -> None:
    reference(make_set(), tmp_path)
    reference(OTHERS[other](make_set()), tmp_path)
    assert len(trainings) == 2
    reference(OTHERS[other](make_set()), tmp_path)
    assert len(trainings) == 2


def test_the_same_bytes_in_another_shape_are_other_images() -> None:
    train = make_set()
    wide = dataclasses.replace(train, images=train.images.view(70, 3, 4, 16))
    assert trained.images_digest(train) != trained.images_digest(wide)


def test_another_seed_or_number_of_steps_trains_anew(
    tmp_path: Path, trainings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(make_set(), tmp_path)
    reference(make_set(), tmp_path, seed=6)
    assert trainings == [5, 6]
    monkeypatch.setattr(trained, "STEPS", 4)
    reference(make_set(), tmp_path, seed=6)
    assert trainings == [5, 6, 6]


def test_another_networks_file_trains_anew(tmp_path: Path, trainings: list[int]) -> None:
    reference(make_set(), tmp_path, "convnet-2")
    (tmp_path / "reference-convnet-2.safetensors").rename(tmp_path / "reference-convnet-3.safetensors")
    reference(make_set(), tmp_path)
    assert len(trainings) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(path: Path, **changed: Tensor) -> None:
    """The file with other tensors and the same metadata."""
    metadata = trained.safe_open(path, framework="pt").metadata()
    state = {name: values for name, values in {**load_file(path), **changed}.items() if len(values)}
    save_file(state, path, metadata)


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors " * 9),
    "no metadata": lambda path: save_file(load_file(path), path),
    "a tensor missing": lambda path: rewrite(path, **{"classifier.bias": torch.zeros(0)}),
    "a tensor more": lambda path: rewrite(path, more=torch.zeros(1)),
    "a tensor of another shape": lambda path: rewrite(path, **{"classifier.bias": torch.zeros(1)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_trains_anew(tmp_path: Path, trainings: list[int], damage: str) -> None:
    path = tmp_path / "deep" / "reference-convnet-3.safetensors"
    reference(make_set(), path.parent)
    DAMAGES[damage](path)
    found = reference(make_set(), path.parent)
    assert len(trainings) == 2
    again = reference(make_set(), path.parent)  # written whole this time
    assert len(trainings) == 2
    assert torch.equal(found.of(make_set().images), again.of(make_set().images))


# ---- the features


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_what_the_last_layer_sees(tmp_path: Path, trainings: list[int], channels: int) -> None:
    train, test = make_set(channels), make_set(channels, n=features.BATCH + 3, seed=1)
    found = reference(train, tmp_path).of(test.images)
    model = build_classifier("convnet-3", channels, 2, 8)
    model.load_state_dict(load_file(tmp_path / "reference-convnet-3.safetensors"))
    seen: list[Tensor] = []
    model.classifier.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    with torch.no_grad():
        model(normalize(test.images.float() / 255.0))
    assert found.shape == (features.BATCH + 3, 128) and found.dtype == torch.float32
    torch.testing.assert_close(found, seen[0])


class Recorder(nn.Module):
    """Keeps what it is given and returns it, through `then`."""

    def __init__(self, then: nn.Module | None = None):
        super().__init__()
        self.then, self.seen = then or nn.Identity(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.then(x)


def recording(channels: int, size: tuple[int, int], then: nn.Module | None = None) -> Features:
    return Features("a recorder", Recorder(then), channels, size, lambda x: 2.0 * x - 1.0, CPU)


def test_images_of_another_size_are_resized() -> None:
    images = make_set(size=20, n=5).images
    found = recording(3, (8, 6)).of(images)
    expected = F.interpolate(images / 255.0, (8, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, (2.0 * expected - 1.0).flatten(1))
    # not the plain bilinear one, which skips pixels
    assert not torch.allclose(expected, F.interpolate(images / 255.0, (8, 6), mode="bilinear"), atol=0.05)


def test_grey_images_are_repeated_to_rgb() -> None:
    images = make_set(channels=1, n=5).images
    network = recording(3, (8, 8))
    network.of(images)
    assert torch.equal(network.network.seen[0], (2.0 * (images / 255.0) - 1.0).repeat(1, 3, 1, 1))


def test_rgb_images_are_refused_where_grey_is_taken(trainings: list[int]) -> None:
    network = reference(make_set(channels=1))
    with pytest.raises(InputError, match=r"3 channels and convnet-3 trained on 70 real images .* takes 1;"):
        network.of(make_set(channels=3).images)


def test_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        recording(3, (8, 8)).of(make_set().images[:0])


@pytest.mark.parametrize(("size", "width"), [(32, 4096), (33, 4)])
def test_wide_maps_are_averaged_over_their_pixels(size: int, width: int) -> None:
    images = make_set(size=size, n=3).images
    network = recording(3, (size, size), nn.Conv2d(3, 4, 1))
    found = network.of(images)
    maps = network.network.then(2.0 * (images / 255.0) - 1.0).detach()
    assert found.shape == (3, width) and not found.requires_grad
    torch.testing.assert_close(found, maps.flatten(1) if width == 4096 else maps.mean(dim=(2, 3)))


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vgg", "there is no network 'vgg'"),
        ("clip:vit", "there is no feature network 'clip:vit'; use reference, .* timm:<model> or torchvision"),
        ("convnet-4", "convnet-4 needs images of 16 px, these are 8"),
        ("timm:resnet50", "timm:resnet50 needs timm, which is not installed: pip install timm"),
        ("torchvision:resnet50", "needs torchvision, which is not installed: pip install torchvision"),
    ],
)
def test_names_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    for package in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=sentence) as refusal:
        feature_network(name, make_set, CPU, 0, tmp_path)
    assert "\n" not in str(refusal.value) and list(tmp_path.iterdir()) == []
