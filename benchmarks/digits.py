"""Does ACS teach more than plain sampling? Accuracy on 500 real test digits, a JSON line a cell, resumable.

python -m benchmarks.digits sweep       the sweep of CFG and guidance scale, on seeds 100 to 102
python -m benchmarks.digits reported    the table of the README, on seeds 0 to 4 (about 15 minutes on 2 cores)
python -m benchmarks.digits table FILE  means over the seeds of a file's rows, as Markdown
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import DistillConfig, EvaluateConfig, resolve
from acs_fast.curriculum import distill
from acs_fast.data import DIGITS, ImageSet, load_images
from acs_fast.environment import describe
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.training import TestSet, train_and_test

RESULTS = Path(__file__).parent / "results"
RANDOM = "random real"
PLAIN = {"guidance_scale": [0.0], "num_curricula": [1]}
# name -> grid of settings that differ from the preset; None draws real images
LEARNABILITY = {"objective": ["learnability"], "cfg_scale": [2.0]}
SWEEP: dict[str, dict[str, list[Any]] | None] = {
    RANDOM: None,
    "plain": {**PLAIN, "cfg_scale": [1.0, 1.5, 2.0, 3.0, 4.0]},
    "ACS": {"cfg_scale": [2.0, 3.0], "guidance_scale": [0.15, 0.2, 0.3]},
    "ACS, learnability": {**LEARNABILITY, "guidance_scale": [0.2, 0.3]},
}
REPORTED: dict[str, dict[str, list[Any]] | None] = {
    RANDOM: None,
    "plain": {**PLAIN, "cfg_scale": [1.0, 1.5, 2.0, 3.0, 4.0]},
    "ACS": {},
    "ACS, learnability": {**LEARNABILITY, "guidance_scale": [0.3]},
}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Distil (or draw real images) and train one ConvNet-3, with one seed for both, on one thread."""
    torch.set_num_threads(1)
    started, record = time.perf_counter(), {}
    ipc, seed = cell["ipc"], cell["seed"]
    if cell["method"] == RANDOM:
        train = load_images(DIGITS, "train").random(ipc, seed)
    else:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            settings = {**cell["settings"], "ipc": ipc, "seed": seed, "device": "cpu", "out": f"{folder}/run"}
            out = distill(resolve(DistillConfig, settings))
            record = json.loads((out / "config.json").read_text())
            train = dataclasses.replace(load_images(str(out / "images"), None), mirror=False)
    return {
        **cell,
        "config": {k: v for k, v in record.get("config", {}).items() if k != "out"},
        "model_sha256": record.get("model_sha256"),
        "seconds_distill": round(time.perf_counter() - started, 1),
        **judge(train, seed),
    }


def judge(train: ImageSet, seed: int) -> dict[str, Any]:
    """Train one ConvNet-3 by the digits' protocol and test it on the 500 test digits."""
    started = time.perf_counter()
    protocol = resolve(EvaluateConfig, {"preset": DIGITS})
    assert protocol.epochs is not None
    cpu = torch.device("cpu")
    test = TestSet.of(load_images(DIGITS, "val"), cpu)
    recipe = make_recipe(protocol.protocol[0], len(train) // len(train.classes), 10, protocol.epochs)
    accuracy = train_and_test(train, test, "convnet-3", recipe, seed, cpu)
    return {
        "protocol": recipe.protocol,
        "epochs": protocol.epochs,
        "best": accuracy.best,
        "last": accuracy.last,
        "seconds_evaluate": round(time.perf_counter() - started, 1),
        **describe(cpu),
    }


def cells(methods: dict[str, dict[str, list[Any]] | None], seeds: range) -> list[dict[str, Any]]:
    """Every combination of ipc, method, setting and seed."""
    found = []
    for ipc, (method, grid) in itertools.product((5, 10), methods.items()):
        grid = grid or {}
        for values, seed in itertools.product(itertools.product(*grid.values()), seeds):
            settings = dict(zip(grid, values, strict=True))
            found.append({"method": method, "settings": settings, "ipc": ipc, "seed": seed})
    return found


def identity(row: dict[str, Any]) -> str:
    """What makes two rows the same cell."""
    return json.dumps([row[key] for key in ("method", "settings", "ipc", "seed")], sort_keys=True)


def run(
    path: Path, wanted: list[dict[str, Any]], measure: Callable[[dict[str, Any]], dict[str, Any]] = measure
) -> None:
    """Measure the cells that the file lacks, on two single-threaded processes, and append their rows."""
    path.parent.mkdir(exist_ok=True)
    known = {identity(row) for row in read(path)} if path.is_file() else set()
    missing = [cell for cell in wanted if identity(cell) not in known]
    with multiprocessing.get_context("spawn").Pool(2) as pool, open(path, "a") as file:
        for row in pool.imap_unordered(measure, missing):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row["method"], row["settings"], row["ipc"], row["seed"], row["last"], flush=True)
    print(table(path))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> str:
    """Mean and standard error over the seeds of last and best accuracy, by ipc, method and setting."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in read(path):
        shown = {k: v for k, v in row["settings"].items() if k not in ("num_curricula", "objective")}
        text = ", ".join(f"{name} {value:g}" for name, value in shown.items() if row["method"] != RANDOM)
        groups.setdefault((row["ipc"], row["method"], text), []).append(row)
    lines = ["| ipc | method | settings | last | best | seeds |", "|---|---|---|---|---|---|"]
    for (ipc, method, text), rows in groups.items():
        cells = [f"{mean_error([row[key] for row in rows])}" for key in ("last", "best")]
        lines.append(f"| {ipc} | {method} | {text} | {cells[0]} | {cells[1]} | {len(rows)} |")
    return "\n".join([*lines[:2], *sorted(lines[2:], key=lambda line: int(line.split("|")[1]))])


def mean_error(values: list[float]) -> str:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.1f} ± {error:.1f}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("sweep")
    commands.add_parser("reported")
    commands.add_parser("table").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "sweep":
        run(RESULTS / "digits_sweep.jsonl", cells(SWEEP, range(100, 103)))
    elif args.command == "reported":
        run(RESULTS / "digits.jsonl", cells(REPORTED, range(5)))
    else:
        print(table(args.file))


if __name__ == "__main__":
    main()
