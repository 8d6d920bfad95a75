"""Memory and speed of reading a latent cache, at 1x and 10x of a data set's size; appends a row each.

python -m benchmarks.cache_memory [--images 10000] [--folder /tmp]    rows in results/cache_memory.jsonl

Random latents of DiT-XL/2 at 256 px (16 KiB an image with its mirror image) in ten classes. A process of its
own per size reads every row once, shuffled, 64 at a time as training does, then one class. Growth is the
largest resident memory after any batch less that before the first: the maps count in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from acs_fast.environment import describe
from acs_fast.latents import LatentCache, cut
from acs_fast.writer import write_tensors

RESULTS = Path(__file__).parent / "results" / "cache_memory.jsonl"
CLASSES, SHAPE, BATCH = 10, (4, 32, 32), 64
NAMES = tuple(map(str, range(CLASSES)))
MIB = 1 << 20


def labels_of(images: int) -> torch.Tensor:
    """Ten classes of equal size."""
    return torch.arange(CLASSES).repeat_interleave(images // CLASSES)


def make(folder: Path, images: int) -> None:
    """The shards of a cache of random latents."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(512, 2, *SHAPE, generator=generator).half()
    for shard in cut(labels_of(images), NAMES):
        write_tensors(folder / f"{shard.name}.safetensors", {"latents": latents[: len(shard.rows)]})
        (folder / f"{shard.name}.jsonl").write_text("{}\n" * len(shard.rows))


def resident() -> float:
    """MiB of this process that lie in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def measure(folder: Path, images: int) -> dict[str, Any]:
    """Read everything once; the figures of a row."""
    torch.set_num_threads(1)
    cache = LatentCache(folder, labels_of(images), SHAPE, NAMES)
    cache.take(torch.zeros(BATCH, dtype=torch.long), torch.zeros(BATCH, dtype=torch.bool))
    start = most = resident()
    rows = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    seconds = 0.0
    for part in rows.split(BATCH):
        mirrored = part % 2 == 1
        began = time.perf_counter()
        cache.take(part, mirrored)
        seconds += time.perf_counter() - began
        most = max(most, resident())
    began = time.perf_counter()
    own = cache.rows_of(CLASSES // 2)
    for part in own.split(BATCH):
        cache.take(part, torch.zeros(len(part), dtype=torch.bool))
    return {
        "images": images,
        "cache_mib": round(sum(path.stat().st_size for path in folder.iterdir()) / MIB, 1),
        "resident_mib": round(start, 1),
        "growth_mib": round(most - start, 1),
        "rows_per_second": round(images / seconds),
        "class_rows_per_second": round(len(own) / (time.perf_counter() - began)),
        "threads": 1,
        **describe(torch.device("cpu")),
    }


def main() -> None:
    """Make and measure both sizes; the cache is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of the smaller set")
    parser.add_argument("--folder", default=None, help="where the caches are made; default: the system's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that the rows are appended to")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a folder: what the process of its own does
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure), args.images)))
        return
    for images in (args.images, 10 * args.images):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            make(Path(folder), images)
            command = [sys.executable, "-m", "benchmarks.cache_memory", "--images", str(images)]
            run = subprocess.run([*command, "--measure", folder], check=True, capture_output=True, text=True)
        with args.out.open("a") as file:
            file.write(run.stdout)
        print(run.stdout, end="")


if __name__ == "__main__":
    main()
