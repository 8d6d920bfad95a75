"""What a discriminator knows: its accuracy on the sampled set, the newest curriculum, real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast.discriminator import score
from acs_fast.manifest import read_rows
from acs_fast.writer import CURRICULA, read_json


def judge(
    network: nn.Module,
    sampled: tuple[Tensor, Tensor],
    newest: int,
    real: tuple[Tensor, Tensor] | None,
    classes: tuple[str, ...],
    density: bool,
) -> dict[str, Any]:
    """The record of a discriminator after its training; accuracies in percent, losses its cross-entropy.

    sampled: images [N, C, H, W] and labels of all earlier curricula; the last `newest` of them are of the
    curriculum before. real: images [M, C, H, W] and labels, or None where the run has none at hand.
    density: it tells real from sampled images (then `misclassified_real` are real ones taken for sampled).
    """
    labels = sampled[1].cpu()
    right, loss = (values.cpu() for values in score(network, *sampled, False if density else None))
    record: dict[str, Any] = {
        "sampled": summary(right, loss),
        "newest": summary(right[len(labels) - newest :], loss[len(labels) - newest :]),
        "real": None,
        "misclassified_real": None,
    }
    if real is not None:
        right, loss = (values.cpu() for values in score(network, *real, True if density else None))
        wrong = torch.bincount(real[1].cpu()[~right], minlength=len(classes)).tolist()
        record["real"] = summary(right, loss)
        record["misclassified_real"] = dict(zip(classes, wrong, strict=True))
    return record


def summary(right: Tensor, loss: Tensor) -> dict[str, Any]:
    """Number, accuracy in percent and mean loss."""
    return {
        "images": len(right),
        "accuracy": round(100.0 * right.double().mean().item(), 3),
        "loss": round(loss.double().mean().item(), 6),
    }


def read_curricula(out: Path) -> dict[str, Any]:
    """The record of the discriminators by curriculum; empty where it is missing or damaged."""
    path = out / CURRICULA
    stored = read_json(path) if path.is_file() else None
    return stored if isinstance(stored, dict) else {}


def by_curriculum(out: Path) -> list[dict[str, Any]]:
    """What a run's discriminators knew, a row for each of its curricula 1..N, in order.

    `discriminator`: the record of f_i, which steered it (None for the first). `before`: f_i on the images
    that it steered; `after`: f_i+1, trained on them too, on the same (None for the last curriculum). The fall
    of the loss from `before` to `after` is the loss spike of the curriculum. Empty without guidance.
    """
    curricula = read_curricula(out)
    scores: dict[int, list[tuple[bool, float]]] = {}
    for row in read_rows(out).values() if curricula else ():
        own = scores.setdefault(row["curriculum"], [])
        if row["discriminator_loss"] is not None:
            own.append((row["discriminator_correct"], row["discriminator_loss"]))
    table = []
    for number in sorted(scores):
        before = None
        if scores[number]:
            right, loss = zip(*scores[number], strict=True)
            before = summary(torch.tensor(right), torch.tensor(loss))
        following = curricula.get(str(number + 1))
        table.append(
            {
                "curriculum": number,
                "discriminator": curricula.get(str(number)),
                "before": before,
                "after": following and following["newest"],
            }
        )
    return table
