"""Ranks as processes: what they tell one another, train and stop together, and whole runs of them."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.discriminator import Trainer
from acs_fast.distributed import Ranks
from acs_fast.feeds import Examples, mixed, permuted, shared
from acs_fast.models.classifier import build_classifier
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


def batches_of(count: int, real: bool, ranks: Ranks, network: Any) -> Generator[Examples]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(20, 1, 8, 8, generator=generator), torch.arange(20) % 4

    def one(seed: int) -> Generator[Examples]:
        return permuted(images, labels, batch_size=count, mirror=False, seed=seed, device=CPU)

    return mixed(shared(one(3), ranks), shared(one(4), ranks)) if real else shared(one(3), ranks)


def trained(ranks: Ranks, count: int, real: bool, network: str, size: int) -> tuple[list[float], Tensor]:
    """The losses and the weights after some steps on batches of `count`, of which a rank has its part."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_classifier(network, 1, 4, size)
    trainer = Trainer(model, ranks=ranks)
    steps = list(trainer.learn(model.state_dict(), batches_of(count, real, ranks, network), steps=5, lr=1e-3))
    weights = torch.cat([values.flatten() for values in model.state_dict().values()])
    return [loss.item() for loss in steps], weights


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("real", [False, True], ids=["classes", "real-or-not"])
@pytest.mark.parametrize("count", [7, 2])  # of two images the third rank has none
def test_ranks_train_as_one_does(count: int, real: bool, num_ranks: int) -> None:
    losses, weights = trained(Ranks(), count, real, "convnet-2", 8)
    for one in agreed(num_ranks, trained, count, real, "convnet-2", 8):
        torch.testing.assert_close(one[0], losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one[1], weights, rtol=1e-4, atol=1e-6)
    start = trained(Ranks(), count, real, "convnet-2", 8)[1]
    assert torch.equal(start, weights)
