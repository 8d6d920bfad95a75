"""Does the fast evaluation teach as much as the protocol in PIL? Real digits, 5 seeds, one row.

python -m benchmarks.evaluate_accuracy        about ten minutes on two cores

`hard-sgd`, ConvNet-3, ten random digits a class, in colour as PIL's transforms want them, 300 epochs: by
this project in fp32, with convolutions in bf16, and by a DataLoader over PIL images with the relatives'
transforms; last accuracy on the 500 test digits. Differences are paired by seed, with Student's 95 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from acs_fast.data import DIGITS, ImageSet, load_images
from acs_fast.environment import describe
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.training import TestSet, top1, train_and_test
from benchmarks.baselines.pil_evaluation import PilTraining
from benchmarks.evaluation_table import T95

RESULTS = Path(__file__).parent / "results" / "evaluate_accuracy.jsonl"
CPU = torch.device("cpu")
OURS, BF16, PIL = "ours, fp32", "ours, bf16", "DataLoader over PIL images"


def in_color(images: ImageSet) -> ImageSet:
    """Grey images as RGB ones, which may be mirrored as the protocol does."""
    return dataclasses.replace(images, images=images.images.expand(-1, 3, -1, -1).contiguous(), mirror=True)


def by_pil(train: ImageSet, test: TestSet, seed: int, epochs: int) -> float:
    """The baseline's last accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (image, label) in enumerate(zip(train.images, train.labels.tolist(), strict=True)):
            path = Path(folder, train.classes[label], f"{number}.png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        theirs = PilTraining(Path(folder), train.classes, 8, "convnet-3", seed, epochs, True)
        for _ in range(epochs):
            theirs.epoch()
        theirs.close()
    return top1(theirs.network.eval(), test)


def measure(epochs: int, seeds: int) -> dict[str, Any]:
    """The row."""
    test = TestSet.of(in_color(load_images(DIGITS, "val")), CPU)
    recipe = make_recipe("hard-sgd", 10, 10, epochs)
    found: dict[str, list[float]] = {OURS: [], BF16: [], PIL: []}
    for seed in range(seeds):
        train = in_color(load_images(DIGITS, "train").random(10, seed))
        for name, dtype in ((OURS, torch.float32), (BF16, torch.bfloat16)):
            found[name].append(train_and_test(train, test, "convnet-3", recipe, seed, CPU, dtype=dtype).last)
        found[PIL].append(by_pil(train, test, seed, epochs))
        print({name: values[-1] for name, values in found.items()}, flush=True)
    differences = {
        f"{a} minus {b}": difference(found[a], found[b]) for a, b in ((OURS, PIL), (BF16, OURS), (BF16, PIL))
    }
    return {
        "protocol": "hard-sgd", "network": "convnet-3", "image_size": 8, "ipc": 10, "epochs": epochs,
        "last": found, "mean": {name: round(statistics.fmean(v), 2) for name, v in found.items()},
        "differences": differences, **describe(CPU),
    }  # fmt: skip


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """The mean of a - b over the seeds and half its 95 % interval."""
    values = [x - y for x, y in zip(a, b, strict=True)]
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": round(statistics.fmean(values), 2), "half": round(half, 2)}


def main() -> None:
    """Measure, print, append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append no row")
    args = parser.parse_args()
    row = measure(args.epochs, args.seeds)
    print(json.dumps(row, indent=2))
    if not args.dry:
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
