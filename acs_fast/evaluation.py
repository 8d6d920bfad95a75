"""Judge a distilled set: train fresh classifiers on it alone, test on real held-out images (PROTOCOLS.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from acs_fast.config import PRESETS, DistillConfig, EvaluateConfig, InputError, resolve
from acs_fast.curriculum import distill
from acs_fast.data import (
    DIGITS,
    ImageSet,
    check_classes,
    has_splits,
    load_images,
    parse_classes,
    select_classes,
)
from acs_fast.environment import describe, resolve_device
from acs_fast.images import Images
from acs_fast.judge import by_curriculum
from acs_fast.models.checkpoint import digest, read_config
from acs_fast.models.classifier import build_classifier, default_network
from acs_fast.networks import checkpoint_path, samples_pixels
from acs_fast.protocol import Accuracy, protocol_epochs, train_and_test
from acs_fast.report import epochs_text, write_report
from acs_fast.writer import RUN_CONFIG, lock, write_json

PROTOCOL_SIZE = 224  # px: the published protocols resize to this; here a set keeps its own size
DISTILLED, RANDOM, PLAIN = "distilled", "random real", "plain"


@dataclass(frozen=True)
class Run:
    """A run folder: its configuration, classes with the model's labels, the model's digest, the device."""

    path: Path
    config: DistillConfig
    classes: tuple[str, ...]
    class_labels: tuple[int, ...]
    model_sha256: str
    device: str


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Train `repeats` fresh classifiers on the images of `config.path` and each baseline; test on real ones.

    `config.path` is a run folder, or a folder of <class>/<image> or of WebDataset shards. Returns (and writes
    to results.json of a run folder) for each set the best and last top-1 accuracy of every repeat, their mean
    and their standard deviation (ddof 0), in percent. What can be refused is refused before anything is
    trained or sampled.
    """
    run = read_run(Path(config.path))
    device = resolve_device(config.device)
    source = config.real or (run.config.real if run else "")
    check_baselines(config, run, source)
    sets, test, ipc = load_sets(config, run, source)
    channels, size = test.images.shape[1], test.images.shape[-1]
    num_classes = len(test.classes)
    network = config.network or default_network(size)
    with torch.device("meta"):
        build_classifier(network, channels, num_classes, size)  # refused here if it does not fit
    if run:
        with lock(run.path):  # refused here if results could not be written
            pass
    if PLAIN in config.baselines and run:
        sets[PLAIN] = load_images(str(sample_plain(run, device) / "images"), None, run.classes)
    protocol, epochs = choose_protocol(config, run, ipc, num_classes)
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
                    train_and_test(chosen, test, network, protocol, epochs, seed, device, progress)
                )
    results = {
        "protocol": protocol,
        "network": network,
        "epochs": epochs,
        "protocol_epochs": protocol_epochs(ipc, num_classes),
        "ipc": ipc,
        "image_size": size,
        "mirror": test.mirror,
        "seed": config.seed,
        "repeats": config.repeats,
        "baselines": list(config.baselines),
        "test_images": len(test),
        "real": source,
        "seconds": round(time.perf_counter() - started, 1),
        "sets": {name: summary(values) for name, values in accuracies.items()},
        **describe(device),
    }
    if run:
        results["curricula"] = by_curriculum(run.path)
        write_results(run.path, results)
    return results


def check_test_images(config: DistillConfig) -> None:
    """InputError before a run whose images could not be judged by the digits, the default of `--real`."""
    if config.real == DIGITS:
        shape = read_config(checkpoint_path(config.model))
        size = shape.input_size if samples_pixels(shape) else None
        channels = shape.in_channels if samples_pixels(shape) else 3
        load_images(DIGITS, "val", select_classes(shape.class_names, config.classes)[0], size, channels)


def load_sets(
    config: EvaluateConfig, run: Run | None, source: str
) -> tuple[dict[str, ImageSet], ImageSet, int]:
    """The sets to train on that exist already, the real test images, and the ipc, which every set has."""
    folder, classes = (str(run.path / "images"), run.classes) if run else (config.path, None)
    distilled = load_images(folder, None, classes)
    channels, size = distilled.images.shape[1], distilled.images.shape[-1]
    test = load_images(source, "val", distilled.classes, size, channels)
    sets = {DISTILLED: distilled}
    if "random" in config.baselines:
        sets[RANDOM] = load_images(source, "train", distilled.classes, size, channels)
    available = {name: fewest(images) for name, images in sets.items()}
    if PLAIN in config.baselines and run:
        available[PLAIN] = run.config.ipc
    ipc = config.ipc or available[DISTILLED]
    for name, count in available.items():
        if count < ipc:
            raise InputError(f"--ipc {ipc}: a class of the {name} images has only {count}; give at most that")
    return sets, test, ipc


def fewest(images: ImageSet) -> int:
    """The number of images of the smallest class."""
    return int(torch.bincount(images.labels, minlength=len(images.classes)).min())


def choose_protocol(config: EvaluateConfig, run: Run | None, ipc: int, num_classes: int) -> tuple[str, int]:
    """Protocol and epochs: those given; else the preset's for a run on the digits; else hard-sgd, by ipc.

    A protocol that is named has its own epochs, not the preset's.
    """
    source = (config.real or run.config.real) if run else ""
    preset = PRESETS["EvaluateConfig"].get(source, {}) if not config.protocol else {}
    protocol = config.protocol or preset.get("protocol", "hard-sgd")
    return protocol, config.epochs or preset.get("epochs") or protocol_epochs(ipc, num_classes)


def check_baselines(config: EvaluateConfig, run: Run | None, source: str) -> None:
    """InputError for real images that are not named and for a baseline that cannot be had honestly."""
    if not source:
        raise InputError(
            f"{config.path} is not a run folder, so name the real images: --real FOLDER or --real digits"
        )
    if "random" in config.baselines and not has_splits(source):
        raise InputError(
            f"--baselines random: {source} has no train/ and val/, so the classifiers would be tested on "
            "the images they are trained on; split it or leave random out"
        )
    if PLAIN not in config.baselines:
        return
    if run is None:
        raise InputError(
            f"{config.path} is not a run folder, so --baselines plain cannot be sampled; give the run's"
        )
    try:
        same = digest(checkpoint_path(run.config.model)) == run.model_sha256
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"--baselines plain: {run.config.model} is not the model of the run any more; put it back or "
            "leave plain out"
        )
    listed = run.classes if run.config.classes is None else parse_classes(run.config.classes)
    named = zip(listed, run.classes, map(str, run.class_labels), strict=False)
    if len(listed) != len(run.classes) or any(text not in names for text, *names in named):
        raise InputError(
            f"--baselines plain: {run.config.classes} lists other classes than the run has; "
            "put it back or leave plain out"
        )


def read_run(path: Path) -> Run | None:
    """The finished run in a folder, or None for a folder without a configuration.

    InputError if there is no folder, an image is missing, or the contact sheet, which distill writes last.
    """
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a run folder or a folder of class folders")
    if not (path / RUN_CONFIG).is_file():
        return None
    run = read_record(path)
    total = run.config.ipc * len(run.classes)
    images, indices = Images(path, run.config.format), range(run.config.ipc)
    found = sum(images.holds((name, index)) for name in run.classes for index in indices)
    if found < total:
        raise InputError(f"{path} is unfinished: {found} of {total} images; run distill again")
    if not (path / "contact_sheet.png").is_file():
        raise InputError(f"{path} is unfinished: it has no contact_sheet.png; run distill again")
    return run


def read_record(path: Path) -> Run:
    """The run that the configuration in a folder describes; InputError if distill did not write it."""
    try:
        record = json.loads((path / RUN_CONFIG).read_text())
        if not isinstance(record["classes"], list) or not record["classes"]:
            raise ValueError("classes is no list of names")
        if not isinstance(record["model_sha256"], str):
            raise ValueError("model_sha256 is no text")
        return Run(
            path=path,
            config=resolve(DistillConfig, record["config"]),
            classes=check_classes(tuple(record["classes"])),
            class_labels=tuple(record["class_labels"]),
            model_sha256=record["model_sha256"],
            device=str(record.get("device")).partition(" ")[0],
        )
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{path / RUN_CONFIG} cannot be read ({error}); distil again with --overwrite"
        ) from error


def sample_plain(run: Run, device: torch.device) -> Path:
    """The run's images without guidance: same model, noise and settings, kept inside the run folder."""
    out = run.path / "baselines" / PLAIN
    # kernels that were chosen on another kind of device need not be on this one
    config = dataclasses.replace(run.config, guidance_scale=0.0, out=str(out), device=device.type)
    if run.device != device.type:
        config = dataclasses.replace(config, attention="auto", compile="auto")
    other_device = (out / RUN_CONFIG).is_file() and read_record(out).device != device.type
    return distill(config, overwrite=other_device)


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json, and report.html if it can be drawn, with the run's lock held."""
    with patient_lock(path):
        write_json(path / "results.json", results)
        try:
            write_report(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"warning: no report.html could be drawn ({error})", file=sys.stderr)
            with contextlib.suppress(OSError):
                (path / "report.html").unlink()  # an earlier one shows other results


@contextlib.contextmanager
def patient_lock(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """`writer.lock`, but it waits for a while: the other process may be about to end its own evaluation."""
    until = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path))
                break
            except InputError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield


def summary(values: list[Accuracy]) -> dict[str, Any]:
    """Mean and standard deviation (ddof 0) of best and last over the repeats, with the values."""
    columns = {"best": [v.best for v in values], "last": [v.last for v in values]}
    return {
        key: {"mean": statistics.fmean(column), "std": statistics.pstdev(column), "values": column}
        for key, column in columns.items()
    }


def format_table(results: dict[str, Any]) -> str:
    """The results as the table that the command prints."""
    repeats, size = results["repeats"], f"images of {results['image_size']} px"
    lines = [
        f"protocol {results['protocol']}: {results['network']}, {epochs_text(results)}, "
        f"ipc {results['ipc']}, {repeats} repeats, top-1 % on {results['test_images']} real test images",
        size
        if results["image_size"] == PROTOCOL_SIZE
        else f"{size}; the protocol resizes to {PROTOCOL_SIZE}",
        f"{'set':<14}{'best':>14}{'last':>16}",
    ]
    for name, row in results["sets"].items():
        cells = [f"{row[key]['mean']:.1f} +- {row[key]['std']:.1f}" for key in ("best", "last")]
        lines.append(f"{name:<14}{cells[0]:>14}{cells[1]:>16}")
    lines.append(
        "mean +- std over repeats; best is the best of the validations on the test set, which flatters"
    )
    return "\n".join(lines)
