"""How fast one epoch of `hard-sgd` is: this project beside a DataLoader over PIL images with 2 workers.

python -m benchmarks.evaluate_speed --real FOLDER    FOLDER/train/<class>/*
python -m benchmarks.evaluate_speed                  pictures made on the spot
python -m benchmarks.evaluate_speed --size 32 --rounds 1 --dry    whether it runs

Ten classes, 10 images each, ConvNet-6 at 224 px by default; a row into results/evaluate_speed.jsonl.
The images are written as PNG files, which both read: ours once, theirs every epoch. First one training step
of each from the same weights on the same augmented and mixed batch is compared: loss and weights. Then each
is timed in turn, round after round, in this process; speed-ups are medians over the rounds of the ratio
within a round. Theirs is timed twice, with workers that live through the run, as Minimax's script has them,
and with workers started for every epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from acs_fast.augment import cutmix
from acs_fast.data import ImageSet, class_folders, image_files, load_images, read_image
from acs_fast.environment import describe
from acs_fast.evaluation import training
from acs_fast.evaluation.arithmetic import resolve_dtype
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.training import Learner
from acs_fast.evaluation.transforms import transformed
from acs_fast.models.classifier import default_network
from benchmarks.baselines.pil_evaluation import BATCH_SIZE, PilTraining
from benchmarks.baselines.pil_evaluation import cutmix as their_cutmix

RESULTS = Path(__file__).parent / "results" / "evaluate_speed.jsonl"
CPU = torch.device("cpu")
CLASSES, EPOCHS = 10, 2000  # EPOCHS: of the protocol at ipc 10, which sets the milestones
# relative; of fp32 sums in another order, where much of a gradient cancels before a norm, and of bf16
TOLERANCES = {
    torch.float32: {"loss": 1e-5, "weights": 5e-3},
    torch.bfloat16: {"loss": 2e-2, "weights": 0.3},
}
SETTLE = 1.0  # seconds: workers that read ahead end what they do before another method is timed


class Ours:
    """What this project trains by: the one place here that knows its interface."""

    def __init__(self, images: ImageSet, network: str, dtype: torch.dtype):
        self.images, self.network, self.dtype = images, network, dtype
        self.recipe = make_recipe("hard-sgd", 10, CLASSES, EPOCHS)
        self.learner = self.new(images)
        self.learner.epoch()  # prepared, as it is for all epochs but the first

    def new(self, images: ImageSet) -> Learner:
        """A classifier to train."""
        return Learner(images, self.network, self.recipe, 0, CPU, dtype=self.dtype)

    def epoch(self) -> None:
        """Train for one epoch."""
        self.learner.epoch()

    def learn(
        self, initial: dict[str, Tensor], mixed: Tensor, other: Tensor, kept: float, labels: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss on a mixed batch of at most 64 from given weights, and the weights after a step on it."""
        learner = self.new(ImageSet(torch.zeros_like(mixed, dtype=torch.uint8), labels, self.images.classes))
        learner.network.load_state_dict(initial)
        order = (labels[None] == other[:, None]).int().argmax(dim=1)  # of images with the pasted labels
        draws = {"rows": torch.arange(len(labels)), "order": order, "box": torch.zeros(4)}
        with (
            mock.patch.object(training, "transformed", lambda *args: mixed),
            mock.patch.object(training, "cutmix", lambda *args: (mixed, torch.tensor(kept))),
        ):
            losses = list(learner.losses(draws))
        for loss in losses:
            loss.backward()
        learner.optimizer.step()
        return sum(loss.item() for loss in losses), learner.network.state_dict()

    def augmentation(self) -> None:
        """What an epoch does before its training steps, alone."""
        for draws in self.learner.draws():
            cutmix(transformed(self.learner.images, draws), draws["box"], draws["order"])

    def describe(self) -> str:
        """The dtype and memory format that it trains in."""
        weight = next(self.learner.network.parameters())
        last = weight.is_contiguous(memory_format=torch.channels_last)
        dtype = {torch.bfloat16: "bf16, weights fp32", torch.float32: "fp32"}[self.dtype]
        parts = f", {self.learner.part} images at a time" if self.learner.part else ""
        return f"{dtype}, {'channels_last' if last else 'contiguous'}, eager{parts}"


def write_pictures(folder: Path, source: str | None, ipc: int, size: int) -> tuple[str, ...]:
    """Ten classes of `ipc` PNG files [size, size]: real ones, or blurred noise; returns their names."""
    names = tuple(class_folders(Path(source, "train"))[:CLASSES] if source else map(str, range(CLASSES)))
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir()
        files = sorted(image_files(Path(source, "train", name)))[:ipc] if source else [None] * ipc
        for index, file in enumerate(files):
            if file is None:  # compresses about as photographs do: noise at three scales
                layers = [
                    rng.uniform(0, 255, (edge, edge, 3)).astype(np.uint8)
                    for edge in (4, size // 8, size // 2)
                ]
                scaled = [np.asarray(Image.fromarray(x).resize((size, size)), np.float32) for x in layers]
                pixels = (0.5 * scaled[0] + 0.4 * scaled[1] + 0.1 * scaled[2]).astype(np.uint8)
            else:
                pixels = read_image(file, size, 3).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return names


def check_same(ours: Ours, theirs: PilTraining) -> dict[str, float]:
    """How far one step of both differs, relative: the loss, and the weights (L2) to how far they moved."""
    images, labels = next(iter(theirs.batches()))
    np.random.seed(0)
    mixed, other, kept = their_cutmix(images, labels)
    initial = copy.deepcopy(theirs.network.state_dict())
    loss, after = ours.learn(initial, mixed, other, kept, labels)
    their_loss = theirs.learn(mixed, other, kept, labels)
    state = theirs.network.state_dict()
    apart, moved = (
        sum((other_state[name] - value).square().sum().item() for name, value in state.items())
        for other_state in (after, initial)
    )
    found = {"loss": abs(loss - their_loss) / their_loss, "weights": (apart / moved) ** 0.5}
    for name, value in found.items():
        assert value < TOLERANCES[ours.dtype][name], f"the two are not the same protocol: {found}"
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def steps_alone(theirs: PilTraining) -> None:
    """The training steps of an epoch on images that are there already."""
    for images, labels in ready(theirs):
        theirs.step(images, labels)


def ready(theirs: PilTraining) -> list[tuple[Tensor, Tensor]]:
    """Noise in the shapes of an epoch's batches."""
    count, size = len(theirs.loader.dataset), theirs.loader.dataset.size  # type: ignore[arg-type,attr-defined]
    return [
        (torch.randn(len(rows), 3, size, size), torch.zeros(len(rows), dtype=torch.long))
        for rows in torch.arange(count).split(BATCH_SIZE)
    ]


def shares(ours: Ours, theirs: PilTraining, epoch: float) -> dict[str, float]:
    """Seconds of an epoch's parts; theirs overlap, on the same cores. epoch: of ours, all of it."""
    augmentation = seconds(ours.augmentation)
    found = {
        "ours, augmentation": augmentation,
        "ours, training steps": epoch - augmentation,
        "DataLoader alone": seconds(lambda: sum(1 for _ in theirs.batches())),
        "its training steps alone": seconds(lambda: steps_alone(theirs)),
    }
    return {name: round(value, 3) for name, value in found.items()}


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row."""
    network = args.network or default_network(args.size)
    classes = write_pictures(folder, args.real, args.ipc, args.size)
    images = load_images(str(folder), None, classes)
    fp32 = Ours(images, network, torch.float32)
    ours = Ours(images, network, resolve_dtype("auto", CPU, args.size))
    theirs = partial(PilTraining, folder, classes, args.size, network, 0, EPOCHS)
    difference = {method.describe(): check_same(method, theirs(False)) for method in (fp32, ours)}
    started, kept = theirs(False), theirs(True)
    methods: dict[str, Callable[[], None]] = {
        "ours": ours.epoch,
        "ours, fp32": fp32.epoch,
        "DataLoader, workers kept": kept.epoch,
        "DataLoader, workers started": started.epoch,
    }
    load, times = os.getloadavg()[0], {name: [] for name in methods}  # type: dict[str, list[float]]
    for number in range(-1, args.rounds):  # the first round warms up
        for name, epoch in methods.items():
            value = seconds(epoch)
            time.sleep(SETTLE)
            if number >= 0:
                times[name].append(round(value, 4))
                print(f"round {number}: {name} {value:.3f} s", flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    parts = shares(ours, started, median["ours"])
    kept.close()
    return {
        "protocol": "hard-sgd", "network": network, "size": args.size, "ipc": args.ipc, "classes": CLASSES,
        "batch_size": BATCH_SIZE, "images": Path(args.real).name if args.real else "made on the spot",
        "rounds": args.rounds, "ours": ours.describe(), "baseline": "fp32, contiguous, eager, 2 workers",
        "difference_of_a_step": difference,
        "seconds_per_epoch": {name: round(value, 3) for name, value in median.items()},
        "speedup": {
            name: round(statistics.median(a / b for a, b in zip(times[name], times["ours"], strict=True)), 2)
            for name in methods if name != "ours"
        },
        "seconds_of_parts": parts, "seconds_of_rounds": times, "load_before": round(load, 2), **describe(CPU),
    }  # fmt: skip


def main() -> None:
    """Compare, time, print and append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", help="real images, FOLDER/train/<class>/*; default: made on the spot")
    parser.add_argument("--network", help="default: the ConvNet of the size's depth")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="append no row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = compare(args, Path(folder))
    print(json.dumps(row, indent=2))
    if not args.dry:
        with open(RESULTS, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
