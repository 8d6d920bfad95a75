"""The latent cache: each real image and its mirror image through the VAE once, memory-mapped afterwards.

A folder with `index.json` (what the cache was made of) and, per shard of at most 512 images of one class,
`<class>-<part>.safetensors` (`latents` fp16 [n, 2, C, h, w]: the image, its mirror image) and
`<class>-<part>.jsonl` (class, file, SHA-256 and crop of each). A shard is written whole or not at all, the
tensors last, and is a function of its images alone: an interrupted encoding goes on and ends with the same
bytes. A cache serves every selection and order of its classes, and takes further ones in.

Reading maps a shard when a row of it is wanted and lets the maps go again and again, which gives their pages
back: the memory in use hangs on neither the size of the data set nor the number of shards.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from acs_fast.config import InputError
from acs_fast.listing import Entry, Listing, read_bytes
from acs_fast.loader import centre, ordered
from acs_fast.models.vae import VAE
from acs_fast.writer import read_json, write_atomic, write_json, write_tensors

INDEX = "index.json"
SHARD = 512  # images
MAPPED_BYTES = 1 << 26  # of shards mapped at once: a kernel may keep all of a map in memory for one row
LOCK = ".lock"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
MEANING = {
    "size": "image size",
    "dtype": "dtype of the VAE",
    "vae": "VAE",
    "shape": "shape",
    "shard": "shard size",
}
SHOWN = ("size", "dtype", "shape", "shard")  # those whose values say something


class Shard(NamedTuple):
    """Consecutive rows of the listing, of one class."""

    name: str
    rows: range


class LatentCache:
    """A cache, open for reading: nothing is read before it is asked for.

    labels: int64 [N] in the listing's order. shape: (C, h, w) of a latent.
    """

    def __init__(self, folder: Path, labels: Tensor, shape: tuple[int, ...], classes: tuple[str, ...]):
        self.folder, self.labels, self.shape, self.classes = folder, labels, shape, classes
        self.shards = cut(labels, classes)
        self._starts = torch.tensor([shard.rows.start for shard in self.shards])
        self._maps: dict[int, np.ndarray] = {}
        self._offsets: dict[int, int] = {}
        self._mapped = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, mirrored: Tensor) -> Tensor:
        """fp32 [n, C, h, w] of rows int64 [n]; of the mirror images where `mirrored`, bool [n], is set.

        Shards are read one after the other. Raises IndexError for a row that is none, InputError for a shard
        that is missing or damaged.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a cache of {len(self)}")
        found = np.empty((len(rows), *self.shape), np.float16)
        order = torch.argsort(rows)
        which = torch.searchsorted(self._starts, rows[order], right=True) - 1
        places = zip(
            order.tolist(), which.tolist(), rows[order].tolist(), mirrored[order].tolist(), strict=True
        )
        for place, shard, row, side in places:
            latents = self._latents(shard)
            found[place] = latents[row - self.shards[shard].rows.start, int(side)]
        return torch.from_numpy(found).float()

    def rows_of(self, label: int) -> Tensor:
        """The rows of a class, int64."""
        return torch.nonzero(self.labels == label)[:, 0]

    def _latents(self, number: int) -> np.ndarray:
        """A shard's latents, fp16 [n, 2, C, h, w], mapped until there is no room for another."""
        latents = self._maps.get(number)
        if latents is None:
            shard = self.shards[number]
            path, shape = self.folder / f"{shard.name}.safetensors", (len(shard.rows), 2, *self.shape)
            offset = self._offsets.get(number) or data_offset(path, shape)
            if offset is None:
                raise damaged(path)
            self._offsets[number], size = offset, offset // 2 + math.prod(shape)
            if self._mapped + 2 * size > MAPPED_BYTES:
                self._maps, self._mapped = {}, 0
            try:  # of PyTorch's maps none keeps its file open: there may be more shards than files
                flat = torch.from_file(str(path), shared=False, size=size, dtype=torch.float16)
            except RuntimeError as error:
                raise damaged(path) from error
            latents = self._maps[number] = flat[offset // 2 :].view(shape).numpy()
            self._mapped += 2 * size
        return latents


def damaged(path: Path) -> InputError:
    """What to do about a shard that cannot be used."""
    return InputError(
        f"{path} is missing or damaged; run acs-fast encode --out {path.parent} again, which makes it anew"
    )


def cut(labels: Tensor, classes: Sequence[str]) -> list[Shard]:
    """The shards of a listing's labels, which ascend."""
    shards, counts, start = [], torch.bincount(labels, minlength=len(classes)).tolist(), 0
    for name, count in zip(classes, counts, strict=True):
        for part in range(-(-count // SHARD)):
            rows = range(start + part * SHARD, start + min(count, (part + 1) * SHARD))
            shards.append(Shard(f"{name}-{part:04d}", rows))
        start += count
    return shards


def data_offset(path: Path, shape: tuple[int, ...]) -> int | None:
    """Where a shard's latents lie in its file; None if it is missing, cut short or has no table beside it."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))["latents"]
        begin, end = header["data_offsets"]
        whole = header["dtype"] == "F16" and tuple(header["shape"]) == shape
        whole = whole and end - begin == 2 * math.prod(shape) and path.stat().st_size == 8 + length + end
        whole = whole and length % 8 == begin == 0 and path.with_suffix(".jsonl").is_file()
        return 8 + length if whole else None
    except (OSError, ValueError, LookupError, TypeError, struct.error, MemoryError, OverflowError):
        return None


def identity(listing: Listing, vae: VAE, size: int) -> dict[str, Any]:
    """What a cache is made of: two caches with the same are the same but for rounding.

    size: edge of the images in px; InputError for one that the VAE cannot encode.
    """
    if size < 1 or size % vae.factor:
        raise InputError(f"--size is {size}, it must be a multiple of {vae.factor} for this VAE")
    edge = size // vae.factor
    return {
        "format": 2,
        "vae": vae.encoder_digest(),
        "dtype": str(vae.dtype).removeprefix("torch."),
        "size": size,
        "crop": "the central square, resized",
        "latents": "float16 [n, 2, C, h, w]: the image, its mirror image",
        "shape": [vae.latent_channels, edge, edge],
        "shard": SHARD,
        "classes": {
            name: {"images": count, "files": digest}
            for name, count, digest in zip(
                listing.classes, torch.bincount(listing.labels).tolist(), listing.digests(), strict=True
            )
        },
    }


def missing_shards(folder: Path, shards: list[Shard], shape: tuple[int, ...]) -> list[int]:
    """The numbers of the shards that the folder lacks, or holds damaged."""
    return [
        number
        for number, shard in enumerate(shards)
        if data_offset(folder / f"{shard.name}.safetensors", (len(shard.rows), 2, *shape)) is None
    ]


def write_cache(
    folder: Path,
    listing: Listing,
    vae: VAE,
    size: int,
    *,
    loader: str,
    batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> LatentCache | None:
    """Encode what the folder lacks, and open it; every `num_ranks`-th shard from the `rank`-th on.

    size: edge of the images in px. Returns None where shards of other ranks are still missing. Nothing is
    written or locked where none is. Raises InputError for a cache of something else, with the difference,
    while another process writes the same shards, and for latents that are not finite.
    """
    wanted, shards = identity(listing, vae, size), cut(listing.labels, listing.classes)
    shape = tuple(wanted["shape"])
    if check(folder, wanted):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, [0], wait=True):
            if check(folder, wanted):  # no other process has been faster
                stored = read_json(folder / INDEX) if (folder / INDEX).is_file() else {"classes": {}}
                classes = {**stored["classes"], **wanted["classes"]}
                write_json(folder / INDEX, {**wanted, "classes": dict(sorted(classes.items()))})
    own = range(rank, len(shards), num_ranks)
    if set(own) & set(missing_shards(folder, shards, shape)):
        with locked(folder, [place(shards[number]) for number in own]):
            left = [shards[n] for n in missing_shards(folder, shards, shape) if n in own]
            total = sum(len(shard.rows) for shard in left)
            started = time.perf_counter()
            with tqdm(total=total, desc="encode", unit="image", disable=None, bar_format=BAR) as bar:
                for shard in left:
                    _write_shard(folder, shard, listing, vae, size, loader, batch_size, bar)
            seconds = time.perf_counter() - started
            print(f"{folder}: {total} images encoded, {total / seconds:.3g} images/s", flush=True)
    if missing_shards(folder, shards, shape):
        return None
    return LatentCache(folder, listing.labels, shape, listing.classes)


def check(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """The classes that its index is without; InputError where the folder holds something else."""
    if not (folder / INDEX).is_file():
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give a folder for the latents")
        if folder.is_dir() and any(path.suffix == ".safetensors" for path in folder.iterdir()):
            raise InputError(f"{folder} holds files of something else; give another folder")
        return list(wanted["classes"])
    stored = read_json(folder / INDEX)
    classes = stored.get("classes") if isinstance(stored, dict) else None
    if (
        not isinstance(stored, dict)
        or stored.get("format") != wanted["format"]
        or not isinstance(classes, dict)
    ):
        raise InputError(f"{folder / INDEX} is no index of a latent cache; give another folder")
    for name, meaning in MEANING.items():
        if stored.get(name) != wanted[name]:
            detail = f" ({stored.get(name)} there, {wanted[name]} here)" if name in SHOWN else ""
            raise InputError(
                f"latent cache {folder} is of another {meaning}{detail}; give another folder, or remove this "
                "one to encode again"
            )
    for name, value in wanted["classes"].items():
        if classes.get(name, value) != value:
            raise InputError(
                f"latent cache {folder} is of another file list in class {name}; give another folder, or "
                "remove this one to encode again"
            )
    return [name for name in wanted["classes"] if name not in classes]


def _write_shard(
    folder: Path,
    shard: Shard,
    listing: Listing,
    vae: VAE,
    size: int,
    loader: str,
    batch_size: int,
    bar: tqdm[Any],
) -> None:
    latents = []
    for batch in ordered(
        listing, shard.rows, size=size, channels=3, batch_size=batch_size, loader=loader, device=vae.device
    ):
        pair = [vae.encode(images).half().cpu() for images in (batch.images, batch.images.flip(3))]
        latents.append(torch.stack(pair, dim=1))
        bar.update(len(batch.rows))
    values = torch.cat(latents)
    if not values.isfinite().all():
        bad = int((~values.isfinite().flatten(1).all(dim=1)).int().argmax())
        name = listing.entries[shard.rows[bad]].name
        raise InputError(f"the latent of {name} is not finite in half precision; check the VAE")
    entries = [listing.entries[row] for row in shard.rows]
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, entries))
    lines = [
        {"class": listing.classes[e.label], "file": e.name, "sha256": digest, "crop": list(centre(e)[:4])}
        for e, digest in zip(entries, digests, strict=True)
    ]
    table = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(folder / f"{shard.name}.jsonl", table.encode())
    write_tensors(folder / f"{shard.name}.safetensors", {"latents": values})


def place(shard: Shard) -> int:
    """A shard's byte in the lock file, the same for every selection of classes."""
    return 1 + int.from_bytes(hashlib.sha256(shard.name.encode()).digest()[:7], "big")


def _sha256(entry: Entry) -> str:
    return hashlib.sha256(read_bytes(entry)).hexdigest()


@contextlib.contextmanager
def locked(folder: Path, places: Sequence[int], wait: bool = False) -> Iterator[None]:
    """Hold bytes of the folder's lock file: 0 is the index; the kernel drops them in the end.

    So ranks do not write a shard together, however many each says there are.
    """
    with open(folder / LOCK, "a") as file:
        try:
            for place in places:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place, os.SEEK_SET)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"another process is encoding into {folder}; wait for it, or give another folder"
            ) from error
        yield
