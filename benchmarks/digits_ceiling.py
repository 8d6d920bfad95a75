"""What 100 real digits can teach at most: the yardstick for the targets of `benchmarks.digits`.

python -m benchmarks.digits_ceiling    rows in results/digits_ceiling.jsonl and their table

The test of `benchmarks.digits` on real training images, ten a class, chosen in three ways, and on all 1,297:
random; the medoids of k-means on a class's pixels (coverage); picked in five curricula by what `learnability`
ascends, CE(f_i) - omega CE(f_real), so by that objective with every real image within reach.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_fast.config import DistillConfig
from acs_fast.data import DIGITS, ImageSet, load_images, to_model_range
from acs_fast.discriminator import Trainer
from acs_fast.models.classifier import build_classifier
from benchmarks.digits import RANDOM, RESULTS, judge, run

IPC, OMEGA, RESTARTS, ITERATIONS = 10, 2.0, 5, 50
MEDOIDS, PICKED, ALL = "real, k-medoids", "real, picked by learnability", "all real"


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Choose real images and train one ConvNet-3 on them, on one thread."""
    torch.set_num_threads(1)
    real, seed = load_images(DIGITS, "train"), cell["seed"]
    if cell["method"] == RANDOM:
        chosen = real.random(IPC, seed)
    elif cell["method"] == MEDOIDS:
        chosen = real.take(medoids(real, seed))
    elif cell["method"] == PICKED:
        chosen = real.take(picked(real, seed))
    else:
        chosen = real
    return {**cell, **judge(dataclasses.replace(chosen, mirror=False), seed)}


def medoids(real: ImageSet, seed: int) -> Tensor:
    """Rows of the images nearest to IPC k-means centres of each class's pixels, the best of RESTARTS."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for y in range(len(real.classes)):
        members = torch.nonzero(real.labels == y)[:, 0]
        x = to_model_range(real.images[members]).flatten(1)
        tries = [centres(x, generator) for _ in range(RESTARTS)]
        best = min(tries, key=lambda c: torch.cdist(x, c).amin(dim=1).square().sum().item())
        rows.append(members[torch.cdist(best, x).argmin(dim=1)])
    return torch.cat(rows)


def centres(x: Tensor, generator: torch.Generator) -> Tensor:
    """IPC centres of the rows of x: k-means++ (Arthur & Vassilvitskii 2007), then Lloyd's iterations."""
    found = x[torch.randint(len(x), (1,), generator=generator)]
    while len(found) < IPC:
        apart = torch.cdist(x, found).amin(dim=1).square()
        found = torch.cat((found, x[torch.multinomial(apart, 1, generator=generator)]))
    for _ in range(ITERATIONS):
        nearest = torch.cdist(x, found).argmin(dim=1)
        parts = [x[nearest == k] for k in range(IPC)]
        found = torch.stack([p.mean(dim=0) if len(p) else c for p, c in zip(parts, found, strict=True)])
    return found


def picked(real: ImageSet, seed: int) -> Tensor:
    """Rows in curricula as in ACS: two random images a class, then two of the largest objective, ..."""
    config = DistillConfig()
    part = IPC // config.num_curricula
    x, labels = to_model_range(real.images), real.labels
    against = OMEGA * losses(x, labels, x, labels, config, config.real_steps, seed)
    generator = torch.Generator().manual_seed(seed)
    score, rows = torch.rand(len(labels), generator=generator), torch.empty(0, dtype=torch.long)
    for curriculum in range(config.num_curricula):
        if curriculum > 0:
            steps = config.discriminator_steps
            score = losses(x[rows], labels[rows], x, labels, config, steps, seed + curriculum) - against
        score[rows] = -torch.inf
        for y in range(len(real.classes)):
            members = torch.nonzero(labels == y)[:, 0]
            rows = torch.cat((rows, members[score[members].topk(part).indices]))
    return rows


def losses(
    x: Tensor, labels: Tensor, all_x: Tensor, all_labels: Tensor, config: DistillConfig, steps: int, seed: int
) -> Tensor:
    """The cross-entropy of every image under a classifier trained on x as `distill` trains its own."""
    torch.manual_seed(seed)
    network = build_classifier(config.discriminator, 1, 10, 8)
    lr, batch_size = config.discriminator_lr, config.discriminator_batch_size
    settings = {"steps": steps, "lr": lr, "batch_size": batch_size, "mirror": False, "seed": seed}
    for _ in Trainer(network).fit(network.state_dict(), x, labels, **settings):
        pass
    with torch.no_grad():
        return F.cross_entropy(network.eval()(all_x), all_labels, reduction="none")


def main() -> None:
    """Measure what the file lacks."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    chosen = [(method, IPC, seed) for method in (RANDOM, MEDOIDS, PICKED) for seed in range(5)]
    cells = [{"method": m, "settings": {}, "ipc": ipc, "seed": s} for m, ipc, s in [*chosen, (ALL, 0, 0)]]
    run(RESULTS / "digits_ceiling.jsonl", cells, measure)


if __name__ == "__main__":
    main()
