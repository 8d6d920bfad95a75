"""Accuracy on the digits over a grid of settings and seeds, one JSON line a cell, resumable.

python -m benchmarks.digits run --grid '{"cfg_scale": [1.5, 3]}' --ipc 5 10 --seeds 100-104 --out F
python -m benchmarks.digits run --real ...      random real images instead of a distilled set
python -m benchmarks.digits table F             means and standard errors by setting
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
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import DistillConfig, resolve
from acs_fast.curriculum import distill
from acs_fast.data import DIGITS, ImageSet, load_images
from acs_fast.environment import describe
from acs_fast.evaluation import train_and_test


def evaluate_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Distil (or draw real images) and evaluate once, with one seed for both, on one thread."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    settings, seed, ipc = dict(cell["settings"]), cell["seed"], cell["ipc"]
    if cell["real"]:
        train = load_images(DIGITS, "train").random(ipc, seed)
    else:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            config = resolve(DistillConfig, {**settings, "ipc": ipc, "seed": seed, "out": f"{folder}/run"})
            out = distill(dataclasses.replace(config, out=f"{folder}/run"))
            train = dataclasses.replace(load_images(str(out / "images"), "train"), mirror=False)
    middle = time.perf_counter()
    accuracy = judge(train, cell["protocol"], cell["epochs"], seed)
    return {
        **cell, "best": accuracy[0], "last": accuracy[1], "seconds_distill": round(middle - started, 1),
        "seconds_evaluate": round(time.perf_counter() - middle, 1), **describe(torch.device("cpu")),
    }  # fmt: skip


def judge(train: ImageSet, protocol: str, epochs: int, seed: int) -> tuple[float, float]:
    """Best and last accuracy of one ConvNet-3."""
    test = load_images(DIGITS, "val")
    accuracy = train_and_test(train, test, "convnet-3", protocol, epochs, seed, torch.device("cpu"))
    return accuracy.best, accuracy.last


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of the grid, the seeds and the ipc values."""
    grid = {} if args.real else json.loads(args.grid)
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [
        {
            "settings": s,
            "real": args.real,
            "ipc": ipc,
            "seed": seed,
            "protocol": args.protocol,
            "epochs": args.epochs,
        }
        for ipc, s, seed in itertools.product(args.ipc, combinations, seeds)
    ]


def identity(row: dict[str, Any]) -> str:
    """What makes two rows the same cell."""
    return json.dumps(
        [row[k] for k in ("settings", "real", "ipc", "seed", "protocol", "epochs")], sort_keys=True
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate the cells that the output file lacks, on two single-threaded processes."""
    path = Path(args.out)
    known = (
        {identity(json.loads(line)) for line in path.read_text().splitlines()} if path.is_file() else set()
    )
    missing = [cell for cell in cells(args) if identity(cell) not in known]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, open(path, "a") as file:
        for row in pool.imap_unordered(evaluate_cell, missing):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row["settings"], row["ipc"], row["seed"], row["best"], row["last"], flush=True)


def table(args: argparse.Namespace) -> None:
    """Print mean and standard error of `best` and `last` for every setting and ipc."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in Path(args.file).read_text().splitlines():
        row = json.loads(line)
        name = "random real" if row["real"] else json.dumps(row["settings"])
        groups.setdefault(f"{row['ipc']:3d} {row['protocol']} {row['epochs']} {name}", []).append(row)
    for name in sorted(groups):
        rows = groups[name]
        text = ""
        for key in ("best", "last"):
            values = [row[key] for row in rows]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
            text += f"{key} {statistics.mean(values):5.2f} +- {error:4.2f}  "
        print(f"{text} n {len(rows)}  ipc {name}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--grid", default="{}")
    runner.add_argument("--real", action="store_true")
    runner.add_argument("--ipc", type=int, nargs="+", default=[5, 10])
    runner.add_argument("--seeds", default="100-104")
    runner.add_argument("--protocol", default="hard-adamw")
    runner.add_argument("--epochs", type=int, default=300)
    runner.add_argument("--processes", type=int, default=2)
    runner.add_argument("--out", required=True)
    runner.set_defaults(call=run)
    reader = commands.add_parser("table")
    reader.add_argument("file")
    reader.set_defaults(call=table)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
