"""Tar shards of a run's images: who can read them, what a kill or damage leaves, the memory they need."""

from __future__ import annotations

import os
import re
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from acs_fast import shards
from acs_fast.data import check_classes
from acs_fast.images import Images, Key
from acs_fast.listing import list_images, read_bytes
from acs_fast.shards import key_of, read_members, stem
from tests.image_runs import fill, keys_of, packed, picture, record
from tests.runs import contents

ODD = ("a.b", "a_1", "x" * 200, "a", "%2E", "Ünï cöde", "...")


@pytest.mark.parametrize("name", ODD)
def test_a_members_name_gives_its_class_back(name: str) -> None:
    check_classes((name,))
    member = stem(name, 1234567) + ".png"
    assert key_of(member) == (name, 1234567)
    # as WebDataset takes a name apart
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member)
    assert match is not None and match.groups() == (stem(name, 1234567), "png") and member.isascii()
    assert key_of(stem(name, 0) + ".cls") is None


def test_shards_hold_what_was_written_and_the_loose_files_are_gone(tmp_path: Path) -> None:
    written = packed(tmp_path / "run", ODD)
    images = Images(tmp_path / "run", "wds")
    assert {key: images.read(key) for key in written} == written and all(map(images.holds, written))
    for key in (("a", 4), ("b", 0), ("a_1_", 0)):
        assert images.read(key) is None and not images.holds(key)
    names = sorted(path.name for path in images.folder.iterdir())
    assert names == ["01-00000.tar", "02-00000.tar", "classes.txt"]
    with tarfile.open(images.folder / "01-00000.tar") as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
            (0, 0, 0, "", "", 0o644)
        }
        assert [m.name for m in members[:2]] == ["a%2Eb_000000.png", "a%2Eb_000000.cls"]
        assert tar.extractfile(members[2]).read() == written["a.b", 1]
        offsets = [(m.offset_data, m.size) for m in members if m.name.endswith(".png")]
    assert [place[1:] for place in read_members(images.folder / "01-00000.tar")] == offsets


@pytest.mark.parametrize("classes", [("bee", "ant"), ("1", "0"), ("0", "x"), ODD], ids=str)
def test_the_listing_of_real_images_reads_our_shards(tmp_path: Path, classes: tuple[str, ...]) -> None:
    written = packed(tmp_path / "run", classes)
    for listing in (list_images(str(tmp_path / "run" / "images"), None, given) for given in (None, classes)):
        assert listing.classes == classes and not listing.skipped
        read = [(listing.classes[entry.label], read_bytes(entry)) for entry in listing.entries]
        assert sorted(read) == sorted((key[0], data) for key, data in written.items())


def test_other_tools_find_the_class_as_a_number(tmp_path: Path) -> None:
    packed(tmp_path / "run", ("bee", "ant"))
    with tarfile.open(tmp_path / "run" / "images" / "01-00000.tar") as tar:
        labels = {m.name: int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")}
    assert labels == {f"{c}_{k:06d}.cls": y for y, c in enumerate(("bee", "ant")) for k in (0, 1)}
    assert (tmp_path / "run" / "images" / "classes.txt").read_text() == "bee\nant\n"


def test_dali_reads_our_shards(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    written = packed(tmp_path / "run", ("x" * 150, "bee"))
    pipeline = dali.Pipeline(batch_size=4, num_threads=1, device_id=None)
    with pipeline:
        data, label = dali.fn.readers.webdataset(
            paths=[str(tmp_path / "run" / "images" / "01-00000.tar")], ext=["png", "cls"]
        )
        pipeline.set_outputs(data, label)
    pipeline.build()
    data, label = pipeline.run()
    assert [bytes(data.at(i)) for i in range(4)] == list(written.values())[:4]
    assert [bytes(label.at(i)) for i in range(4)] == [b"0", b"0", b"1", b"1"]


def test_a_shard_is_a_function_of_its_images(tmp_path: Path) -> None:
    for name in ("one", "two"):
        packed(tmp_path / name)
        os.utime(tmp_path / name / "images", (0, 0))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


class Killed(BaseException):
    pass


def die_at(monkeypatch, moment: int) -> None:
    """Let the process die before its moment-th call that changes what is on the disk."""
    calls = iter(range(1000))

    def dying(real):
        def call(*args, **kwargs):
            if next(calls) >= moment:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


# classes.txt: written, renamed twice; shard: written, renamed, its folder; four loose files; then it is done
@pytest.mark.parametrize("moment", range(11))
def test_a_kill_at_any_moment_of_packing_loses_nothing(tmp_path: Path, monkeypatch, moment: int) -> None:
    packed(tmp_path / "whole", curricula=1)
    keys = keys_of(("ant", "bee"), range(2))
    images = Images(record(tmp_path / "run", ("ant", "bee")), "wds")
    written = fill(images, keys)
    with monkeypatch.context() as patch:
        die_at(patch, moment)
        if moment < 10:
            with pytest.raises(Killed):
                images.pack(1, 0, keys)
        else:
            images.pack(1, 0, keys)
    for reader in (images, Images(tmp_path / "run", "wds")):
        assert {key: reader.read(key) for key in keys} == written
    shard = images.folder / "01-00000.tar"
    assert not shard.exists() or shard.read_bytes() == (tmp_path / "whole/images/01-00000.tar").read_bytes()
    again = Images(tmp_path / "run", "wds")
    if moment in (6, 8):  # a sweep does it as well, where the shard is there
        again.sweep()
    again.pack(1, 0, keys)
    again.sweep()
    for left in (tmp_path / "run").rglob("*.tmp"):
        left.unlink()  # the run folder's own sweep
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_shard_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch) -> None:
    written = packed(tmp_path / "run", curricula=1)
    images = Images(tmp_path / "run", "wds")
    with monkeypatch.context() as patch:
        die_at(patch, 0)
        images.pack(1, 0, list(written))
    with pytest.raises(FileNotFoundError, match=r"bee/7\.png"):
        images.pack(1, 0, [*written, ("bee", 7)])
    assert {key: images.read(key) for key in written} == written


def test_a_full_disk_leaves_the_images_as_they_were(tmp_path: Path, monkeypatch) -> None:
    images = Images(record(tmp_path / "run", ()), "wds")
    fill(images, keys_of(("ant",), range(3)))
    before = contents(tmp_path / "run")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*01-00000\.tar"):
            images.pack(1, 0, keys_of(("ant",), range(3)))
    assert contents(tmp_path / "run") == before


def test_of_a_shard_that_is_cut_short_the_rest_is_missing(tmp_path: Path) -> None:
    written = list(packed(tmp_path / "run", curricula=1).items())
    shard = tmp_path / "run" / "images" / "01-00000.tar"
    whole, places = shard.read_bytes(), list(read_members(shard))
    _, offset, length = places[2]
    cuts = {0: 0, offset - 512: 2, offset - 1: 2, offset + length - 1: 2, offset + length: 3}
    for cut, left in cuts.items():
        open_before = Images(tmp_path / "run", "wds")
        os.utime(shard.parent, (1, 1))  # it need not look again
        assert open_before.read(written[0][0]) == written[0][1]
        shard.write_bytes(whole[:cut])
        for images in (open_before, Images(tmp_path / "run", "wds")):
            read = [images.read(key) for key, _ in written]
            assert read == [data for _, data in written[:left]] + [None] * (4 - left)
        assert [images.holds(key) for key, _ in written] == [place < left for place in range(4)]
        shard.write_bytes(whole)
    shard.write_bytes(whole[: offset - 512] + b"?" + whole[offset - 511 :])  # a header that was overwritten
    images = Images(tmp_path / "run", "wds")
    assert [images.holds(key) for key, _ in written] == [True, True, False, False]
    shard.unlink()
    assert not any(images.holds(key) or images.read(key) for key, _ in written)


def test_an_image_made_anew_takes_the_place_of_the_one_in_a_damaged_shard(tmp_path: Path) -> None:
    packed(tmp_path / "whole")
    written = packed(tmp_path / "run")
    shard, key = tmp_path / "run" / "images" / "02-00000.tar", ("ant", 3)
    _, offset, _ = next(place for place in read_members(shard) if place[0] == key)
    damaged = bytearray(shard.read_bytes())
    damaged[offset + 50] ^= 255
    shard.write_bytes(damaged)
    images = Images(tmp_path / "run", "wds")
    assert images.read(key) not in (None, written[key])
    images.write(key, written[key])
    images.sweep()
    assert images.read(key) == written[key]
    images.pack(2, 0, keys_of(("ant", "bee"), range(2, 4)))
    images.sweep()
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_sweep_keeps_what_is_in_no_shard(tmp_path: Path) -> None:
    packed(tmp_path / "run", curricula=1)
    images = Images(tmp_path / "run", "wds")
    for key in (("ant", 0), ("ant", 9), ("cat", 0)):
        images.write(key, images.encode(picture(0)))
    images.sweep()
    loose = sorted(str(path.relative_to(images.folder)) for path in images.folder.glob("*/*"))
    assert loose == ["ant/9.png", "cat/0.png"]  # ant/0.png has the shard's bytes
    png = Images(tmp_path / "png")
    fill(png, [("ant", 0)])
    png.sweep()
    assert png.holds(("ant", 0))


@pytest.mark.parametrize("settled", [False, True])
def test_shards_of_other_processes_are_noticed(tmp_path: Path, settled: bool) -> None:
    reader, now = Images(record(tmp_path / "run", ()), "wds"), time.time_ns()
    assert not reader.holds(("ant", 0))
    written: dict[Key, bytes | None] = {}
    for turn in range(3):
        writer = Images(tmp_path / "run", "wds")
        written |= fill(writer, keys_of(("ant",), range(2 * turn, 2 * turn + 2)), (turn + 2, 3, 3))
        writer.pack(1, turn, keys_of(("ant",), range(2 * turn, 2 * turn + 2)))
        # the folder changed long ago, or just now, within one tick of its clock
        os.utime(writer.folder, ns=(0, 10**9 * turn if settled else now))
        assert {key: reader.read(key) for key in written} == written
    anew = fill(writer, keys_of(("ant",), range(2)), (9, 9, 1))
    writer.pack(1, 0, keys_of(("ant",), range(2)))
    (tmp_path / "run" / "images" / "01-00001.tar").unlink()
    written |= anew | {("ant", 2): None, ("ant", 3): None}
    assert {key: reader.read(key) for key in written} == written


def test_a_folder_that_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch) -> None:
    written = packed(tmp_path / "run")
    os.utime(tmp_path / "run" / "images", (1, 1))
    images = Images(tmp_path / "run", "wds")
    assert images.holds(("ant", 0))
    monkeypatch.setattr(shards, "shard_stamps", lambda folder: pytest.fail("read again"))
    assert all(map(images.holds, written)) and not images.holds(("ant", 99))


def test_the_index_of_many_images_is_small(tmp_path: Path) -> None:
    classes = tuple(f"n{number:08d}" for number in range(100))
    (tmp_path / "images").mkdir()
    for number in range(10):
        keys = keys_of(classes[number * 10 : number * 10 + 10], range(100))
        parts = shards.tar_parts((f"{stem(*key)}.{end}", b"x") for key in keys for end in ("png", "cls"))
        (tmp_path / "images" / shards.shard_name(1, number)).write_bytes(b"".join(parts))
    os.utime(tmp_path / "images", (1, 1))
    tracemalloc.start()
    try:
        images = Images(tmp_path, "wds")
        assert images.read((classes[-1], 99)) == b"x"
        held, _ = tracemalloc.get_traced_memory()
        del images
        held -= tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 32 * 10_000 <= held < 36 * 10_000
    images = Images(tmp_path, "wds")
    assert all(images.holds((name, index)) for name in classes for index in (0, 57, 99))
