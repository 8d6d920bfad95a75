"""The images of a run folder in every format: pixels, and what reads them."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acs_fast.config import InputError
from acs_fast.data import load_images
from acs_fast.images import Images
from acs_fast.report.sheet import MAX_CELLS, choose_cells, contact_sheet
from tests.image_runs import decoded, fill, keys_of, packed, picture

SIZES = [(8, 8, 1), (5, 7, 1), (1, 1, 3), (9, 4, 3), (16, 16, 3)]
FORMATS = ["png", "jpeg", "webp", "wds"]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_pixels_survive(tmp_path: Path, format: str, shape: tuple[int, ...]) -> None:
    images, pixels = Images(tmp_path, format), picture(0, shape)
    images.write(("a", 3), images.encode(pixels))
    got, expected = decoded(images.read(("a", 3))), pixels.numpy()
    if shape[2] == 1 and format != "webp":
        expected = expected[..., 0]  # grey stays grey; WebP has three equal channels
    if format == "jpeg":
        assert got.shape == expected.shape
    else:
        assert np.array_equal(got, np.broadcast_to(expected, got.shape))
    assert images.encode(pixels) == images.read(("a", 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_close_and_its_colours_are_not_halved(tmp_path: Path, channels: int) -> None:
    images = Images(tmp_path, "jpeg")
    y, x = np.mgrid[:31, :45]
    pixels = np.stack([4 * x + y, 255 - 5 * x, 128 + 4 * y], axis=2).astype(np.uint8)[..., :channels]
    data = images.encode(torch.from_numpy(pixels))
    with Image.open(io.BytesIO(data)) as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # sampling factors of each channel
        error = np.abs(np.asarray(image).reshape(pixels.shape).astype(int) - pixels)
    assert error.mean() < 2 and data == images.encode(torch.from_numpy(pixels))


def test_a_set_of_grey_webp_is_grey_and_one_with_a_colour_is_not(tmp_path: Path) -> None:
    images = Images(tmp_path, "webp")
    fill(images, keys_of(("a", "b"), range(2)), (6, 6, 1))
    grey = load_images(str(images.folder), None)
    assert grey.images.shape == (4, 1, 6, 6) and torch.equal(grey.images[0, 0], picture(0, (6, 6, 1))[..., 0])
    assert load_images(str(images.folder), None, channels=3).images.shape[1] == 3
    images.write(("b", 2), images.encode(picture(9)))
    assert load_images(str(images.folder), None).images.shape == (5, 3, 6, 6)


def test_images_of_a_class_are_read_in_the_lexicographic_order_of_the_field(tmp_path: Path) -> None:
    images = Images(tmp_path)
    for index in (10, 2, 1, 100, 0):
        images.write(("a", index), images.encode(torch.full((2, 2, 1), index, dtype=torch.uint8)))
    found = load_images(str(images.folder), None).images
    assert found[:, 0, 0, 0].tolist() == [0, 1, 10, 100, 2]


def test_a_distilled_set_in_shards_is_that_of_loose_files(tmp_path: Path) -> None:
    written = packed(tmp_path / "run", ("bee", "ant"), curricula=6)  # 12 images a class: 10 follows 9
    loose = Images(tmp_path / "loose")
    for key, data in written.items():
        loose.write(key, data)
    one = load_images(str(tmp_path / "run" / "images"), None, ("ant", "bee"))
    two = load_images(str(loose.folder), None)
    assert one.classes == two.classes and torch.equal(one.labels, two.labels)
    assert torch.equal(one.images, two.images)
    assert load_images(str(tmp_path / "run" / "images"), None).classes == ("bee", "ant")


def test_a_distilled_set_in_shards_is_whole_or_refused(tmp_path: Path) -> None:
    packed(tmp_path / "run", curricula=1)
    images = Images(tmp_path / "run", "wds")
    images.write(("bee", 5), b"")
    with pytest.raises(InputError, match="beside them, images of class bee"):
        load_images(str(images.folder), None)
    images.pack(1, 1, [("bee", 5)])
    images.sweep()
    with pytest.raises(InputError, match=r"image .*01-00001\.tar/bee_000005\.png cannot be read"):
        load_images(str(images.folder), None)


@pytest.mark.parametrize("format", FORMATS)
def test_the_contact_sheet_shows_every_format(tmp_path: Path, format: str) -> None:
    images = Images(tmp_path, format)
    keys = keys_of(("a", "b"), range(2))
    for number, key in enumerate(keys):
        images.write(key, images.encode(torch.full((32, 32, 1), 60 * number, dtype=torch.uint8)))
    if format == "wds":
        images.pack(1, 0, keys)
    sheet = decoded(contact_sheet(images, ("a", "b"), [range(1), range(1, 2)]))
    block = 32 + 2 + 12
    for number, (name, index) in enumerate(keys):
        row, column = 16 + 34 * "ab".index(name) + 16, sheet.shape[1] - 2 * block + 12 + block * index + 16
        assert sheet[row, column].tolist() == [60 * number] * 3
    (images.folder / ("01-00000.tar" if format == "wds" else f"b/1{images.suffix}")).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        contact_sheet(images, ("a", "b"), [range(1), range(1, 2)])


@pytest.mark.parametrize(
    ("classes", "ipc", "curricula", "shown", "note"),
    [
        (1000, 1300, 3, (50, 3, 16), "50 of 1000 classes, the first 16 indices of each curriculum"),
        (1000, 20, 2, (50, 2, 10), "50 of 1000 classes"),
        (10, 1300, 13, (10, 13, 19), "the first 19 indices of each curriculum"),
        (1000, 1300, 1300, (50, 50, 1), "50 of 1000 classes, 50 of 1300 curricula"),
        (100, 25, 5, (100, 5, 5), ""),
    ],
)
def test_the_sheet_of_a_huge_run_is_bounded(classes, ipc, curricula, shown, note) -> None:
    names, size = tuple(map(str, range(classes))), ipc // curricula
    ranges = [range(start, start + size) for start in range(0, size * curricula, size)]
    chosen, blocks, text = choose_cells(names, ranges)
    assert (len(chosen), len(blocks), max(len(block) for _, block in blocks)) == shown
    assert text == (note and f"shown: {note}") and sum(len(b) for _, b in blocks) * len(chosen) <= MAX_CELLS
    steps = {int(b) - int(a) for a, b in itertools.pairwise(chosen)}
    assert steps == {classes // len(chosen)} and chosen[0] == "0"
    assert all(block == ranges[number - 1][: len(block)] for number, block in blocks)


def test_a_sheet_in_part_says_so_and_reads_no_more(tmp_path: Path, monkeypatch) -> None:
    images = Images(tmp_path)
    data, read = images.encode(picture(0, (8, 8, 1))), []
    monkeypatch.setattr(images, "read", lambda key: (read.append(key), data)[1])
    names = tuple(f"n{number:03d}" for number in range(60))
    sheets = {}
    for cells in (60 * 4, 60 * 4 - 1):
        monkeypatch.setattr("acs_fast.report.sheet.MAX_CELLS", cells)
        read.clear()
        sheets[cells] = decoded(contact_sheet(images, names, [range(2), range(2, 4)])), set(read)
    (whole, all_keys), (part, some) = sheets.values()
    assert len(all_keys) == 240 and len(some) == 50 * 4 and whole.shape[0] - part.shape[0] == 10 * 34 - 16
    assert (part[-16:] < 128).any() and (part[-16:] == 255).any()  # a line of text
