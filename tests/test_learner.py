"""What a GPU runs of a training: a step that can be captured, and that trains as the eager one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from acs_fast import augment
from acs_fast.evaluation import training
from acs_fast.evaluation.protocols import Recipe, make_recipe
from acs_fast.evaluation.training import Learner
from tests.test_capture import NoConstants, Trace
from tests.test_protocols import CPU, examples


@pytest.mark.parametrize(
    ("protocol", "network"), [("hard-sgd", "convnet-2"), ("hard-adamw", "resnet-18"), ("soft", "resnet18")]
)
def test_no_training_step_reads_a_value_or_copies(monkeypatch, protocol: str, network: str) -> None:
    """What a CUDA graph could not capture, shown on the meta device."""
    meta, soft = torch.device("meta"), protocol == "soft"
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).to(meta) if soft else None
    learner = Learner(examples(), network, make_recipe(protocol, 10, 3, 4), 0, CPU, teacher, capture=False)
    draws = {name: v.to(meta) for name, v in next(iter(learner.draws())).items()}
    learner.network, learner.device = learner.network.to(meta), meta
    learner.images, learner.labels = learner.images.to(meta), learner.labels.to(meta)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # it knows no meta
    augment.constants(meta)
    with NoConstants(), Trace(meta) as mode:
        for loss in learner.losses(draws):
            loss.backward()
    assert len(mode.operations) > 50


def trained(capture: bool, device: torch.device, soft: bool) -> Learner:
    train = examples(70, 3, 16)
    recipe = make_recipe("soft" if soft else "hard-sgd", 10, 3, 4)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)).eval().to(device) if soft else None
    learner = Learner(train, "convnet-2", recipe, 3, device, teacher, capture=capture)
    for _ in range(4):
        learner.epoch()
    return learner


def assert_same(one: Learner, two: Learner) -> None:
    initial = Learner(examples(70, 3, 16), "convnet-2", one.recipe, 3, CPU).network.state_dict()
    for name, values in one.network.state_dict().items():
        if name not in ("features.0.bias", "features.4.bias"):
            moved = (values.cpu() - initial[name]).norm()
            assert (two.network.state_dict()[name] - values).norm().cpu() < 0.05 * moved, name


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_what_is_captured_is_the_step(monkeypatch: pytest.MonkeyPatch, soft: bool) -> None:
    """The whole path of a GPU but the graph itself, which here runs its step again when it is replayed."""
    captured: list[int] = []

    class Replayed:
        def __init__(self, call, warm_up, pool):
            warm_up(), call()
            captured.append(1)
            self.replay = call

    monkeypatch.setattr(training.graph, "capture", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    real = Recipe.optimizer
    monkeypatch.setattr(Recipe, "optimizer", lambda self, network, _: uncaptured(real(self, network)))
    torch.manual_seed(0)
    replayed = trained(True, CPU, soft)
    assert len(captured) == 2  # of whole batches and of the last
    torch.manual_seed(0)
    assert_same(trained(False, CPU, soft), replayed)


def uncaptured(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The rate as a tensor, as a graph reads it."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    return optimizer


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_captured_step_trains_as_the_eager_one(soft: bool) -> None:
    cuda = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    eager = trained(False, cuda, soft)
    torch.manual_seed(0)
    assert_same(eager, trained(True, cuda, soft))
