"""The record of a discriminator, against numbers counted by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from acs_fast.judge import judge

CLASSES = ("ant", "bee")
approx = partial(pytest.approx, abs=2e-6)


class Logits(nn.Module):
    """The two logits of an image are its pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def images(*logits: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(logits).view(-1, 1, 1, 2)


SAMPLED = images((2, 0), (2, 0), (0, 1), (3, 0)), torch.tensor([0, 0, 1, 1])
REAL = images((1, 0), (0, 1), (0, 1)), torch.tensor([0, 0, 1])


def test_a_classifiers_record() -> None:
    record = judge(Logits(), SAMPLED, 2, REAL, CLASSES, density=False)
    losses = [math.log1p(math.exp(-margin)) for margin in (2, 2, 1, -3)]
    assert record["sampled"] == {"images": 4, "accuracy": 75.0, "loss": approx(sum(losses) / 4)}
    assert record["newest"] == {"images": 2, "accuracy": 50.0, "loss": approx(sum(losses[2:]) / 2)}
    assert record["real"]["accuracy"] == 66.667 and record["misclassified_real"] == {"ant": 1, "bee": 0}


def test_the_record_of_a_discriminator_of_real_and_sampled() -> None:
    record = judge(Logits(), SAMPLED, 2, REAL, CLASSES, density=True)  # own logits 2, 2, 1, 0 and 1, 0, 1
    losses = [math.log1p(math.exp(value)) for value in (2, 2, 1, 0)]
    assert record["sampled"] == {"images": 4, "accuracy": 25.0, "loss": approx(sum(losses) / 4)}
    assert record["real"]["accuracy"] == 66.667 and record["misclassified_real"] == {"ant": 1, "bee": 0}


def test_without_real_images_nothing_is_said_of_them() -> None:
    record = judge(Logits(), SAMPLED, 4, None, CLASSES, density=False)
    assert record["real"] is record["misclassified_real"] is None and record["newest"] == record["sampled"]
