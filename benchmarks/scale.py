"""Is a run of 1,000 classes the same on one rank and on two, and do its time and memory stay flat?

python -m benchmarks.scale [--folder /tmp]    rows in results/scale.jsonl

A tiny DiT of random weights (grey, 8 px) samples 2 and then 20 images a class in two curricula, under
torchrun on one rank and on two, with --deterministic and without. Each run's images are compared with those
of the first one of its size. Startup is from the command to the first batch; memory is each rank's peak.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from acs_fast.environment import describe
from acs_fast.images import Images
from acs_fast.log import read_events
from acs_fast.manifest import read_rows
from acs_fast.models.checkpoint import save_checkpoint
from acs_fast.models.dit import DiT, DiTConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
CLASSES, SIZES = 1000, (2, 20)
SETTINGS = (
    "--num-curricula 2 --num-sampling-steps 5 --guidance-window 0 1 --discriminator convnet-1 "
    "--discriminator-steps 100 --discriminator-batch-size 256 --device cpu --log-json"
)
POLL = 0.02  # seconds


def make_model(path: Path) -> None:
    """Random weights whose classes look different, so that a discriminator has something to learn."""
    torch.manual_seed(0)
    shape = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 2}
    model = DiT(DiTConfig(**shape, num_heads=2, num_classes=CLASSES))
    model.initialize_weights()
    nn.init.normal_(model.y_embedder.embedding_table.weight)
    for layer in (*model.blocks, model.final_layer):
        nn.init.normal_(layer.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    save_checkpoint(model, path)


def distil(out: Path, model: Path, ipc: int, ranks: int, deterministic: bool) -> dict[str, Any]:
    """One run under torchrun: what it took."""
    flag = "--deterministic" if deterministic else "--no-deterministic"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = ["-m", "acs_fast", "distill", "--model", str(model), "--ipc", str(ipc), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began, startup = time.monotonic(), None
    peaks: dict[str, float] = {}
    with open(out.with_suffix(".txt"), "w") as output:
        command = [*launcher, *run, *SETTINGS.split(), flag]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peaks |= peak_memory(process.pid)
            if startup is None and any(event["event"] == "batch" for event in read_events(out)):
                startup = time.monotonic() - began
            time.sleep(POLL)
    seconds = time.monotonic() - began
    if process.returncode or startup is None:
        raise RuntimeError(out.with_suffix(".txt").read_text())
    return {
        "startup_seconds": round(startup, 2),
        "seconds": round(seconds, 1),
        "peak_mib": [round(peaks[rank]) for rank in sorted(peaks)],
        **times(out, CLASSES * ipc, ranks),
    }


def peak_memory(launcher: int) -> dict[str, float]:
    """MiB that each rank has had in memory at most, by its number; without one that has just ended."""
    found = {}
    try:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            status = Path(f"/proc/{child}/status").read_text()
            ranks = [entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")]
            peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            found |= {rank: int(peak) / 1024 for rank, peak in zip(ranks, peaks, strict=False)}
    except OSError:
        pass
    return found


def times(out: Path, images: int, ranks: int) -> dict[str, Any]:
    """What the log files say: each rank's images, and where the time went."""
    sampling: dict[int, float] = {}  # by curriculum, of the slowest rank
    ends: dict[int, dict[str, Any]] = {}
    training, waited = 0.0, 0.0
    for event in read_events(out):
        if event["event"] == "curriculum":
            sampling[event["number"]] = max(sampling.get(event["number"], 0.0), event["seconds"])
        elif event["event"] == "discriminator" and event["rank"] == 0:
            training += event["seconds"]
        elif event["event"] == "wait":
            waited += event["writer_seconds"] / ranks
        elif event["event"] == "end":
            ends[event["rank"]] = event
    whole = max(end["seconds"] for end in ends.values())
    return {
        "images_per_rank": [ends[rank]["images"] for rank in sorted(ends)],
        "sampling_ms_per_image": round(1e3 * sum(sampling.values()) / images, 3),
        "writer_wait_seconds": round(waited, 1),
        "discriminator_seconds": round(training, 1),
        "other_seconds": round(whole - training - sum(sampling.values()), 1),
    }


def compare(out: Path, first: Path) -> dict[str, int]:
    """How many images of two runs differ, and by how many grey levels at most."""
    rows, expected = read_rows(out), read_rows(first)
    assert rows.keys() == expected.keys()
    different = [key for key in rows if rows[key]["sha256"] != expected[key]["sha256"]]
    most = 0
    for key in different:
        one, two = (pixels(Images(folder).read(key)) for folder in (out, first))
        most = max(most, int(np.abs(one - two).max()))
    return {"different_images": len(different), "grey_levels": most}


def pixels(data: bytes | None) -> np.ndarray:
    """An image file as integers."""
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(int)


def measure(folder: Path, ipc: int, ranks: int, deterministic: bool) -> dict[str, Any]:
    """The row of a run, whose folder stays if it is the first of its size."""
    out, first = folder / f"{ipc}-{ranks}-{deterministic}", folder / f"{ipc}-1-True"
    taken = distil(out, folder / "model.safetensors", ipc, ranks, deterministic)
    judged = json.loads((out / "curricula.json").read_text())["2"]["sampled"]
    row = {
        "images": CLASSES * ipc,
        "classes": CLASSES,
        "ipc": ipc,
        "ranks": ranks,
        "deterministic": deterministic,
        **compare(out, first),
        **taken,
        "discriminator_accuracy": judged["accuracy"],
        "discriminator_loss": judged["loss"],
        "settings": SETTINGS,
        **describe(torch.device("cpu")),
    }
    if out != first:
        shutil.rmtree(out)
    return row


def main() -> None:
    """Measure all runs, smallest first; their folders are removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", default=None, help="where the runs lie; default: the system's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that the rows are appended to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_model(folder / "model.safetensors")
        for ipc, deterministic, ranks in itertools.product(SIZES, (True, False), (1, 2)):
            row = measure(folder, ipc, ranks, deterministic)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
