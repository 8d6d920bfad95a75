"""The latent cache: what is in it, that it goes on after any stop, whom it refuses, and how it is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acs_fast import latents, writer
from acs_fast.config import InputError
from acs_fast.latents import LatentCache, identity, write_cache
from acs_fast.listing import Listing, list_images
from acs_fast.models.vae import VAE
from tests.runs import contents
from tests.test_vae import changed, small_kl, small_tiny

SIZE = 16
COUNTS = {"ant": 7, "bee": 4, "cat": 1}  # with shards of 3: three, two and one
SHARDS = ["ant-0000", "ant-0001", "ant-0002", "bee-0000", "bee-0001", "cat-0000"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "SHARD", 3)


def make_images(folder: Path, counts: dict[str, int] = COUNTS) -> Listing:
    """Random PNGs of the cache's size, 2 px wider: the crop is all but a column at either side."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (SIZE, SIZE + 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{number}.png")
    return list_images(str(folder), "train")


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(small_kl())


def write(folder: Path, listing: Listing, vae: VAE, **changes: int) -> LatentCache | None:
    settings = {"size": SIZE, "loader": "pil", "batch_size": 2, **changes}
    return write_cache(folder, listing, vae, **settings)  # type: ignore[arg-type]


def finished(folder: Path, listing: Listing, vae: VAE) -> LatentCache:
    cache = write(folder, listing, vae)
    assert cache is not None
    return cache


def pixels(listing: Listing) -> torch.Tensor:
    """The cropped images in [-1, 1], read by Pillow here."""
    images = [np.asarray(Image.open(entry.path))[:, 1:-1] for entry in listing.entries]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("build", [small_kl, small_tiny])
def test_rows_are_the_vaes_latents_of_the_image_and_of_its_mirror_image(tmp_path, listing, build):
    vae = VAE(build())
    cache = finished(tmp_path / "cache", listing, vae)
    assert len(cache) == 12 and cache.classes == ("ant", "bee", "cat") and cache.shape == (4, 4, 4)
    assert torch.equal(cache.labels, listing.labels)
    rows = torch.arange(12)
    for mirrored, images in ((False, pixels(listing)), (True, pixels(listing).flip(3))):
        found = cache.take(rows, torch.full((12,), mirrored))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, vae.encode(images), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(cache.take(rows, rows < 0), cache.take(rows, rows >= 0), atol=1e-2)


def test_the_folder_says_what_is_in_it(tmp_path, listing, vae):
    cache = finished(tmp_path / "cache", listing, vae)
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index == json.loads(json.dumps(identity(listing, vae, SIZE)))
    assert {name: value["images"] for name, value in index["classes"].items()} == COUNTS
    assert index["vae"] == vae.encoder_digest() and index["size"] == SIZE
    assert [value["files"] for value in index["classes"].values()] == listing.digests()
    assert [shard.name for shard in cache.shards] == SHARDS
    lines = []
    for name in SHARDS:
        stored = load_file(tmp_path / "cache" / f"{name}.safetensors")["latents"]
        own = (tmp_path / "cache" / f"{name}.jsonl").read_text().splitlines()
        assert stored.dtype == torch.float16 and stored.shape == (len(own), 2, 4, 4, 4)
        assert len({json.loads(line)["class"] for line in own}) == 1
        lines += map(json.loads, own)
    for line, entry in zip(lines, listing.entries, strict=True):
        data = Path(entry.path).read_bytes()
        assert line == {
            "class": listing.classes[entry.label], "file": entry.name,
            "sha256": hashlib.sha256(data).hexdigest(), "crop": [1, 0, SIZE, SIZE],
        }  # fmt: skip


def test_any_rows_in_any_order(tmp_path, listing, vae, monkeypatch):
    cache = finished(tmp_path / "cache", listing, vae)
    every = torch.arange(12)
    both = torch.stack([cache.take(every, every < 0), cache.take(every, every >= 0)])
    rows = torch.tensor([11, 0, 5, 5, 3, 11, 2])
    sides = torch.tensor([True, False, True, False, False, False, True])
    assert torch.equal(cache.take(rows, sides), both[sides.int(), rows])
    monkeypatch.setattr(latents, "MAPPED_BYTES", 0)  # no room for a second map
    cache = finished(tmp_path / "cache", listing, vae)
    assert torch.equal(cache.take(rows, sides), both[sides.int(), rows])
    assert len(cache._maps) == 1
    assert cache.take(rows[:0], sides[:0]).shape == (0, 4, 4, 4)
    for wrong in (-1, 12):
        with pytest.raises(IndexError, match=f"{wrong}.* of a cache of 12"):
            cache.take(torch.tensor([wrong]), torch.tensor([False]))


def test_a_class_is_read_without_the_others(tmp_path, listing, vae):
    expected = finished(tmp_path / "cache", listing, vae).take(torch.arange(7, 11), torch.zeros(4).bool())
    cache = finished(tmp_path / "cache", listing, vae)
    for name in SHARDS[:3] + SHARDS[5:]:
        (tmp_path / "cache" / f"{name}.safetensors").unlink()
    rows = cache.rows_of(1)
    assert rows.tolist() == [7, 8, 9, 10]
    assert torch.equal(cache.take(rows, torch.zeros(4).bool()), expected)
    with pytest.raises(InputError, match=r"ant-0000.safetensors is missing or damaged; run acs-fast encode"):
        cache.take(cache.rows_of(0), torch.zeros(7).bool())


@pytest.mark.parametrize("images", [30, 300])
def test_the_memory_in_use_hangs_not_on_the_size(tmp_path, images, monkeypatch):
    """What the kernel has mapped of the cache, which it may keep in memory, is bounded at 1x and 10x."""
    monkeypatch.setattr(latents, "MAPPED_BYTES", 1 << 17)
    shape, labels = (4, 16, 16), torch.zeros(images, dtype=torch.long)  # 12 KiB a shard of three
    values = torch.arange(images).half().view(-1, 1, 1, 1, 1).expand(-1, 2, *shape)
    for shard in latents.cut(labels, ("a",)):
        own = values[shard.rows.start : shard.rows.stop]
        writer.write_tensors(tmp_path / f"{shard.name}.safetensors", {"latents": own})
        (tmp_path / f"{shard.name}.jsonl").write_text("")
    cache, most = LatentCache(tmp_path, labels, shape, ("a",)), 0
    for rows in torch.randperm(images, generator=torch.Generator().manual_seed(0)).split(8):
        assert torch.equal(cache.take(rows, rows % 2 == 0)[:, 0, 0, 0], rows.float())
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        most = max(most, sum(end - start for start, end in spans))
    assert 1 << 16 < most < 1 << 18  # maps are of whole pages


def test_reading_keeps_no_file_open(tmp_path, listing, vae):
    cache = finished(tmp_path / "cache", listing, vae)
    before = len(os.listdir("/proc/self/fd"))
    cache.take(torch.arange(12), torch.zeros(12).bool())
    assert len(cache._maps) == 6 and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("share", [2, 3, 7])
def test_ranks_make_the_same_shards(tmp_path, listing, vae, share):
    alone, together = tmp_path / "alone", tmp_path / "together"
    finished(alone, listing, vae)
    ends = [write(together, listing, vae, rank=rank, num_ranks=share) for rank in range(share)]
    assert all(end is None for end in ends[: min(share, 6) - 1]) and ends[-1] is not None
    assert contents(alone) == contents(together)


@pytest.mark.parametrize("written", range(12))
def test_a_full_disk_leaves_the_finished_shards(tmp_path, listing, vae, monkeypatch, written):
    folder = tmp_path / "cache"
    finished(tmp_path / "whole", listing, vae)
    whole, replaced, real = contents(tmp_path / "whole"), [], os.replace

    def replace(source, target):
        if len(replaced) == written:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replaced.append(Path(target).name)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", replace)
        with pytest.raises(OSError, match="No space left") as caught:
            write(folder, listing, vae)
    assert Path(caught.value.filename).parent == folder and not caught.value.filename.endswith(".tmp")
    left = contents(folder)
    assert set(left) == set(replaced) and all(left[name] == whole[name] for name in left)
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", lambda images: encoded.append(len(images)) or VAE.encode(vae, images))
        finished(folder, listing, vae)
    done = sum(name.endswith(".safetensors") for name in replaced)
    assert sum(encoded) == 2 * sum([3, 3, 1, 3, 1, 1][done:])  # what was finished is not encoded again
    assert contents(folder) == whole


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"  ")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def without_table(path: Path) -> None:
    path.with_suffix(".jsonl").unlink()


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, lengthened, emptied, foreign, without_table])
def test_a_damaged_shard_is_refused_and_made_again(tmp_path, listing, vae, damage):
    folder = tmp_path / "cache"
    cache = finished(folder, listing, vae)
    whole = contents(folder)
    damage(folder / "bee-0000.safetensors")
    with pytest.raises(InputError, match=r"bee-0000\.safetensors is missing or damaged; run acs-fast encode"):
        cache.take(cache.rows_of(1), torch.zeros(4).bool())
    assert len(finished(folder, listing, vae)) == 12
    assert contents(folder) == whole


def other_files(tmp_path: Path, listing: Listing, vae: VAE) -> tuple[Listing, VAE, int]:
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "images" / "train" / "bee" / "new.png")
    return list_images(listing.source, "train"), vae, SIZE


OTHERS = {
    "VAE": lambda tmp_path, listing, vae: (listing, changed("encoder"), SIZE),
    "dtype of the VAE (float32 there, bfloat16 here)": lambda tmp_path, listing, vae: (
        listing, VAE(small_kl().bfloat16()), SIZE,
    ),
    "image size (16 there, 32 here)": lambda tmp_path, listing, vae: (listing, vae, 32),
    "file list in class bee": other_files,
}  # fmt: skip


@pytest.mark.parametrize("difference", OTHERS)
def test_a_cache_of_something_else_is_refused_with_the_difference(tmp_path, listing, vae, difference):
    folder = tmp_path / "cache"
    finished(folder, listing, vae)
    before = contents(folder)
    changes = OTHERS[difference](tmp_path, listing, vae)
    with pytest.raises(InputError) as caught:
        write(folder, *changes[:2], size=changes[2])
    assert f"{folder} is of another {difference}; give another folder, or remove" in str(caught.value)
    assert contents(folder) == before


def test_a_cache_serves_any_selection_of_its_classes_and_takes_more_in(tmp_path, listing, vae):
    """Encoded class by class or all at once: the same bytes, and the rows of the listing that asks."""
    some, folder = list_images(listing.source, "train", ("cat", "ant")), tmp_path / "cache"
    cache = finished(folder, some, vae)
    assert cache.labels.tolist() == [0] + [1] * 7 and cache.shards[0].name == "cat-0000"
    whole = finished(folder, listing, vae)
    finished(tmp_path / "at once", listing, vae)
    assert contents(folder) == contents(tmp_path / "at once")
    before = contents(folder)
    cache = finished(folder, some, vae)
    assert contents(folder) == before
    rows = torch.tensor([0, 1, 7])
    expected = whole.take(torch.tensor([11, 0, 6]), rows > 0)
    assert torch.equal(cache.take(rows, rows > 0), expected)


def test_another_decoder_has_the_same_latents(tmp_path, listing, vae):
    finished(tmp_path / "cache", listing, vae)
    assert write(tmp_path / "cache", listing, changed("decoder")) is not None


def test_what_is_no_cache_is_refused(tmp_path, listing, vae):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        write(tmp_path / "file", listing, vae)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="holds files of something else"):
        write(tmp_path / "other", listing, vae)
    for text in ("{", "[]", '{"format": 1}'):
        (tmp_path / "index").mkdir(exist_ok=True)
        (tmp_path / "index" / "index.json").write_text(text)
        with pytest.raises(InputError, match="is no index of a latent cache"):
            write(tmp_path / "index", listing, vae)
    with pytest.raises(InputError, match="size is 18, it must be a multiple of 4"):
        write(tmp_path / "new", listing, vae, size=18)
    assert not (tmp_path / "new").exists()


HOLD = (
    "import fcntl, sys\nfile = open(sys.argv[1], 'a')\n"
    "fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]), 0)\nprint('held', flush=True)\nsys.stdin.read()"
)


def test_two_processes_do_not_write_a_shard_together(tmp_path, listing, vae):
    """Another process holds shard 1, as rank 1 of 2 does; rank 0 is free to go on, readers always are."""
    folder = tmp_path / "cache"
    folder.mkdir()
    command = [
        sys.executable,
        "-c",
        HOLD,
        str(folder / ".lock"),
        str(latents.place(latents.Shard(SHARDS[1], range(3, 6)))),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for share in ({}, {"rank": 1, "num_ranks": 2}, {"rank": 1, "num_ranks": 3}):
            with pytest.raises(InputError, match=f"another process is encoding into {folder}; wait for it"):
                write(folder, listing, vae, **share)
        assert set(contents(folder)) == {"index.json"}
        assert write(folder, listing, vae, rank=0, num_ranks=2) is None
        other.communicate("")
    whole = finished(folder, listing, vae)
    (folder / ".lock").unlink()
    assert len(finished(folder, listing, vae)) == len(whole)
    assert not (folder / ".lock").exists()  # what is whole is not locked


def test_latents_that_are_not_finite_are_refused_by_name(tmp_path, listing, vae, monkeypatch):
    def encode(images):
        found = VAE.encode(vae, images)
        found[images.flatten(1).amin(1) == worst] = 1e6  # beyond half precision
        return found

    worst = pixels(listing)[8].amin()
    images = pixels(listing).clone()
    assert (images.flatten(1).amin(1) == worst).sum() >= 1
    first = int((images.flatten(1).amin(1) == worst).int().argmax())
    monkeypatch.setattr(vae, "encode", encode)
    with pytest.raises(InputError, match=f"{listing.entries[first].name} is not finite in half precision"):
        write(tmp_path / "cache", listing, vae)
