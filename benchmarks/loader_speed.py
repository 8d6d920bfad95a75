"""How fast real JPEGs are decoded: DALI, our Pillow loader, and the DataLoader that users write.

python -m benchmarks.loader_speed --real FOLDER    FOLDER/train/<class>/*; a row into results/loader.jsonl
python -m benchmarks.loader_speed --real FOLDER --resave    copies of 500x375 px, quality 90, instead

Every loader reads the same files, in the same order, its central square to `--size` px and [-1, 1]. All are
timed in the same rounds, after their first batch; DALI has 2 threads, the DataLoader 2 workers. Before that
the pixels of both of ours are compared, of central squares and of training crops with flips. Ratios are
medians over the rounds; `host_reader_to_dali_reader` is what reading on the host and resizing by PyTorch
costs (below 1) or gains. 500x375 px is the commonest size of ImageNet's files, and so of ImageWoof's: the
copies stand in for those where smaller ones are at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from acs_fast.environment import describe, version
from acs_fast.listing import Listing, list_images
from acs_fast.loader import ordered, stream

RESULTS = Path(__file__).parent / "results" / "loader.jsonl"
CPU = torch.device("cpu")


class Folder(Dataset[Tensor]):
    """What torchvision's ImageFolder with Resize, CenterCrop, ToTensor and Normalize does, without it."""

    def __init__(self, listing: Listing, size: int):
        self.files, self.size = [entry.path for entry in listing.entries], size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.files[row]) as file:
            image = file.convert("RGB")
        scale = self.size / min(image.size)
        width, height = (max(self.size, round(edge * scale)) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float().div(127.5).sub(1.0)


def resave(source: Path, folder: Path) -> None:
    """Copies of the training images, 200 of each class, in the size of ImageNet's files."""
    for path in [file for kind in sorted(source.glob("train/*")) for file in sorted(kind.iterdir())[:200]]:
        target = folder / path.relative_to(source).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            larger = image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        larger.save(target, quality=90)


def ours(listing: Listing, size: int, batch_size: int, loader: str) -> Callable[[], Iterator[int]]:
    """The sizes of a pass's batches."""

    def batches() -> Iterator[int]:
        rows = range(len(listing.entries))
        settings = {"size": size, "channels": 3, "batch_size": batch_size, "device": CPU}
        for batch in ordered(listing, rows, loader=loader, **settings):  # type: ignore[arg-type]
            yield len(batch.images)

    return batches


def theirs(listing: Listing, size: int, batch_size: int) -> Callable[[], Iterator[int]]:
    """The same by a DataLoader."""

    def batches() -> Iterator[int]:
        for images in DataLoader(Folder(listing, size), batch_size, num_workers=2):
            yield len(images)

    return batches


def readers(listing: Listing, size: int, batch_size: int, resize: bool = True) -> Callable[[], Iterator[int]]:
    """The same by DALI's own file reader and resize; or its decode alone: the rest is the resize."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None)
    def pipeline() -> Any:
        data, _ = fn.readers.file(files=[entry.path for entry in listing.entries], name="files")
        images = fn.decoders.image(data, output_type=types.RGB, jpeg_fancy_upsampling=True)
        if not resize:
            return images
        images = fn.resize(
            images, size=(size, size), mode="not_smaller", interp_type=types.INTERP_TRIANGULAR, antialias=True
        )
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            crop=(size, size),
            mean=[127.5] * 3,
            std=[127.5] * 3,
        )

    def batches() -> Iterator[int]:
        pipe = pipeline()
        pipe.build()
        for _ in range(len(listing.entries) // batch_size):
            (images,) = pipe.run()
            yield len(torch.utils.dlpack.from_dlpack(images.as_tensor()).clone()) if resize else batch_size

    return batches


def rate(batches: Callable[[], Iterator[int]]) -> float:
    """Images a second of a pass, without its first batch."""
    found, started = 0, 0.0
    for number, count in enumerate(batches()):
        if number == 0:
            started = time.perf_counter()
        else:
            found += count
    return found / (time.perf_counter() - started)


def largest_difference(listing: Listing, size: int, batch_size: int) -> float:
    """Between DALI's and Pillow's pixels in grey levels: every tenth central square, five batches."""
    rows = range(0, len(listing.entries), 10)
    found = []
    for name in ("dali", "pil"):
        settings: dict[str, Any] = {"size": size, "channels": 3, "batch_size": batch_size, "device": CPU}
        settings["loader"] = name
        batches = list(ordered(listing, rows, **settings))
        batches += itertools.islice(stream(listing, seed=0, mirror=True, **settings), 5)
        found.append(torch.cat([batch.images for batch in batches]))
    return ((found[0] - found[1]).abs().max() * 127.5).item()


def ratio(values: list[float], base: list[float]) -> float:
    """The median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(values, base, strict=True)), 2)


def main() -> None:
    """Compare, time, print and append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", required=True)
    parser.add_argument("--resave", action="store_true", help="measure larger copies")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.resave:
            resave(Path(args.real), Path(folder))
        row = compare(args, list_images(folder if args.resave else args.real, "train"))
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def compare(args: argparse.Namespace, listing: Listing) -> dict[str, Any]:
    """The row of one set of files."""
    level = largest_difference(listing, args.size, args.batch_size)
    assert level < 1.01, f"the loaders differ by {level:.1f} grey levels"
    methods = {
        "dali": ours(listing, args.size, args.batch_size, "dali"),
        "pil": ours(listing, args.size, args.batch_size, "pil"),
        "DataLoader with PIL, 2 workers": theirs(listing, args.size, args.batch_size),
        "DALI's own reader": readers(listing, args.size, args.batch_size),
        "DALI's decode alone": readers(listing, args.size, args.batch_size, resize=False),
    }
    load = os.getloadavg()[0]  # what else the machine does
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.repeats):
        for name, batches in methods.items():
            rates[name].append(rate(batches))
    base = rates["DataLoader with PIL, 2 workers"]
    return {
        "images": len(listing.entries),
        "files": Path(args.real).name + (", resaved at 500x375" if args.resave else ""),
        "mean_bytes": round(statistics.fmean(entry.length for entry in listing.entries)),
        "size": args.size,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "largest_difference_levels": round(level, 3),
        "images_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "ratio_to_dataloader": {name: ratio(values, base) for name, values in rates.items()},
        "host_reader_to_dali_reader": ratio(rates["dali"], rates["DALI's own reader"]),
        "load_before": round(load, 2),
        "dali": version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120"),
        **describe(CPU),
    }


if __name__ == "__main__":
    main()
