"""What each objective teaches: accuracy on real test images, 3 seeds, a JSON line a cell, resumable.

python -m benchmarks.objectives digits                          the bundled digits and DiT
python -m benchmarks.objectives NAME --real FOLDER --model DIT  another set and a DiT of it
python -m benchmarks.objectives table FILE                      means over the seeds of a file's rows

The method of a cell is random real images, plain sampling or an objective, each with the preset's settings;
the same seed gives the same noise. One classifier a cell. For the digits the protocol
is theirs (hard-adamw, 400 epochs), for others hard-adamw with `--epochs`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import REAL_OBJECTIVES, DistillConfig, EvaluateConfig, resolve
from acs_fast.curriculum import distill
from acs_fast.data import DIGITS, load_images
from acs_fast.environment import describe
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.training import TestSet, train_and_test
from acs_fast.models.classifier import default_network
from benchmarks.digits import RANDOM, RESULTS, run, table

SEEDS = range(3)
METHODS: dict[str, dict[str, Any]] = {
    RANDOM: {},
    "plain": {"guidance_scale": 0.0, "num_curricula": 1},
    "adversarial": {"objective": "adversarial"},
    "nonsaturating": {"objective": "nonsaturating"},
    "learnability": {"objective": "learnability"},
    "density_ratio": {"objective": "density_ratio"},
    "density_ratio, a third of the scale": {"objective": "density_ratio", "guidance_scale": 0.05},
    "adversarial, repulsion": {"objective": "adversarial", "repulsion": 1.0},
}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Distil (or draw real images) and train one classifier, with one seed for both, on one thread."""
    torch.set_num_threads(1)
    started, seed, record = time.perf_counter(), cell["seed"], {}
    source = {"real": cell["real"], "model": cell["model"]}
    test = load_images(cell["real"], "val", None, cell["size"])
    test = test.first(cell["test"]) if cell["test"] else test
    if cell["method"] == RANDOM:
        train = load_images(cell["real"], "train", None, cell["size"]).random(cell["ipc"], seed)
    else:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            settings = {"ipc": cell["ipc"], "seed": seed, "device": "cpu", "out": f"{folder}/run"}
            given = {name: value for name, value in cell["settings"].items() if name != "method"}
            out = distill(resolve(DistillConfig, {**settings, **source, **cell["common"], **given}))
            record = json.loads((out / "config.json").read_text())
            train = load_images(str(out / "images"), None, test.classes)
    distilled = time.perf_counter()
    train = dataclasses.replace(train, mirror=test.mirror)
    digits = resolve(EvaluateConfig, {"preset": DIGITS})
    network, epochs = default_network(test.images.shape[-1]), cell["epochs"] or digits.epochs
    cpu = torch.device("cpu")
    recipe = make_recipe("hard-adamw", cell["ipc"], len(train.classes), epochs)
    accuracy = train_and_test(train, TestSet.of(test, cpu), network, recipe, seed, cpu)
    names = {name: Path(cell[name]).name for name in ("real", "model")}  # a path means nothing elsewhere
    return {
        **cell,
        **names,
        "model_sha256": record.get("model_sha256"),
        "network": network,
        "protocol": "hard-adamw",
        "epochs": epochs,
        "test_images": len(test),
        "best": accuracy.best,
        "last": accuracy.last,
        "seconds_distill": round(distilled - started, 1),
        "seconds_evaluate": round(time.perf_counter() - distilled, 1),
        **describe(torch.device("cpu")),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result file, or `table`")
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--real", default=DIGITS)
    parser.add_argument("--model", default=DIGITS)
    parser.add_argument("--size", type=int, help="edge of the images, where it is not the files' own")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--test", type=int, help="test on the first so many images of each class")
    parser.add_argument("--real-steps", type=int, help="of the objectives with real images")
    parser.add_argument("--sampling-steps", type=int)
    args = parser.parse_args()
    if args.name == "table":
        print(table(args.file))
        return
    given = {"real_steps": args.real_steps, "num_sampling_steps": args.sampling_steps}
    common = {name: value for name, value in given.items() if value}
    cells = [
        {
            "method": method,
            "settings": settings,
            "common": common,
            "ipc": args.ipc,
            "seed": seed,
            **{name: getattr(args, name) for name in ("real", "model", "size", "epochs", "test")},
        }
        for seed in SEEDS
        for method, settings in METHODS.items()
    ]
    assert set(REAL_OBJECTIVES) <= set(METHODS)
    run(RESULTS / f"objectives_{args.name}.jsonl", cells, measure)


if __name__ == "__main__":
    main()
