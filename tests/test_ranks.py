"""Ranks as processes: what they tell one another, train and stop together, and whole runs of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acs_fast.config import DistillConfig, InputError
from acs_fast.discriminator import SHOWN_EVERY, Classifiers, Trainer
from acs_fast.distributed import Ranks
from acs_fast.feeds import Examples, mixed, permuted, shared
from acs_fast.models.classifier import build_classifier
from acs_fast.plan import Layout, cut
from acs_fast.samples import Samples
from acs_fast.session import Session
from acs_fast.steering import BLOCK, Steering
from acs_fast.stopping import Stopped
from acs_fast.writer import read_tensors, write_tensors
from tests.rank_runs import agreed

CPU = torch.device("cpu")
NUM_RANKS = [2, 3]
Seen = dict[str, Any]


def told(ranks: Ranks) -> Seen:
    """All that ranks tell one another, as one rank sees it."""
    n, own = ranks.num_ranks, ranks.rank
    rows = torch.arange(40.0).view(10, 2, 2)
    gathered = []
    for count in (0, 1, 2, 7, 10):
        share = ranks.share(count)
        counts = list(map(len, ranks.shares(count)))
        gathered.append(ranks.gather(rows[share.start : share.stop], counts).tolist())
    uneven = [0] * (n - 1) + [4]  # all of it is the last rank's
    gathered.append(ranks.gather(rows[:4] if own == n - 1 else rows[:0], uneven).tolist())
    sums = torch.full((2, 3), 1.0 + own), torch.tensor(10.0 * own)
    address = sums[0].data_ptr()
    ranks.add(sums)
    ranks.barrier()
    return {
        "collected": ranks.collect({"rank": own, "text": "x" * 1000 * own}),
        "led": ranks.lead(lambda: [own]),
        "gathered": gathered,
        "sums": [part.tolist() for part in sums],
        "in place": sums[0].data_ptr() == address,
    }


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_all_ranks_see_the_same(num_ranks: int) -> None:
    seen = agreed(num_ranks, told)
    assert all(one == seen[0] for one in seen)
    rows = torch.arange(40.0).view(10, 2, 2).tolist()
    assert seen[0]["gathered"] == [rows[:count] for count in (0, 1, 2, 7, 10, 4)]
    assert seen[0]["collected"] == [{"rank": r, "text": "x" * 1000 * r} for r in range(num_ranks)]
    assert seen[0]["led"] == [0] and seen[0]["in place"]
    total = num_ranks * (num_ranks + 1) / 2
    assert seen[0]["sums"] == [[[total] * 3] * 2, 10.0 * (total - num_ranks)]


def test_a_rank_alone_tells_itself(tmp_path: Path) -> None:
    own, values = Ranks(), torch.ones(3)
    own.add([values])
    own.barrier()
    assert own.collect(4) == [4] and own.lead(lambda: 5) == 5 and own.leaving() == ""
    assert own.gather(values, [3]) is values and values.tolist() == [1.0, 1.0, 1.0]


def failing(ranks: Ranks, error: Exception) -> tuple[type, str, bool, list[int]]:
    def call() -> None:
        assert ranks.leads, "it is called on rank 0 alone"
        raise error

    try:
        ranks.lead(call)
    except (InputError, OSError) as found:
        return type(found), str(found), getattr(found, "told", False), ranks.collect(ranks.rank)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("error", [InputError("give another --out"), OSError(28, "No space left", "x.png")])
def test_an_error_of_rank_0_is_raised_everywhere_and_said_once(error: Exception) -> None:
    found = agreed(3, failing, error)
    assert [told for *_, told, _ in found] == [False, True, True]
    assert all(one[:2] == (type(error), str(error)) and one[3] == [0, 1, 2] for one in found)


def batches_of(count: int, real: bool, ranks: Ranks) -> Generator[Examples]:
    """A rank's parts of batches of `count` images; with `real`, of so many more that are real."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(20, 1, 8, 8, generator=generator), torch.arange(20) % 4

    def one(seed: int) -> Generator[Examples]:
        return permuted(images, labels, batch_size=count, mirror=False, seed=seed, device=CPU)

    return mixed(shared(one(3), ranks), shared(one(4), ranks)) if real else shared(one(3), ranks)


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_classifier("convnet-2", 1, 4, 8)


def trained(ranks: Ranks, count: int, real: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The losses, and the weights after some steps on batches of `count` of which a rank has its part."""
    trainer = Trainer(network(), ranks=ranks)
    batches = batches_of(count, real, ranks)
    losses = list(trainer.learn(trainer.network.state_dict(), batches, steps=5, lr=1e-3))
    return [loss.item() for loss in losses], trainer.network.state_dict()


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("real", [False, True], ids=["classes", "real-or-not"])
@pytest.mark.parametrize("count", [7, 2])  # of two images the third rank has none
def test_ranks_train_as_one_does(count: int, real: bool, num_ranks: int) -> None:
    losses, weights = trained(Ranks(), count, real)
    # the bias of a convolution before a norm changes nothing: AdamW makes steps of its gradient's rounding
    idle = [f"features.{place}.bias" for place in (0, 4)]
    assert all(not torch.equal(weights[name], values) for name, values in network().state_dict().items())
    every = agreed(num_ranks, trained, count, real)
    for own_losses, own_weights in every:
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=1e-6)
        for name in weights.keys() - idle:
            torch.testing.assert_close(own_weights[name], weights[name], rtol=1e-3, atol=1e-4)
        assert all(torch.equal(own_weights[name], every[0][1][name]) for name in weights)


class Asked:
    """A `Session.check` that is asked to stop at its `number`-th call."""

    def __init__(self, number: float):
        self.number, self.calls = number, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls >= self.number:
            raise Stopped(signal.SIGTERM)


def classifiers(folder: Path, ranks: Ranks, check: Callable[[], None], **settings: Any) -> Classifiers:
    config = DistillConfig(discriminator="convnet-2", discriminator_batch_size=6, **settings)
    return Classifiers(config, 1, 8, 4, CPU, folder, Session(ranks, check))


def kept(ranks: Ranks, folder: Path, settings: dict[str, Any], asked: int | None) -> tuple[int, Any]:
    """The weights that a rank gets of a classifier, and its parts; asked: the rank that is to stop."""
    check, steps = Asked(2 if ranks.rank == asked else float("inf")), 2 * SHOWN_EVERY + 1
    own, seen = classifiers(folder, ranks, check, **settings), []

    def feed(seed: int) -> Generator[Examples]:
        for batch in batches_of(6, False, own.learners):
            seen.append(len(batch.labels))
            yield batch

    try:
        return own.get("2", "f_2", feed, steps).state_dict(), seen
    except Stopped as stopped:
        return stopped.signum, seen


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_rank_gets_the_classifier_that_is_in_the_folder(deterministic: bool, tmp_path: Path) -> None:
    found = agreed(3, kept, tmp_path, {"deterministic": deterministic}, None)
    stored = read_tensors(tmp_path / "2.safetensors")
    assert stored is not None
    assert all(torch.equal(weights[name], stored[name]) for weights, _ in found for name in stored)
    parts = [set(seen) for _, seen in found]
    assert parts == ([{6}, set(), set()] if deterministic else [{2}, {2}, {2}])
    alone = agreed(1, kept, tmp_path / "alone", {}, None)[0][0]
    same = all(torch.equal(alone[name], stored[name]) for name in stored)
    assert same or not deterministic


def test_ranks_that_train_together_stop_after_the_same_step(tmp_path: Path) -> None:
    """One rank alone is asked to; the others would wait for its part of the next step."""
    found = agreed(3, kept, tmp_path, {}, 1)
    assert [signum for signum, _ in found] == [signal.SIGTERM] * 3
    assert len({len(seen) for _, seen in found}) == 1 and not list(tmp_path.iterdir())


def diverged(ranks: Ranks, folder: Path, deterministic: bool) -> bool:
    own = classifiers(folder, ranks, Asked(float("inf")), deterministic=deterministic, discriminator_lr=1e30)
    try:
        own.get("2", "f_2", lambda seed: batches_of(6, False, own.learners), 3)
    except InputError as error:
        assert "not finite" in str(error)
        return getattr(error, "told", False)
    raise AssertionError("it is finite")


@pytest.mark.parametrize("deterministic", [False, True])
def test_weights_that_are_not_finite_are_told_once(deterministic: bool, tmp_path: Path) -> None:
    assert agreed(2, diverged, tmp_path, deterministic) == [False, True]


class Rounding:
    """A decoder whose result hangs on what is decoded together, as that of a convolution may."""

    device, seen_by = CPU, "a decoder"

    def seen_shape(self) -> tuple[int, int]:
        return 1, 2

    def seen(self, samples: Tensor) -> Tensor:
        return samples - samples.mean()


def collected(ranks: Ranks, samples: Samples) -> tuple[Tensor, Tensor]:
    own = Steering.__new__(Steering)
    own.ranks, own.generator, own.samples, own.layout = ranks, Rounding(), samples, samples.layout
    own.device, own.classes = CPU, ("3", "8")
    return own._collect(3)


def test_what_discriminators_see_hangs_on_no_number_of_ranks(tmp_path: Path) -> None:
    layout = Layout(2, (range(0, 110), range(110, 120), range(120, 130)))
    samples = Samples(tmp_path, layout, (1, 2, 2))
    generator, whole = torch.Generator().manual_seed(0), []
    for curriculum in (1, 2):
        values = torch.randn(layout.size(curriculum), 1, 2, 2, generator=generator)
        for part in cut(len(values), 7):
            write_tensors(samples.path(curriculum, part), {"samples": values[part.start : part.stop]})
        whole += [values[part.start : part.stop] for part in cut(len(values), BLOCK)]
    samples.scan()
    seen, positions = collected(Ranks(), samples)
    assert torch.equal(seen, torch.cat([part - part.mean() for part in whole]))
    assert positions.tolist() == [0] * 110 + [1] * 110 + [0] * 10 + [1] * 10
    for num_ranks in NUM_RANKS:
        for own, places in agreed(num_ranks, collected, samples):
            assert torch.equal(own, seen) and torch.equal(places, positions)
