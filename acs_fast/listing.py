"""Lists of real image files: class folders or WebDataset shards, each file verified once, with its class."""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from acs_fast.config import InputError

MIN_SIDE = 2  # px: less shows nothing
NAMED = 5  # files named in a summary
ORIENTATION = 0x0112  # EXIF
KINDS = {"1": "grey", "L": "grey", "LA": "alpha", "RGBA": "alpha", "P": "palette", "PA": "palette"}
NO_RGB = {"LAB", "La", "RGBa"}  # modes that Pillow does not convert
SPLITS = ("train", "val")


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file, or a member of a tar shard, that can be decoded.

    width, height: px, after the EXIF orientation. plain: an 8-bit RGB or grey JPEG or PNG that lies upright,
    which every decoder reads alike; Pillow decodes the others for both loaders.
    """

    name: str  # path below the source, or `shard.tar/member`
    path: str  # the file to open
    label: int
    offset: int
    length: int
    width: int
    height: int
    plain: bool


@dataclass(frozen=True)
class Listing:
    """The images of a source in label order, sorted by name within a class, and what was left out."""

    source: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)
    converted: tuple[tuple[str, str], ...]  # (name, what it was): kept, as RGB

    @functools.cached_property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return torch.tensor([entry.label for entry in self.entries])

    def digests(self) -> list[str]:
        """For each class SHA-256 of the names and lengths of its files."""
        totals = [hashlib.sha256() for _ in self.classes]
        for e in self.entries:
            totals[e.label].update(f"{e.name}\0{e.length}\n".encode())
        return [total.hexdigest() for total in totals]

    def summary(self) -> str:
        """What was skipped and converted, by reason, with a few names each; empty if nothing was."""
        parts = []
        for verb, files in (("skipped", self.skipped), ("converted to RGB", self.converted)):
            for reason, count in Counter(reason for _, reason in files).items():
                names = [name for name, other in files if other == reason][:NAMED]
                more = ", ..." if count > NAMED else ""
                parts.append(f"{count} {verb} ({reason}: {', '.join(names)}{more})")
        return f"{self.source}: {len(self.entries)} images; {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    path: str
    label: int
    offset: int = 0
    length: int = -1  # the whole file


def list_images(source: str, split: str | None, classes: tuple[str, ...] | None = None) -> Listing:
    """The images of a folder `<split>/<class>/*` or `<class>/*`, or of WebDataset shards.

    source: a folder of class folders or of shards `*.tar`, a shard, or a pattern such as `shards/*.tar`.
    split: `train` or `val`: the folder of that name, or the shards whose names begin with it, where any
    shard's name begins with one. classes: label order; default the sorted class names. A shard's sample is an
    image and `<key>.cls` with its class: a name, or a number, of a line (from 0) of `classes.txt` beside the
    shards where that exists. Without `<key>.cls` the member's folder is the class.
    Every file is read and decoded once (JPEGs at an eighth of their size), in threads.

    Raises InputError for a missing folder, an unknown class, a class without a readable image, and a split
    that the shards lack. Files that are no image, damaged or smaller than 2 px are left out;
    `Listing.summary` names them.
    """
    root = Path(source)
    root = root / split if split and (root / split).is_dir() else root
    if shards := split_shards(source, split):
        root = shards[0].parent
        names, files, known = _shard_files(root, shards, classes)
    elif root.is_dir():
        names, files = _folder_files(root, classes)
        known = class_folders(root)
    else:
        raise InputError(f"there is no image folder {root}; give a folder of class folders")
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        found = list(pool.map(_inspect, files))
    entries = [entry for entry, _ in found if entry is not None]
    skipped = [(f.name, why) for f, (entry, why) in zip(files, found, strict=True) if entry is None]
    made_rgb = [(entry.name, kind) for entry, kind in found if entry is not None and kind]
    if all(kind == "grey" for _, kind in made_rgb) and len(made_rgb) == len(entries):
        made_rgb = []  # a grey set is no mixed one
    present = {entry.label for entry in entries}
    for label, name in enumerate(names):
        if label not in present:
            lost = [f"{n}: {why}" for f, (n, why) in _by_name(files, skipped) if f.label == label]
            reason = f" ({len(lost)} skipped, {lost[0]})" if lost else ""
            where = f"class {name} of the shards in {root}" if shards else f"class folder {root / name}"
            raise InputError(f"{where} is missing or holds no images{reason}; known: {_some(known)}")
    return Listing(source, names, tuple(entries), tuple(skipped), tuple(made_rgb))


def split_shards(source: str, split: str | None) -> list[Path]:
    """The shards of a split, sorted; all of them if none is named after a split, none if there are none.

    Raises InputError for shards of another split alone, which must not stand in for this one.
    """
    root = Path(source)
    if split and (root / split).is_dir():
        root = root / split
    found = root.glob("*.tar") if root.is_dir() else (Path(p) for p in glob.glob(source))
    shards = sorted(path for path in found if path.suffix == ".tar" and path.name[0] != ".")
    if split is None or not any(shard.name.startswith(SPLITS) for shard in shards):
        return shards
    own = [shard for shard in shards if shard.name.startswith(split)]
    if not own:
        raise InputError(f"{source} has no {split} shards, only {shards[0].name} ...; add {split}-*.tar")
    return own


def read_bytes(entry: Entry | _File) -> bytes:
    """The encoded image; InputError names a file that cannot be read (any more)."""
    try:
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.length)
    except OSError as error:
        raise InputError(f"image {entry.name} cannot be read ({error}); restore it or start anew") from error


def open_rgb(data: bytes, channels: int) -> Image.Image:
    """The decoded image upright as 8-bit RGB, or grey for one channel."""
    with Image.open(io.BytesIO(data)) as file:
        if channels == 1:
            file.draft("L", file.size)  # a JPEG's own luma, as DALI reads it
        image = ImageOps.exif_transpose(file)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB, Pillow warns
        return image.convert("L" if channels == 1 else "RGB")


def _inspect(file: _File) -> tuple[Entry | None, str]:
    """The entry and what it must be converted from, or None and the reason to leave the file out."""
    try:
        data = read_bytes(file)
        with Image.open(io.BytesIO(data)) as image:
            (width, height), mode, form = image.size, image.mode, image.format
            turned = image.getexif().get(ORIENTATION, 1)
            see_through = "transparency" in image.info
            if mode in NO_RGB:
                return None, f"{mode} cannot be made RGB"
            if mode[0] in "IF":
                return None, f"{mode} is not 8 bits a channel"
            if min(width, height) < MIN_SIDE:
                return None, f"{width}x{height} px"
            image.draft("RGB", (1, 1))  # a JPEG's whole stream is read, at an eighth of the size
            image.load()
    except InputError:
        return None, "cannot be opened"
    except UnidentifiedImageError:
        return None, "not an image"
    except Image.DecompressionBombError:
        return None, "too many pixels"
    except Exception as error:  # what a damaged file makes Pillow raise is not to be listed
        return None, "truncated" if "truncated" in str(error) else "damaged"
    if turned in (5, 6, 7, 8):
        width, height = height, width
    deep = form == "PNG" and data[24] == 16  # bits, which Pillow and DALI round differently
    kind = "alpha" if see_through else KINDS.get(mode, "" if mode == "RGB" else mode)
    kind = "16 bit" if deep and not kind else kind
    eight_bit = form == "JPEG" or (form == "PNG" and data[24] == 8)
    plain = eight_bit and mode in ("RGB", "L") and turned == 1 and not see_through
    return Entry(file.name, file.path, file.label, file.offset, len(data), width, height, plain), kind


def _folder_files(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[_File]]:
    names = classes or tuple(sorted(class_folders(root)))
    if not names:
        raise InputError(f"image folder {root} has no class folders; expected {root}/<class>/<image>")
    files = []
    for label, name in enumerate(names):
        with os.scandir(root / name) if (root / name).is_dir() else _Nothing() as folder:
            own = sorted(f.name for f in folder if not f.name.startswith(".") and f.is_file())
        files += [_File(f"{name}/{file}", str(root / name / file), label) for file in own]
    return names, files


def _shard_files(
    root: Path, shards: Sequence[Path], classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[_File], list[str]]:
    """The classes, their files and the names of all classes that the shards have."""
    listed = root / "classes.txt"
    lines = [line.strip() for line in listed.read_text().splitlines()] if listed.is_file() else []
    lines = [line for line in lines if line]
    samples: list[tuple[str, str, str, int, int]] = []  # class, name, path, offset, length
    for shard in shards:
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    key, _, suffix = os.path.basename(member.name).partition(".")
                    key = os.path.join(os.path.dirname(member.name), key)
                    if suffix == "cls":
                        labels[key] = tar.extractfile(member).read().decode().strip()  # type: ignore[union-attr]
                    elif member.isfile() and suffix.lower() in ("jpg", "jpeg", "png", "webp"):
                        images[key] = member.name, member.offset_data, member.size
        except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"shard {shard} cannot be read ({error}); copy it again") from error
        for key, (name, offset, length) in images.items():
            label = labels.get(key) or os.path.basename(os.path.dirname(name))
            if not label:
                raise InputError(f"shard {shard} has no class for {name}; add a member {key}.cls")
            if lines and label not in lines:
                if not (label.isdecimal() and int(label) < len(lines)):
                    raise InputError(f"shard {shard} has class {label} for {name}; add it to {listed}")
                label = lines[int(label)]
            samples.append((label, f"{shard.name}/{name}", str(shard), offset, length))
    known = sorted({label for label, *_ in samples})
    if all(name.isdecimal() for name in known):
        known.sort(key=int)
        if classes and not set(classes) & set(known):
            raise InputError(f"the shards in {root} number their classes; name them in {listed}, one a line")
    names = classes or tuple(lines) or tuple(known)
    position = {name: label for label, name in enumerate(names)}
    samples = sorted(s for s in samples if s[0] in position)
    samples.sort(key=lambda s: position[s[0]])
    return names, [_File(n, p, position[label], o, size) for label, n, p, o, size in samples], known


class _Nothing:
    """A folder that is not there, as an empty one."""

    def __enter__(self) -> tuple[os.DirEntry[str], ...]:
        return ()

    def __exit__(self, *_: object) -> None:
        return


def _by_name(files: list[_File], skipped: list[tuple[str, str]]) -> list[tuple[_File, tuple[str, str]]]:
    named = {file.name: file for file in files}
    return [(named[item[0]], item) for item in skipped]


def class_folders(root: Path) -> list[str]:
    """The sorted names of a folder's class folders."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def known_classes(root: Path) -> str:
    """Some of them, for an error."""
    return _some(class_folders(root))


def _some(names: Sequence[str]) -> str:
    return " ".join(names[:10]) + (" ..." if len(names) > 10 else "")
