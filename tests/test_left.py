"""What a run folder lacks: images, samples and why they are needed, and how ranks share them equally."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acs_fast.config import InputError
from acs_fast.distributed import Ranks
from acs_fast.images import Images
from acs_fast.manifest import Manifest, Rows
from acs_fast.plan import Item, Layout, curriculum_ranges, cut
from acs_fast.resume import add_samples, find_missing, own_batches
from acs_fast.samples import KEPT, Samples
from acs_fast.writer import write_tensors
from tests.image_runs import picture

CLASSES = ("3", "8")
LAYOUT = Layout(2, (range(0, 2), range(2, 3), range(3, 5)))  # curricula of 4, 2 and 4 images


def order(name: str, index: int) -> int | None:
    known = name in CLASSES and 0 <= index < 5
    return LAYOUT.number(Item(CLASSES.index(name), index)) if known else None


def filled(out: Path, curricula: range) -> Images:
    """The images of these curricula, a rank's rows for each class."""
    images = Images(out)
    for rank, name in enumerate(CLASSES):
        rows = [
            {"class": name, "index": index, "curriculum": number, "seed": 0}
            for number in curricula
            for index in LAYOUT.ranges[number - 1]
        ]
        encoded = [images.encode(picture(row["index"])) for row in rows]
        Manifest(out, images, rank).append(encoded, rows)
    return images


def missing_of(out: Path, images: Images) -> tuple[dict[int, list[int]], int]:
    """The numbers of what is missing, and how many rows are left."""
    rows = Rows(out, order, LAYOUT.total)
    found = find_missing(rows, images, LAYOUT)
    return {number: values.tolist() for number, values in found.items()}, int((rows.places[:, 0] >= 0).sum())


def test_images_without_a_row_or_with_other_bytes_are_missing(tmp_path: Path) -> None:
    images = filled(tmp_path, range(1, 3))
    assert missing_of(tmp_path, images) == ({1: [], 2: [], 3: [0, 1, 2, 3]}, 6)
    images.path(("8", 1)).write_bytes(images.path(("8", 0)).read_bytes())
    images.path(("3", 2)).unlink()
    assert missing_of(tmp_path, images) == ({1: [3], 2: [0], 3: [0, 1, 2, 3]}, 4)
    assert missing_of(tmp_path / "none", Images(tmp_path / "none"))[1] == 0


def test_the_last_row_of_an_image_counts_and_strange_ones_do_not(tmp_path: Path) -> None:
    images = filled(tmp_path, range(1, 4))
    row = {"class": "3", "index": 0, "curriculum": 1, "seed": 0}
    Manifest(tmp_path, images, 1).append([images.encode(picture(9))], [dict(row)])
    Manifest(tmp_path, images, 2).append(
        [images.encode(picture(9))] * 2, [row | {"class": "x"}, row | {"index": 7}]
    )
    assert missing_of(tmp_path, images) == ({1: [], 2: [], 3: []}, 10)


def needed(
    tmp_path: Path, missing: dict[int, list[int]], held: dict[int, range], **settings: Any
) -> tuple[dict[int, bool], dict[int, list[int]]]:
    """What `add_samples` makes of it; ready: the curricula whose discriminator is trained and judged."""
    ready = settings.pop("ready", (2, 3))
    samples, numbers = (
        Samples(tmp_path, LAYOUT, (1, 1, 1)),
        {i: np.array(missing.get(i, []), int) for i in (1, 2, 3)},
    )
    samples.files = {number: [part] for number, part in held.items()}
    defaults = {"guided": True, "keep": False, "repulsion": False}
    found = add_samples(numbers, samples, is_ready=ready.__contains__, **{**defaults, **settings})
    return found, {number: values.tolist() for number, values in numbers.items()}


NONE = {1: False, 2: False, 3: False}
ALL = {1: [0, 1, 2, 3], 2: [0, 1], 3: [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("case", "wanted", "left"),
    [
        ({"missing": {}, "ready": ()}, NONE, {1: [], 2: [], 3: []}),  # no discriminator is needed
        ({"missing": {3: [1]}}, NONE, {1: [], 2: [], 3: [1]}),
        ({"missing": {1: [1]}, "repulsion": True}, NONE, {1: [1], 2: [], 3: []}),  # nothing repels the first
        ({"missing": {3: [1]}, "ready": (2,)}, NONE | {1: True, 2: True}, ALL | {3: [1]}),
        ({"missing": {3: [1]}, "ready": (2,), "held": {1: range(4), 2: range(1, 2)}},
         NONE | {1: True, 2: True}, {1: [], 2: [0], 3: [1]}),
        ({"missing": {2: [1]}, "ready": (3,), "held": {1: range(4)}}, NONE | {1: True},
         {1: [], 2: [1], 3: []}),
        ({"missing": {3: [1]}, "repulsion": True, "held": {1: range(4), 2: range(2)}},
         NONE | {1: True, 2: True}, {1: [], 2: [], 3: [1]}),
        ({"missing": {3: [1]}, "ready": (), "guided": False}, NONE, {1: [], 2: [], 3: [1]}),
        ({"missing": {}, "keep": True, "guided": False, "held": {2: range(2), 3: range(4)}},
         {1: True, 2: True, 3: True}, {1: [0, 1, 2, 3], 2: [], 3: []}),
        # the second is sampled again for the third's discriminator, and needs its own for that
        ({"missing": {3: [0]}, "ready": (), "held": {1: range(4)}}, NONE | {1: True, 2: True},
         {1: [], 2: [0, 1], 3: [0]}),
    ],
    ids=["nothing", "trained", "first", "to-train", "some-held", "second", "repelled", "unguided", "kept",
         "chain"],
)  # fmt: skip
def test_samples_are_needed_for_what_is_to_be_done(
    tmp_path: Path, case: dict[str, Any], wanted: dict[int, bool], left: dict[int, list[int]]
) -> None:
    assert needed(tmp_path, **{"held": {}, **case}) == (wanted, left)


def test_any_shares_are_equal_and_whole() -> None:
    draw = random.Random(0)
    for _ in range(300):
        classes, ipc, num_ranks = draw.randint(1, 40), draw.randint(1, 30), draw.randint(1, 16)
        curricula, size = draw.randint(1, ipc), draw.randint(1, 30)
        layout = Layout(classes, tuple(curriculum_ranges(ipc, curricula)))
        for number in range(1, curricula + 1):
            holes = draw.random() * draw.choice((0, 1))
            numbers = np.array([n for n in range(layout.size(number)) if draw.random() >= holes], int)
            parts = [own_batches(numbers, Ranks(rank, num_ranks), size) for rank in range(num_ranks)]
            images = [sum(map(len, part)) for part in parts]
            assert max(images) - min(images) <= 1
            assert [n for part in parts for batch in part for n in batch] == numbers.tolist()
            assert all(0 < len(batch) <= size for part in parts for batch in part)
            if not holes:
                assert all(len(part) == -(-count // size) for part, count in zip(parts, images, strict=True))


def test_shares_are_contiguous_and_cover_once() -> None:
    for count, num_ranks in [(0, 3), (1, 3), (7, 3), (100, 8), (8, 8), (5, 1)]:
        shares = Ranks(0, num_ranks).shares(count)
        assert [n for share in shares for n in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert [Ranks(rank, num_ranks).share(count) for rank in range(num_ranks)] == shares


SHAPE = (1, 2, 2)


def values_of(numbers: range) -> torch.Tensor:
    return torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()


def written(out: Path, layout: Layout, parts: dict[int, list[range]]) -> Samples:
    samples = Samples(out, layout, SHAPE)
    for curriculum, cuts in parts.items():
        for part in cuts:
            write_tensors(samples.path(curriculum, part), {"samples": values_of(part)})
    return samples.scan()


def test_samples_of_files_that_overlap_are_read_once_each(tmp_path: Path) -> None:
    layout = Layout(2, (range(0, 10), range(10, 12)))
    samples = written(tmp_path, layout, {1: [range(0, 7), range(5, 12), range(6, 8), range(12, 20)]})
    for numbers in (range(0, 20), range(6, 7), range(4, 13), range(19, 20)):
        assert torch.equal(samples.read(1, numbers), values_of(numbers))
    with pytest.raises(InputError, match=r"2-\*.safetensors is gone or damaged; run the command again"):
        samples.read(2, range(0, 1))


def test_damaged_and_strange_files_hold_no_samples(tmp_path: Path) -> None:
    layout = Layout(2, (range(0, 10), range(10, 12)))
    samples = written(tmp_path, layout, {1: [range(0, 4), range(4, 8)]})
    whole = samples.path(1, range(0, 4))
    for name in ("1-8-12", "1-8-9", "3-0-4", "0-0-4", "1-18-22", "1-4-4", "1-x-4"):
        (samples.folder / f"{name}.safetensors").write_bytes(whole.read_bytes())  # of 4 samples
    cut_short = samples.path(1, range(12, 16))
    cut_short.write_bytes(whole.read_bytes()[:-3])
    write_tensors(samples.path(1, range(16, 20)), {"samples": torch.zeros(4, 1, 3, 3)})
    held = [n for n in range(20) if samples.scan().held(1)[n]]
    assert held == list(range(0, 12)) and not samples.held(2).any()  # 1-8-12 is what its name says
    whole.write_bytes(b"")
    with pytest.raises(InputError, match=r"1-0-4.safetensors is gone or damaged"):
        samples.read(1, range(2, 6))


def test_kept_samples_lie_in_the_same_files_however_they_came(tmp_path: Path) -> None:
    count = 2 * KEPT + 10
    layout = Layout(1, (range(0, count), range(count, count + 3)))
    contents = []
    for number, cuts in enumerate((cut(count, 100), [range(0, count)], cut(count, KEPT))):
        out = tmp_path / str(number)
        samples = written(out, layout, {1: list(cuts), 2: [range(0, 2), range(1, 3)]})
        (samples.folder / "1-0-1.safetensors").write_bytes(b"damaged")
        samples.keep(Ranks())
        contents.append({path.name: path.read_bytes() for path in samples.folder.iterdir()})
        assert torch.equal(samples.read(1, range(count)), values_of(range(count)))
        assert Samples(out, layout, SHAPE).scan().files.keys() == {1, 2}
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 4


def test_kept_files_are_removed_that_the_folder_does_not_list(tmp_path: Path, monkeypatch) -> None:
    layout = Layout(2, (range(0, 3),))
    samples = written(tmp_path, layout, {1: [range(0, 2), range(2, 6)]})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: iter(()))
        samples.keep(Ranks())
    assert [path.name for path in samples.folder.iterdir()] == ["1-0-6.safetensors"]
