"""Real and distilled images as tensors: the bundled digits, image folders and class lists."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.listing import (
    SPLITS,
    Entry,
    Listing,
    class_folders,
    known_classes,
    list_images,
    read_bytes,
    split_shards,
)
from acs_fast.loader import ordered, resolve_loader

ASSETS = Path(__file__).parent / "assets"
DIGITS = "digits"  # the name of the bundled data set
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Located = tuple[str, int, Path | Entry]  # name, label, where the image lies


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size: uint8 [N, C, H, W], labels int64 [N], class folder names in label order.

    `mirror`: a mirrored image still shows its class, so training may flip it (true of objects, not digits).
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mirror: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, ipc: int) -> ImageSet:
        """The first `ipc` images of every class."""
        return self.take(
            torch.cat([torch.nonzero(self.labels == y)[:ipc, 0] for y in range(len(self.classes))])
        )

    def random(self, ipc: int, seed: int) -> ImageSet:
        """`ipc` random images of every class."""
        return self.take(random_rows(self.labels, len(self.classes), ipc, seed))

    def take(self, rows: Tensor) -> ImageSet:
        """The images of the given row numbers."""
        return ImageSet(self.images[rows], self.labels[rows], self.classes, self.mirror)


def random_rows(labels: Tensor, num_classes: int, ipc: int, seed: int) -> Tensor:
    """The rows of `ipc` random images of every class, or of all where it has fewer; class by class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for y in range(num_classes):
        members = torch.nonzero(labels == y)[:, 0]
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    return torch.cat(chosen)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [..] to fp32 in [-1, 1]: v / 127.5 - 1."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8, clamped and rounded to the nearest level: inverse of `to_model_range`."""
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def read_class_list(path: Path) -> tuple[str, ...]:
    """The class folder names of a text file, one a line, in label order."""
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"class list {path} cannot be read ({error}); give a text file, one class a line"
        ) from error
    if not names:
        raise InputError(f"class list {path} is empty; give a text file, one class a line")
    return check_classes(names)


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1K in label order (sorted): what its class folders are called."""
    return tuple((ASSETS / "imagenet_classes.txt").read_text().split())


def parse_classes(text: str) -> tuple[str, ...]:
    """The names that `--classes` gives: comma-separated ones, those of a text file, or of a built-in list.

    A text file has one a line; the lists are `imagewoof`, `imagenette`, `imagenet100` and `imagenet1k`.

    Raises InputError for a file that cannot be read, no name at all, or one that is no plain folder name.
    """
    if text in LISTS:
        return tuple(LISTS[text].split())
    if text == "imagenet1k":
        return imagenet_classes()
    if text == "imagenet100":  # not sorted: the label order of the field
        return tuple((ASSETS / "imagenet100_classes.txt").read_text().split())
    if os.path.isfile(text) or ("," not in text and ("/" in text or text.endswith(".txt"))):
        return read_class_list(Path(text))
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"--classes is {text!r}, it must name classes or a text file, one class a line")
    return check_classes(names)


def class_labels(names: tuple[str, ...], known: tuple[str, ...]) -> list[int]:
    """A model's label of each name: a class of `known`, else, in digits, a label; InputError for neither."""
    labels = []
    for name in names:
        if name in known:
            labels.append(known.index(name))
        elif name.isascii() and name.isdigit() and int(name) < len(known):
            labels.append(int(name))
        else:
            listed = " ".join(known[:10]) + (" ..." if len(known) > 10 else "")
            raise InputError(
                f"the model has no class {name!r}; known: {listed}, or by label 0 to {len(known) - 1}"
            )
    return labels


def select_classes(known: tuple[str, ...], text: str | None) -> tuple[tuple[str, ...], list[int]]:
    """The run's class folders and the model's label of each, from `--classes`; all of `known` without it.

    known: the model's class names in label order. A class that is given as its label gets its name, so that
    the folders are the same however it was named. Raises InputError for an unknown or repeated class.
    """
    if text is None:
        return check_classes(known), list(range(len(known)))
    labels = class_labels(parse_classes(text), known)
    return check_classes(tuple(known[label] for label in labels)), labels


def check_classes(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names unchanged, or InputError for one that is not a plain, unique folder name."""
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"class name {name!r} is not text; write it in quotes")
        if name in ("", ".", "..") or any(c in name for c in "/\\\0") or not name.isprintable():
            raise InputError(f"class name {name!r} is not a plain folder name; rename the class")
    if len(set(names)) != len(names):
        raise InputError(
            f"class {next(n for n in names if names.count(n) > 1)!r} is listed twice; list it once"
        )
    return names


# label order = list order; ImageWoof's is the field's, which is not sorted (PROTOCOLS.md section 4)
LISTS = {
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 "
    "n02105641",
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
    "n03888257",
}


def has_splits(source: str) -> bool:
    """Whether a source keeps its training images apart from its test images."""
    if source == DIGITS or all((Path(source) / split).is_dir() for split in SPLITS):
        return True
    try:
        return bool(split_shards(source, "train")) and split_shards(source, "train") != split_shards(
            source, "val"
        )
    except InputError:  # of one split alone
        return False


def load_images(
    source: str,
    split: str | None,
    classes: tuple[str, ...] | None = None,
    size: int | None = None,
    channels: int | None = None,
    loader: str = "auto",
) -> ImageSet:
    """All images of a source: `digits`, a folder `<split>/<class>/*` (or `<class>/*`), WebDataset shards.

    split: `train` or `val`; None reads a distilled set, which is a folder `<class>/*` whatever its names are,
    or a folder of shards; within a class in the field's lexicographic order (0, 1, 10, 2). WebP knows no
    grey: a set of it that shows none but grey is one. classes: label order, default the sorted folder names,
    or what the shards say.
    size: shorter side resized to it and the centre cropped; default: as they are, of one size. channels:
    1 or 3, default those of the first image. loader: `auto`, `dali` or `pil`; a distilled set is always read
    by Pillow, as it lies.

    Unusable files of real images are left out, and named on stderr. Raises InputError naming a missing
    folder, an empty class or, in a distilled set, an unreadable image.
    """
    if source == DIGITS and split is not None:
        if size not in (None, 8) or channels not in (None, 1):
            raise InputError(
                "the digits are grey and 8x8, which does not fit here; name other images: --real FOLDER"
            )
        return _load_digits(split, classes)
    if split is not None:
        return _load_listed(source, split, classes and check_classes(classes), size, channels, loader)
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"there is no image folder {root}; give a folder of class folders")
    find = _packed if split_shards(source, None) else _loose
    names, files = find(root, classes and check_classes(classes))
    webp = channels is None and all(name.lower().endswith(".webp") for name, _, _ in files)
    images = []
    for name, _, file in files:
        where = io.BytesIO(read_bytes(file)) if isinstance(file, Entry) else file
        images.append(_pixels(where, name, size, channels))
        channels = channels or images[0].shape[0]
        if size is None and images[-1].shape != images[0].shape:
            raise InputError(
                f"image {name} is {images[-1].shape[-1]} px and the first one {images[0].shape[-1]}; resize "
                "them alike, for an evaluation by --image-size"
            )
    if webp and all(torch.equal(pixels, pixels[:1].expand_as(pixels)) for pixels in images):
        images = [pixels[:1] for pixels in images]
    return ImageSet(torch.stack(images), torch.tensor([label for _, label, _ in files]), names)


def _loose(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[Located]]:
    """The classes of a folder of class folders, and its images."""
    names = classes or check_classes(tuple(class_folders(root)))
    if not names:
        raise InputError(f"image folder {root} has no class folders; expected {root}/<class>/<image>")
    found: list[Located] = []
    for label, name in enumerate(names):
        folder = root / name
        files = sorted(image_files(folder))
        if not files:
            raise InputError(
                f"class folder {folder} is missing or holds no images; known: {known_classes(root)}"
            )
        found += [(str(path), label, path) for path in files]
    return names, found


def _packed(root: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[Located]]:
    """The classes of a folder of shards, and its images."""
    for name in class_folders(root):
        if image_files(root / name):
            raise InputError(
                f"{root} holds shards and, beside them, images of class {name}; run distill again"
            )
    listing = list_images(str(root), None, classes)
    for name, why in listing.skipped:
        raise InputError(f"image {root / name} cannot be read ({why}); remove or replace it")
    entries = sorted(listing.entries, key=lambda entry: (entry.label, loose_name(entry.name)))
    return listing.classes, [(str(root / entry.name), entry.label, entry) for entry in entries]


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, by their suffixes, in no order."""
    return [path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES]


def loose_name(member: str) -> str:
    """A shard's member as a file of its own would be called, so that both are in the same order."""
    return re.sub(r"_0*([0-9]+\.)", r"_\1", member.rpartition("/")[2])


def read_image(path: Path, size: int | None = None, channels: int | None = None) -> Tensor:
    """One image as uint8 [C, H, W], square when `size` is given; InputError names an unreadable file."""
    return _pixels(path, str(path), size, channels)


def _pixels(source: Path | io.BytesIO, name: str, size: int | None, channels: int | None) -> Tensor:
    try:
        with Image.open(source) as file:
            if file.mode[0] in "IF":
                raise ValueError(f"its mode is {file.mode}, not 8 bits a channel")
            grey = channels == 1 or (channels is None and file.mode in ("1", "L"))
            image = ImageOps.exif_transpose(file).convert("L" if grey else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name} cannot be read ({error}); remove or replace it") from error
    size = size or min(image.size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return torch.from_numpy(pixels.copy()).reshape(size, size, -1).permute(2, 0, 1).contiguous()


def _load_listed(
    source: str,
    split: str,
    classes: tuple[str, ...] | None,
    size: int | None,
    channels: int | None,
    loader: str,
) -> ImageSet:
    """Real images, by the loader."""
    listing = list_images(source, split, classes)
    if text := listing.summary():
        print(text, file=sys.stderr)
    first = listing.entries[0]
    size = size or min(first.width, first.height)
    rows = torch.arange(len(listing.entries))
    return read_listed(listing, rows, size, channels or channels_of(first), loader)


def channels_of(entry: Entry) -> int:
    """1 for a grey image, 3 for any other."""
    with Image.open(io.BytesIO(read_bytes(entry))) as image:
        return 1 if image.mode in ("1", "L") else 3


def read_listed(listing: Listing, rows: Tensor, size: int, channels: int, loader: str = "auto") -> ImageSet:
    """The images of these rows of a list, in their order: shorter side resized to `size`, centre cropped."""
    images = torch.empty(len(rows), channels, size, size, dtype=torch.uint8)
    batches = ordered(
        listing, rows.tolist(), size=size, channels=channels, batch_size=64,
        loader=resolve_loader(loader), device=torch.device("cpu"),
    )  # fmt: skip
    start = 0
    for batch in batches:
        images[start : start + len(batch.rows)] = to_uint8(batch.images)
        start += len(batch.rows)
    return ImageSet(images, listing.labels[rows], listing.classes)


def _load_digits(split: str, classes: tuple[str, ...] | None) -> ImageSet:
    tensors = load_file(ASSETS / "digits.safetensors")
    names = tuple(str(digit) for digit in range(10))
    images, labels = tensors["images"], tensors["labels"].long()
    rows = tensors["test"].bool() if split == "val" else ~tensors["test"].bool()
    chosen = ImageSet(images[rows], labels[rows], names, mirror=False)
    if classes is None or classes == names:
        return chosen
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise InputError(f"the digits have no class {unknown[0]!r}; known: {' '.join(names)}")
    kept = [chosen.take(torch.nonzero(chosen.labels == names.index(name))[:, 0]) for name in classes]
    new_labels = torch.cat([torch.full((len(part),), y) for y, part in enumerate(kept)])
    return ImageSet(torch.cat([part.images for part in kept]), new_labels, classes, mirror=False)
