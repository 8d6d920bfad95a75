"""The classifiers' training: the step on static buffers against a plain loop, its reuse, its capture."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from acs_fast import discriminator, graph
from acs_fast.augment import random_resized_crop
from acs_fast.config import DistillConfig, InputError
from acs_fast.discriminator import Bucket, Classifiers, Trainer, score
from acs_fast.distributed import Ranks
from acs_fast.feeds import Examples, permuted
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"steps": 7, "lr": 3e-3, "batch_size": 8, "mirror": True, "seed": 5}
NETWORKS = {  # name, channels, size, images, classes
    "digits": ("convnet-3", 1, 8, 20, 4),
    "fewer-images-than-a-batch": ("convnet-3", 4, 16, 5, 3),
    "resnet": ("resnet-18", 3, 16, 9, 2),
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build(name: str, channels: int, size: int, images: int, classes: int, seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_classifier(name, channels, classes, size)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def data(channels: int, size: int, images: int, classes: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, size, size, generator=generator), torch.arange(images) % classes


def feed(*shape: int, mirror: bool = False) -> Callable[[int], Generator[Examples]]:
    """What a classifier is trained on, by seed."""
    images, labels = data(*shape)
    return lambda seed: permuted(images, labels, batch_size=8, mirror=mirror, seed=seed, device=CPU)


def plainly(network: nn.Module, images: Tensor, labels: Tensor, **changed: Any) -> list[float]:
    """The loop as one writes it first: an optimizer of its own, fresh tensors at every step."""
    c = {**SETTINGS, **changed}
    optimizer = torch.optim.AdamW(network.parameters(), lr=c["lr"], weight_decay=0.01)
    generator = torch.Generator().manual_seed(c["seed"])
    size, order, losses = min(c["batch_size"], len(labels)), torch.empty(0, dtype=torch.long), []
    for step in range(c["steps"]):
        if len(order) < size:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:size], order[size:]
        optimizer.param_groups[0]["lr"] = c["lr"] * 0.5 * (1 + math.cos(math.pi * step / c["steps"]))
        loss = F.cross_entropy(
            network(random_resized_crop(images[rows], c["mirror"], generator)), labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("case", NETWORKS)
def test_training_is_the_plain_loop_bit_for_bit(case: str) -> None:
    expected, network = build(*NETWORKS[case]), build(*NETWORKS[case])
    images, labels = data(*NETWORKS[case][1:])
    losses = list(Trainer(network).fit(network.state_dict(), images, labels, **SETTINGS))
    assert [loss.item() for loss in losses] == plainly(expected, images, labels)
    assert same(network, expected) and not same(network, build(*NETWORKS[case]))
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)


def test_a_trainer_starts_anew_with_other_weights_images_and_batch_sizes() -> None:
    trainer = Trainer(build(*NETWORKS["digits"]))
    addresses = [p.data_ptr() for p in trainer.network.parameters()]
    for seed, images, changed in ((3, 20, {}), (4, 3, {"lr": 0.01}), (5, 40, {"steps": 3, "mirror": False})):
        network, sample = build(*NETWORKS["digits"], seed=seed), data(1, 8, images, 4, seed)
        initial = {name: values.clone() for name, values in network.state_dict().items()}
        losses = trainer.fit(network.state_dict(), *sample, **{**SETTINGS, **changed})
        got = [loss.item() for loss in losses]
        assert same(network, build(*NETWORKS["digits"], seed=seed)), "the initial weights were written to"
        assert got == plainly(network, *sample, **changed)
        assert same(trainer.network, network) and initial.keys() == trainer.network.state_dict().keys()
    assert [p.data_ptr() for p in trainer.network.parameters()] == addresses
    assert [tuple(shape) for shape, *_ in trainer.buckets] == [(8, 1, 8, 8), (3, 1, 8, 8)]


def test_an_abandoned_training_leaves_nothing_behind() -> None:
    trainer, images = Trainer(build(*NETWORKS["digits"])), data(1, 8, 20, 4)
    abandoned = trainer.fit(trainer.network.state_dict(), *data(1, 8, 20, 4, seed=9), **SETTINGS)
    next(abandoned)
    next(abandoned)
    expected = build(*NETWORKS["digits"], seed=3)
    losses = [v.item() for v in trainer.fit(expected.state_dict(), *images, **SETTINGS)]
    assert losses == plainly(expected, *images) and same(trainer.network, expected)


def test_images_in_bfloat16_are_trained_on_in_float32() -> None:
    images, labels = data(1, 8, 20, 4)
    expected, network = build(*NETWORKS["digits"]), build(*NETWORKS["digits"])
    plainly(expected, images.bfloat16().float(), labels)
    list(Trainer(network).fit(network.state_dict(), images.bfloat16(), labels, **SETTINGS))
    assert same(network, expected)


class Recorded(Trainer):
    """A trainer whose capture is recorded on a CPU: the warm-up runs, and a replay runs the step."""

    captures = 0

    def _bucket(self, examples: Examples) -> Bucket:
        with mock.patch.object(graph, "captured_training", self._recorded):
            return super()._bucket(examples)

    def _recorded(self, step: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
        self.captures += 1
        for _ in range(graph.WARMUP_STEPS):
            step()
        return step


@pytest.mark.parametrize("case", ["digits", "fewer-images-than-a-batch"])
def test_the_warm_up_of_a_capture_changes_nothing(case: str) -> None:
    images, labels = data(*NETWORKS[case][1:])
    captured, eager = Recorded(build(*NETWORKS[case]), capture=True), Trainer(build(*NETWORKS[case]), True)
    eager.capture = False  # the same optimizer without a capture
    initial = build(*NETWORKS[case]).state_dict()
    for trainer in (captured, eager):
        # the trainer's own weights are what the warm-up writes to first
        losses = [v.item() for v in trainer.fit(trainer.network.state_dict(), images, labels, **SETTINGS)]
        expected = build(*NETWORKS[case])
        torch.testing.assert_close(losses, plainly(expected, images, labels), rtol=1e-3, atol=1e-4)
    assert same(captured.network, eager.network)
    for trainer in (captured, eager):
        list(trainer.fit(initial, images, labels, **SETTINGS))
    assert same(captured.network, eager.network) and captured.captures == 1
    for trainer in (captured, eager):  # goes on from its own weights with batches of another shape
        list(trainer.fit(trainer.network.state_dict(), images[:2], labels[:2], **SETTINGS))
    assert same(captured.network, eager.network) and captured.captures == 2


def test_a_shape_is_captured_once_whatever_the_discriminator() -> None:
    trainer = Recorded(build(*NETWORKS["digits"]), capture=True)
    for images in (3, 20, 40, 3, 8):
        list(
            trainer.fit(
                build(*NETWORKS["digits"], seed=images).state_dict(), *data(1, 8, images, 4), **SETTINGS
            )
        )
    assert trainer.captures == 2  # batches of 3 and of 8


def capturable(network: nn.Module, monkeypatch: pytest.MonkeyPatch, **kind: bool) -> torch.optim.Optimizer:
    """AdamW as a graph needs it, which refuses a CPU unless told otherwise."""
    adam = importlib.import_module("torch.optim.adam")  # which torch.optim hides
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **_: ["cpu"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, capturable=True, **kind)
    optimizer.param_groups[0]["lr"] = torch.zeros(())
    return optimizer


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("case", NETWORKS)
def test_the_step_reads_nothing_on_the_host(case: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, channels, size, images, classes = NETWORKS[case]
    with FakeTensorMode():  # any .item() or branch on a value raises
        network = build_classifier(name, channels, classes, size)
        optimizer = capturable(network, monkeypatch, **{kind: True})
        batch, labels = torch.zeros(images, channels, size, size), torch.zeros(images, dtype=torch.long)
        loss = torch.zeros(())
        for real in (None, None, torch.zeros(images)):
            part = partial(discriminator._loss, network, batch, labels, real, None)
            discriminator._train_step(part, optimizer, loss, Ranks())
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize(("name", "size"), [("convnet-6", 256), ("resnet-18", 256)])
def test_the_decoded_size_of_pixel_spaces_trains(name: str, size: int, tmp_path: Path) -> None:
    config = DistillConfig(discriminator=name, discriminator_batch_size=1, real="images")
    classifiers = Classifiers(config, 3, size, 2, CPU, tmp_path)
    network = classifiers.get("2", "f_2", feed(3, size, 3, 2, mirror=True), steps=2)
    images, labels = data(3, size, 3, 2)
    right, loss = score(network, images, labels, batch_size=2)
    assert right.shape == loss.shape == (3,) and loss.isfinite().all()


def tiny_classifiers(folder: Path, **settings: Any) -> Classifiers:
    return Classifiers(DistillConfig(discriminator_batch_size=8, **settings), 1, 8, 4, CPU, folder)


def never() -> Any:
    raise AssertionError("called for a classifier that is in the folder")


def test_a_classifier_is_trained_once_and_kept(tmp_path: Path) -> None:
    classifiers = tiny_classifiers(tmp_path)
    assert not classifiers.is_trained("2")
    first = classifiers.get("2", "f_2", feed(1, 8, 20, 4), 7)
    assert classifiers.is_trained("2")
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    kept, trainer = [p.clone() for p in first.parameters()], classifiers.trainer
    third = classifiers.get("3", "f_3", feed(1, 8, 40, 4), 7)
    assert all(map(torch.equal, first.parameters(), kept)), "the next training wrote to the last network"
    assert classifiers.trainer is trainer, "a new trainer would capture its step again"
    assert same(classifiers.get("2", "f_2", never, 7, never), first)
    alone = tiny_classifiers(tmp_path / "alone")  # whatever the trainer trained before
    assert same(alone.get("3", "f_3", feed(1, 8, 40, 4), 7), third)
    expected = alone.build("3")
    plainly(expected, *data(1, 8, 40, 4), mirror=False, seed=alone._seed("3"))
    assert same(third, expected)


def test_a_warm_classifier_starts_from_the_one_before(tmp_path: Path) -> None:
    classifiers = tiny_classifiers(tmp_path)

    def before() -> nn.Module:
        return classifiers.get("2", "f_2", feed(1, 8, 20, 4), 7)

    warm = classifiers.get("3", "f_3", feed(1, 8, 40, 4), 7, before)  # trains 2 meanwhile
    expected = before()
    plainly(expected.requires_grad_(True), *data(1, 8, 40, 4), mirror=False, seed=classifiers._seed("3"))
    assert same(warm, expected)


@pytest.mark.parametrize("cause", ["lr", "images"])
def test_weights_that_are_not_finite_are_refused(cause: str, tmp_path: Path) -> None:
    images, labels = data(1, 8, 20, 4)
    if cause == "images":
        images[:] = math.nan
    classifiers = tiny_classifiers(tmp_path, discriminator_lr=1e30 if cause == "lr" else 3e-3)
    with pytest.raises(InputError, match=r"curriculum 2/5 discriminator.*lower --discriminator-lr.*images"):
        classifiers.get(
            "2",
            "curriculum 2/5 discriminator",
            lambda seed: permuted(images, labels, batch_size=8, mirror=False, seed=seed, device=CPU),
            7,
        )
    assert not list(tmp_path.iterdir())


def test_the_loss_is_read_every_20_steps_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Loss:
        def __init__(self, step: int):
            self.step = step

        def item(self) -> float:
            read.append(self.step)
            return 0.0

    def learn(self: Trainer, *args: Any, steps: int, **kwargs: Any) -> Iterator[Loss]:
        return map(Loss, range(1, steps + 1))

    monkeypatch.setattr(Trainer, "learn", learn)
    tiny_classifiers(tmp_path).get("2", "f_2", feed(1, 8, 20, 4), 47)
    assert read == [20, 40, 47]


def test_score_casts_to_the_network_and_answers_in_float32() -> None:
    network = build(*NETWORKS["digits"]).eval()
    images, labels = data(1, 8, 20, 4)
    right, loss = score(network, images, labels, batch_size=7)
    logits = network(images)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(right, logits.argmax(1) == labels) and not loss.requires_grad
    low = score(network.bfloat16(), images, labels)[1]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss, rtol=0.1, atol=0.1)


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("case", NETWORKS)
def test_the_captured_step_equals_the_eager_one(case: str) -> None:
    images, labels = (values.cuda() for values in data(*NETWORKS[case][1:]))
    captured, eager = (Trainer(build(*NETWORKS[case]).cuda()) for _ in range(2))
    eager.capture = False
    for seed in (3, 4):  # the second discriminator takes the same graph
        initial = build(*NETWORKS[case], seed=seed).state_dict()
        pairs = [[v.item() for v in t.fit(initial, images, labels, **SETTINGS)] for t in (captured, eager)]
        torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-2, atol=1e-2)
        expected = build(*NETWORKS[case], seed=seed)
        torch.testing.assert_close(
            pairs[0], plainly(expected, images.cpu(), labels.cpu()), rtol=2e-2, atol=2e-2
        )
    assert len(captured.buckets) == 1


@on_gpu
@pytest.mark.parametrize("images_on", ["cpu", "cuda"])
def test_training_never_waits_for_the_gpu(images_on: str) -> None:
    network = build(*NETWORKS["digits"]).cuda()
    trainer, (images, labels) = Trainer(network), data(1, 8, 20, 4)
    losses = trainer.fit(network.state_dict(), images.to(images_on), labels.cuda(), **SETTINGS)
    next(losses)  # captures
    with no_host_sync():
        rest = list(losses)
    assert torch.stack(rest).isfinite().all()
