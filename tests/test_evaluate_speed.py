"""The evaluation's baseline is the protocol in Pillow, and the benchmark notices where the two differ."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from acs_fast.augment import EIGENVALUES, EIGENVECTORS, normalize
from acs_fast.data import load_images
from benchmarks import evaluate_speed
from benchmarks.baselines import pil_evaluation as pil
from benchmarks.evaluate_speed import Ours, check_same, compare, write_pictures


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("shape", "scaled"), [((20, 30), (8, 12)), ((31, 20), (12, 8)), ((8, 11), (8, 11))], ids=str
)
def test_the_shorter_side_is_resized_and_the_centre_cropped(
    shape: tuple[int, int], scaled: tuple[int, int]
) -> None:
    image = pil.resize_shorter(picture(*shape), 8)
    assert image.size == scaled
    square = pil.center_crop(image, 8)
    left, top = round((scaled[0] - 8) / 2), round((scaled[1] - 8) / 2)
    assert np.array_equal(np.array(square), np.array(image)[top : top + 8, left : left + 8])


def test_crop_boxes_have_the_protocols_area_and_aspect() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([pil.crop_box(224, 224) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert bool((boxes >= 0).all() and (boxes <= 224).all())
    area, aspect = width * height / 224**2, width / height
    assert 0.495 < area.min() < 0.51 and 0.97 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35
    free = boxes[:, 0] / (224 - width).clamp_min(1)
    assert 0.47 < free[width < 200].float().mean() < 0.53


def scripted(monkeypatch: pytest.MonkeyPatch, draws: list[float]) -> None:
    """Let `uniform` answer these numbers, one a call."""
    answers = iter(draws)
    monkeypatch.setattr(pil, "uniform", lambda low, high: next(answers))


def test_without_chance_the_transform_normalises(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [1.0, 0.0, 1.0, 1.0, 1.0])  # the whole area, square; three factors of 1
    monkeypatch.setattr(pil.torch, "rand", lambda shape: torch.tensor(0.7))
    monkeypatch.setattr(pil.torch, "randn", lambda n: torch.zeros(n))
    image = picture(8, 8)
    torch.testing.assert_close(pil.train_transform(image, 8)[None], normalize(tensor(image)))


def test_a_flip_and_lighting(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [1.0, 0.0, 1.0, 1.0, 1.0])
    alpha = torch.tensor([1.0, -2.0, 0.5])
    monkeypatch.setattr(pil.torch, "rand", lambda shape: torch.tensor(0.3))
    monkeypatch.setattr(pil.torch, "randn", lambda n: alpha)
    image = picture(8, 8)
    shift = torch.tensor(EIGENVECTORS) @ (0.1 * alpha * torch.tensor(EIGENVALUES))
    expected = normalize(tensor(image).flip(-1) + shift.view(1, 3, 1, 1))
    torch.testing.assert_close(pil.train_transform(image, 8)[None], expected)


@pytest.mark.parametrize("operation", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_jitter_blends_by_a_factor(monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    others = [i for i in range(3) if i != operation]
    monkeypatch.setattr(pil.torch, "randperm", lambda n: torch.tensor([operation, *others]))
    scripted(monkeypatch, [0.7, 1.0, 1.0])
    image = picture(8, 8)
    x = tensor(image)
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    other = [torch.zeros(()), grey.mean(), grey][operation]
    found = tensor(pil.color_jitter(image))
    assert (found - (0.7 * x + 0.3 * other)).abs().max() < 1.6 / 255  # both round to levels


def test_cutmix_states_the_area_it_keeps() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    kept_areas = []
    for _ in range(300):
        labels = torch.arange(4)
        images = labels.float().view(4, 1, 1, 1).expand(4, 3, 64, 64).clone()
        mixed, other, kept = pil.cutmix(images, labels)
        assert sorted(other.tolist()) == [0, 1, 2, 3]
        for image, own, label in zip(mixed, labels, other, strict=True):
            assert {*image.unique().tolist()} <= {float(own), float(label)}
            if own != label:
                assert (image == own).float().mean().item() == pytest.approx(kept)
        kept_areas.append(kept)
    # the box is cut at the border: of edge r it keeps (r - r^2 / 4)^2, r^2 uniform, which is 0.32 in the mean
    assert np.mean(kept_areas) == pytest.approx(0.68, abs=0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path, None, 7, 16)
    return tmp_path


def training(folder: Path, keep_workers: bool = False) -> pil.PilTraining:
    names = tuple(map(str, range(10)))
    return pil.PilTraining(folder, names, 16, "convnet-1", 0, 2000, keep_workers)


@pytest.mark.parametrize("keep_workers", [False, True], ids=["started", "kept"])
def test_an_epoch_sees_every_image_once(folder: Path, keep_workers: bool) -> None:
    theirs = training(folder, keep_workers)
    for _ in range(2):
        batches = list(theirs.batches())
        assert [len(labels) for _, labels in batches] == [64, 6]
        assert torch.bincount(torch.cat([labels for _, labels in batches])).tolist() == [7] * 10
    theirs.close()


def test_a_step_is_sgd_on_the_mixed_loss(folder: Path) -> None:
    theirs = training(folder)
    theirs.network = nn.Sequential(nn.Flatten(), nn.Linear(3, 10, bias=False)).double()
    theirs.optimizer.param_groups[0]["params"] = list(theirs.network.parameters())
    (w,) = (p.detach().clone().requires_grad_() for p in theirs.network.parameters())
    x, labels, other = torch.randn(4, 3, 1, 1).double(), torch.arange(4), torch.tensor([1, 0, 3, 2])
    moving = torch.zeros_like(w)
    for kept in (0.25, 0.75):
        logits = x[:, :, 0, 0] @ w.T
        loss = kept * F.cross_entropy(logits, labels) + (1 - kept) * F.cross_entropy(logits, other)
        (gradient,) = torch.autograd.grad(loss, w)
        assert theirs.learn(x, other, kept, labels) == pytest.approx(loss.item())
        moving = 0.9 * moving + gradient + 5e-4 * w.detach()
        w.data -= 0.01 * moving
    torch.testing.assert_close(theirs.network[1].weight.detach(), w.detach())


def test_their_rate_falls_at_the_milestones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, rates = training(folder), {}
    for epoch in range(2000):
        rates[round(theirs.schedule.get_last_lr()[0], 8)] = epoch
        theirs.optimizer.step()
        theirs.schedule.step()
    assert rates == {0.01: 1332, 0.002: 1665, 0.0004: 1999}


@pytest.mark.parametrize("wrong", [None, "lr", "weight_decay", "loss"])
def test_both_make_the_same_step(folder: Path, wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = training(folder)
    ours = Ours(load_images(str(folder), None), "convnet-1", torch.float32)
    if wrong == "loss":
        learn = theirs.learn
        monkeypatch.setattr(theirs, "learn", lambda x, other, kept, y: learn(x, other, 0.9 * kept, y))
    elif wrong:
        theirs.optimizer.param_groups[0][wrong] *= 1.01 if wrong == "lr" else 20
    if wrong is None:
        assert set(check_same(ours, theirs)) == {"loss", "weights"}
        return
    with pytest.raises(AssertionError, match="the two are not the same protocol"):
        check_same(ours, theirs)


def test_a_row_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_speed, "SETTLE", 0.0)
    args = argparse.Namespace(real=None, network="convnet-1", size=16, ipc=2, rounds=1)
    row = compare(args, tmp_path)
    assert (row["protocol"], row["network"], row["size"], row["ipc"]) == ("hard-sgd", "convnet-1", 16, 2)
    assert row["ours"] == "fp32, contiguous, eager" and {"device", "threads", "commit"} <= row.keys()
    times = row["seconds_of_rounds"]
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(row["seconds_per_epoch"], 1)
    for name, ratio in row["speedup"].items():
        assert ratio == pytest.approx(times[name][0] / times["ours"][0], abs=0.006)
