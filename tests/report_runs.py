"""Run folders made by hand for the tests of the pages: nothing is sampled or trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from acs_fast.config import DistillConfig
from acs_fast.images import Images
from acs_fast.plan import curriculum_ranges
from acs_fast.report import contact_sheet
from tests.image_runs import picture

ODD = ('<b>&"', "a_name_that_is_long_and_has_no_place_where_it_could_be_broken_in_two")
SETS = ("distilled", "random real", "herding", "k-centre", "plain", "plain, repulsion")
ENVIRONMENT = {
    "device": "cpu (a processor)",
    "threads": 1,
    "commit": "0123456789ab",
    "versions": {"acs_fast": "0.1.0", "torch": "2.13.0", "triton": None},
}


def score(mean: float) -> dict[str, Any]:
    """Three repeats."""
    values = [mean - 1.0, mean, mean + 1.0]
    return {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "values": values}


def evaluation(**changes: Any) -> dict[str, Any]:
    """One entry of `evaluations`."""
    return {
        "protocol": "hard-adamw", "network": "convnet-3", "image_size": 8, "ipc": 4,
        "epochs": 400, "protocol_epochs": 2000,
        "deviations": ["400 of the protocol's 2000 epochs", "images of 8 px; the protocol resizes to 224"],
        "repeats": 3, "seed": 0, "mirror": False, "baselines": ["random", "plain"],
        "test_images": 500, "real": "digits", "seconds": 12.3,
        "sets": {name: {"best": score(90.0 + i), "last": score(80.0 + i)} for i, name in enumerate(SETS)},
        **ENVIRONMENT, **changes,
    }  # fmt: skip


def overlap(off: float, curricula: int) -> dict[str, Any]:
    """One set of `redundancy`."""
    matrix = [[100.0 if i == j else off - i + j for j in range(curricula)] for i in range(curricula)]
    steps = [
        {"curriculum": i, "ipc": 2 * i, "best": score(70.0 + i), "last": score(60.0 + i)} for i in (1, 2)
    ]
    cover = {"coverage": 0.8125, "density": 1.25, "precision": 0.5, "recall": 0.25, "images": 8}
    return {"cross_increment": {"matrix": matrix, **score(off)}, "incremental": steps, "coverage": cover}


def redundancy(**changes: Any) -> dict[str, Any]:
    """The entry `redundancy`."""
    return {
        "protocol": "hard-adamw", "network": "convnet-3", "image_size": 8, "ipc": 4, "repeats": 3, "seed": 0,
        "epochs": [400, 400], "deviations": ["400 of the protocol's 2000 epochs"],
        "features": "convnet-3 trained on 1297 real images", "k": 5, "real_images": 1297, "seconds": 20.0,
        "sets": {name: overlap(70.0 + 4 * i, 2) for i, name in enumerate(SETS)},
        **ENVIRONMENT, **changes,
    }  # fmt: skip


def write_run(
    out: Path, classes: tuple[str, ...] = ("ant", "bee"), results: Any = None, **settings: Any
) -> Path:
    """A finished run of two curricula, 4 images a class, and these results (None: not evaluated)."""
    config = dataclasses.replace(DistillConfig(), out=str(out), ipc=4, num_curricula=2, **settings)
    ranges = curriculum_ranges(config.ipc, config.num_curricula)
    record = {
        "config": dataclasses.asdict(config), "classes": list(classes),
        "class_labels": list(range(len(classes))), "model_sha256": "0" * 64, **ENVIRONMENT,
    }  # fmt: skip
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(record))
    images, rows = Images(out, config.format), []
    for position, name in enumerate(classes):
        for curriculum, indices in enumerate(ranges, start=1):
            for index in indices:
                data = images.encode(picture(10 * position + index, (8, 8, 1)))
                path = images.path((name, index))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                rows.append({
                    "class": name, "index": index, "curriculum": curriculum, "seed": 0,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "discriminator_correct": None if curriculum == 1 else index % 2 == 0,
                    "discriminator_loss": None if curriculum == 1 else 1.0 + 0.25 * index + 0.125 * position,
                })  # fmt: skip
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    knew = {part: {"images": 4, "accuracy": 75.0, "loss": 0.5} for part in ("sampled", "newest", "real")}
    (out / "curricula.json").write_text(json.dumps({"2": {**knew, "misclassified_real": {}}}))
    (out / "contact_sheet.png").write_bytes(contact_sheet(images, classes, ranges))
    write_log(out)
    if results is not None:
        (out / "results.json").write_text(json.dumps(results))
    return out


LOG = """\
2026-11-25T10:00:00Z rank 0 start num_ranks=1 missing=8 total=8 since=1.0
2026-11-25T10:00:01Z rank 0 plan images=8 sampling=8.0 discriminators=2.0 total=10.0 since=2.0
2026-11-25T10:00:05Z rank 0 batch curriculum=1 images=4 seconds=4.0 since=6.0
2026-11-25T10:00:05Z rank 0 curriculum number=1 images=4 seconds=4.5 since=6.5
2026-11-25T10:00:08Z rank 0 discriminator name="2" seconds=3.0 since=9.5
2026-11-25T10:00:12Z rank 0 batch curriculum=2 images=4 seconds=4.0 since=13.5
2026-11-25T10:00:12Z rank 0 curriculum number=2 images=4 seconds=4.5 since=14.0
2026-11-25T10:00:13Z rank 0 wait writer_seconds=0.0 real_seconds=0.0 since=15.0
2026-11-25T10:00:13Z rank 0 end images=8 seconds=13.0 since=15.0
"""


def write_log(out: Path, text: str = LOG) -> None:
    """The log of rank 0."""
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs" / "rank-0.log").write_text(text)
