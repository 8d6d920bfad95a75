"""Protocols x networks x {distilled, random, herding, plain}, and their redundancy, 5 seeds: a row a part.

python -m benchmarks.evaluation_table digits --work FOLDER
python -m benchmarks.evaluation_table cifar10 --real FOLDER --model DIT --work FOLDER
python -m benchmarks.evaluation_table table                    the rows' means and intervals as Markdown

A seed distils its set, and samples the plain one from the same noise, in FOLDER (kept: a stopped benchmark
goes on); then every part of PARTS is one call of `evaluate` with that seed and one repeat, on one thread.
Intervals are Student's, 95 %, over the seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import DistillConfig, EvaluateConfig, resolve
from acs_fast.curriculum import distill
from acs_fast.evaluation import evaluate

RESULTS = Path(__file__).parent / "results" / "evaluation.jsonl"
SEEDS = range(5)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at 97.5 %, by number of seeds
BASELINES = ("random", "herding", "plain")
HARD = ("hard-sgd", "hard-adamw")
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "hard": {"protocol": HARD, "network": ("convnet-3",), "epochs": 400},
        "redundancy": {
            "protocol": ("hard-adamw",),
            "network": ("convnet-3",),
            "epochs": 200,
            "redundancy": True,
        },
        "soft": {"protocol": ("soft",), "network": ("convnet-3", "resnet18"), "epochs": 40},
        "resnet": {"protocol": ("hard-adamw",), "network": ("resnet-18",), "epochs": 20, "image_size": 16},
    },
    "cifar10": {
        "hard": {"protocol": HARD, "network": ("convnet-3",), "epochs": 40},
        "redundancy": {
            "protocol": ("hard-adamw",),
            "network": ("convnet-3",),
            "epochs": 30,
            "redundancy": True,
            "baselines": ("random", "plain"),  # herding's curve would cost a quarter more
        },
    },
}


def make(cell: dict[str, Any]) -> str:
    """Distil a seed's set where it is not there yet."""
    torch.set_num_threads(1)
    source = {name: cell[name] for name in ("real", "model", "num_sampling_steps") if cell[name]}
    with contextlib.redirect_stdout(io.StringIO()):
        settings = {"ipc": 10, "seed": cell["seed"], "device": "cpu", "out": cell["run"], **source}
        distill(resolve(DistillConfig, settings))
    return f"{cell['run']} is there"


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """One part of one seed: what `evaluate` returns, but for its many settings that are no paths here."""
    torch.set_num_threads(1)
    settings = PARTS[cell["data"]][cell["part"]]
    with contextlib.redirect_stdout(io.StringIO()):
        config = EvaluateConfig(
            path=cell["run"], real=cell["real"], repeats=1, seed=cell["seed"], device="cpu",
            **{"baselines": BASELINES, **settings},
        )  # fmt: skip
        found = evaluate(config)
    for row in [*found["evaluations"], found.get("redundancy", {})]:
        row.pop("real", None)
    return {"data": cell["data"], "seed": cell["seed"], "part": cell["part"], **found}


def run(args: argparse.Namespace) -> None:
    """Measure what the file lacks, in two processes of one thread each."""
    known = {(row["data"], row["part"], row["seed"]) for row in read()}
    base = {
        "data": args.data, "real": args.real or "digits", "model": args.model,
        "num_sampling_steps": args.sampling_steps,
    }  # fmt: skip
    cells = [
        {**base, "part": part, "seed": seed, "run": str(args.work / f"{args.data}-{seed}")}
        for part in args.parts or PARTS[args.data]
        for seed in SEEDS
        if (args.data, part, seed) not in known
    ]
    sets = {cell["seed"]: cell for cell in cells}.values()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for text in pool.imap_unordered(make, sets):
            print(text, flush=True)
        # the first part samples the plain sets, so that two processes never sample one
        for part in dict.fromkeys(cell["part"] for cell in cells):
            with open(RESULTS, "a") as file:
                for row in pool.imap_unordered(measure, [cell for cell in cells if cell["part"] == part]):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(row["data"], row["part"], row["seed"], flush=True)
    print(table())


def read() -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def interval(values: Iterable[float]) -> str:
    """Mean and half the 95 % interval over the seeds."""
    found = list(values)
    if len(found) < 2:
        return f"{found[0]:.1f}" if found else ""
    half = T95[len(found)] * statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.fmean(found):.1f} ± {half:.1f}"


def table() -> str:
    """All rows: accuracies, last (best), then the redundancy."""
    lines = [
        "| data | protocol | network | px | epochs | set | last | best | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read():
        for found in row["evaluations"] if row["part"] != "redundancy" else ():
            key = (row["data"], found["protocol"], found["network"], found["image_size"], found["epochs"])
            groups.setdefault(key, []).append(found["sets"])
    for key, sets in groups.items():
        for name in sets[0]:
            last, best = (interval(s[name][kind]["mean"] for s in sets) for kind in ("last", "best"))
            lines.append(f"| {' | '.join(map(str, key))} | {name} | {last} | {best} | {len(sets)} |")
    return "\n".join([*lines, "", *redundancy_table()])


def redundancy_table() -> list[str]:
    """Cross-increment accuracy, its difference to plain sampling, cover, and the gain by curriculum."""
    lines = [
        "| data | set | cross-increment | less than plain | coverage | density | precision | recall | "
        "accuracy after curricula 1 .. N (ipc) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read():
        if row["part"] == "redundancy":
            rows.setdefault(row["data"], []).append(row["redundancy"]["sets"])
    for data, sets in rows.items():
        for name in sets[0]:
            cross = [s[name]["cross_increment"]["mean"] for s in sets]
            less = [s["plain"]["cross_increment"]["mean"] - own for s, own in zip(sets, cross, strict=True)]
            shares = [
                f"{statistics.fmean(s[name]['coverage'][key] for s in sets):.2f}"
                for key in ("coverage", "density", "precision", "recall")
            ]
            steps = zip(*(s[name]["incremental"] for s in sets), strict=True)
            gains = ", ".join(
                f"{statistics.fmean(r['last']['mean'] for r in step):.1f} ({step[0]['ipc']})"
                for step in steps
            )
            cells = [data, name, interval(cross), "" if name == "plain" else interval(less), *shares, gains]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=[*PARTS, "table"])
    parser.add_argument("--work", type=Path, help="folder of the runs")
    parser.add_argument("--real", help="real images; default: the digits")
    parser.add_argument("--model", default="digits", help="the DiT")
    parser.add_argument("--sampling-steps", type=int)
    parser.add_argument("--parts", nargs="*", help="those to measure; default: all")
    args = parser.parse_args()
    if args.data == "table":
        print(table())
    elif args.work is None:
        parser.error("--work FOLDER: where the runs are kept")
    else:
        run(args)


if __name__ == "__main__":
    main()
