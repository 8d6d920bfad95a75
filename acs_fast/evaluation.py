"""Judge a distilled set: train fresh classifiers on it alone, test on real held-out images (PROTOCOLS.md)."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast.augment import cutmix, normalize, train_transform
from acs_fast.config import DistillConfig, EvaluateConfig, InputError, resolve
from acs_fast.curriculum import distill
from acs_fast.data import ImageSet, load_images
from acs_fast.environment import describe, resolve_device
from acs_fast.models.classifier import build_classifier, default_network
from acs_fast.report import write_report
from acs_fast.writer import RUN_CONFIG, write_json

VALIDATIONS = 100
DISTILLED, RANDOM, PLAIN = "distilled", "random real", "plain"


@dataclass(frozen=True)
class Run:
    """A finished run folder: its configuration and its classes in label order."""

    path: Path
    config: DistillConfig
    classes: tuple[str, ...]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Train `repeats` fresh classifiers on the images of `config.path` and each baseline; test on real ones.

    `config.path` is a run folder or a folder <class>/*.png. Returns (and writes to results.json of a run
    folder) for each set the best and last top-1 accuracy of every repeat, their mean and their standard
    deviation (ddof 0), in percent.
    """
    run = read_run(Path(config.path))
    if run is None and config.real is None:
        raise InputError(
            f"{config.path} is not a run folder, so name the real images: --real FOLDER or --real digits"
        )
    if run is None and PLAIN in config.baselines:
        raise InputError(
            f"{config.path} is not a run folder, so --baselines plain cannot be sampled; give the run's"
        )
    source = config.real or (run.config.real if run else "")
    folder = str(run.path / "images") if run else config.path
    distilled = load_images(folder, "train", run.classes if run else None)
    size, channels = distilled.images.shape[-1], distilled.images.shape[1]
    test = load_images(source, "val", distilled.classes, size, channels)
    ipc = config.ipc or int(torch.bincount(distilled.labels).min())
    sets = {DISTILLED: distilled}
    if "random" in config.baselines:
        sets[RANDOM] = load_images(source, "train", distilled.classes, size, channels)
    if PLAIN in config.baselines and run:
        sets[PLAIN] = load_images(str(sample_plain(run) / "images"), "train", run.classes)
    for name, images in sets.items():
        fewest = int(torch.bincount(images.labels, minlength=len(images.classes)).min())
        if fewest < ipc:
            raise InputError(
                f"--ipc {ipc}: a class of the {name} images has only {fewest}; give at most that many"
            )
    device = resolve_device(config.device)
    network = config.network or default_network(size)
    epochs = config.epochs or protocol_epochs(ipc, len(distilled.classes))
    accuracies: dict[str, list[Accuracy]] = {name: [] for name in sets}
    started = time.perf_counter()
    with tqdm(
        total=len(sets) * config.repeats * epochs, desc="evaluate", unit="epoch", disable=None
    ) as progress:
        for name, images in sets.items():
            for seed in range(config.seed, config.seed + config.repeats):
                chosen = images.random(ipc, seed) if name == RANDOM else images.first(ipc)
                chosen = dataclasses.replace(chosen, mirror=test.mirror)
                progress.set_postfix_str(f"{name}, seed {seed}", refresh=False)
                accuracies[name].append(
                    train_and_test(chosen, test, network, config.protocol, epochs, seed, device, progress)
                )
    results = {
        "protocol": config.protocol,
        "network": network,
        "epochs": epochs,
        "ipc": ipc,
        "test_images": len(test),
        "real": source,
        "seconds": round(time.perf_counter() - started, 1),
        "sets": {name: summary(values) for name, values in accuracies.items()},
        **describe(device),
    }
    if run:
        write_json(run.path / "results.json", results)
        write_report(run.path, results)
    return results


def read_run(path: Path) -> Run | None:
    """The run in a folder, or None for a folder without a configuration; InputError if nothing is there."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a run folder or a folder of class folders")
    if not (path / RUN_CONFIG).is_file():
        return None
    try:
        record = json.loads((path / RUN_CONFIG).read_text())
        config, classes = record["config"], tuple(record["classes"])
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path / RUN_CONFIG} cannot be read ({error}); distil again with --overwrite"
        ) from error
    run = Run(path, resolve(DistillConfig, config), classes)
    images = sum(1 for _ in (path / "images").glob("*/*.png"))
    if images < run.config.ipc * len(classes):
        raise InputError(
            f"{path} is unfinished: {images} of {run.config.ipc * len(classes)} images; run distill again"
        )
    return run


def sample_plain(run: Run) -> Path:
    """The run's images without guidance: same model, noise and settings, made once inside the run folder."""
    out = run.path / "baselines" / PLAIN
    return distill(dataclasses.replace(run.config, guidance_scale=0.0, out=str(out)))


def summary(values: list[Accuracy]) -> dict[str, Any]:
    """Mean and standard deviation (ddof 0) of best and last over the repeats, with the values."""
    columns = {"best": [v.best for v in values], "last": [v.last for v in values]}
    return {
        key: {"mean": statistics.fmean(column), "std": statistics.pstdev(column), "values": column}
        for key, column in columns.items()
    }


def format_table(results: dict[str, Any]) -> str:
    """The results as the table that the command prints."""
    repeats = len(next(iter(results["sets"].values()))["best"]["values"])
    lines = [
        f"protocol {results['protocol']}: {results['network']}, {results['epochs']} epochs, "
        f"ipc {results['ipc']}, {repeats} repeats, top-1 % on {results['test_images']} real test images",
        f"{'set':<14}{'best':>14}{'last':>16}",
    ]
    for name, row in results["sets"].items():
        cells = [f"{row[key]['mean']:.1f} +- {row[key]['std']:.1f}" for key in ("best", "last")]
        lines.append(f"{name:<14}{cells[0]:>14}{cells[1]:>16}")
    lines.append(
        "mean +- std over repeats; best is the best of the validations on the test set, which flatters"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent of one trained classifier: the best of the validations, and the last."""

    best: float
    last: float


def protocol_epochs(ipc: int, num_classes: int) -> int:
    """The Minimax protocol's epochs by ipc; for exactly 100 classes two thirds, floored to hundreds."""
    limits = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
    epochs = next((value for limit, value in limits if ipc <= limit), 300)
    return int(2 * epochs / 3) // 100 * 100 if num_classes == 100 else epochs


def make_optimizer(network: nn.Module, protocol: str, num_classes: int) -> torch.optim.Optimizer:
    """`hard-sgd`: SGD 0.01 (0.1 above 100 classes), momentum 0.9; `hard-adamw`: AdamW 1e-3, decay 0.01."""
    if protocol == "hard-adamw":
        return torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    large = num_classes > 100
    return torch.optim.SGD(
        network.parameters(), lr=0.1 if large else 0.01, momentum=0.9, weight_decay=1e-4 if large else 5e-4
    )


def train_and_test(
    train: ImageSet,
    test: ImageSet,
    network: str,
    protocol: str,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: tqdm[Any] | None = None,
) -> Accuracy:
    """Train one fresh classifier on `train` and test it on `test`, both preloaded on the device.

    Batches of 64 (128 above 100 classes), CutMix on each, rate times 0.2 at epochs 2E // 3 and 5E // 6,
    validated every E // 100 epochs.
    """
    num_classes, size = len(train.classes), train.images.shape[-1]
    images, labels = train.images.to(device).float() / 255.0, train.labels.to(device)
    test_images, test_labels = normalize(test.images.to(device).float() / 255.0), test.labels.to(device)
    torch.manual_seed(seed)
    model = build_classifier(network, images.shape[1], num_classes, size)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, protocol, num_classes)
    milestones = sorted({2 * epochs // 3, 5 * epochs // 6})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    generator = torch.Generator().manual_seed(seed)
    batch_size = 128 if num_classes > 100 else 64
    every = max(1, epochs // VALIDATIONS)
    best = last = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(labels), generator=generator).to(device).split(batch_size):
            batch = train_transform(images[rows], train.mirror, generator)
            mixed, other, kept = cutmix(batch, labels[rows], generator)
            logits = model(mixed)
            loss = kept * F.cross_entropy(logits, labels[rows]) + (1.0 - kept) * F.cross_entropy(
                logits, other
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if progress is not None:
            progress.update()
        if epoch % every == 0 or epoch == epochs:
            last = top1(model, test_images, test_labels)
            best = max(best, last)
    return Accuracy(best, last)


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 128) -> float:
    """Top-1 accuracy in percent on normalised images."""
    model.eval()
    right = sum(
        (model(x).argmax(dim=1) == y).sum().item()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100.0 * right / len(labels)
