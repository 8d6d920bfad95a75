"""Lists of real images: class folders, shards, odd files, what is left out and what is refused."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acs_fast.config import InputError
from acs_fast.data import has_splits, load_images, parse_classes
from acs_fast.listing import list_images, read_bytes


def encoded(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (12, 9), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=form)
    return buffer.getvalue()


def deep_png() -> bytes:
    """16 bits a channel, which Pillow reads but cannot write."""
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 12, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 12, 9, 16, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def see_through_palette() -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(encoded("PNG", "P"))) as image:
        image.save(buffer, format="PNG", transparency=b"\0\x80\xff")
    return buffer.getvalue()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


ODD = {  # name, bytes, and what becomes of it
    "broken.jpg": (b"\xff\xd8" + b"\0" * 200, "not an image"),
    "cut.jpg": (encoded(size=(64, 64))[:-600], "truncated"),
    "cut.png": (encoded("PNG", size=(64, 64))[:-600], "truncated"),
    "one.png": (encoded("PNG", size=(1, 1)), "1x1 px"),
    "notes.txt": (b"breeds", "not an image"),
    "empty.png": (b"", "not an image"),
    "lab.tif": (encoded("TIFF", "LAB"), "LAB cannot be made RGB"),
    "deep-grey.png": (encoded("PNG", "I;16"), "I;16 is not 8 bits a channel"),
    "grey.jpg": (encoded(mode="L"), "grey"),
    "cmyk.jpg": (encoded(mode="CMYK"), "CMYK"),
    "alpha.png": (encoded("PNG", "RGBA"), "alpha"),
    "palette.png": (encoded("PNG", "P"), "palette"),
    "see-through.png": (see_through_palette(), "alpha"),
    "deep.png": (deep_png(), "16 bit"),
    "fine.webp": (encoded("WEBP"), ""),
}
KEPT = {"grey.jpg", "cmyk.jpg", "alpha.png", "palette.png", "see-through.png", "deep.png", "fine.webp"}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    for name, (data, _) in ODD.items():
        put(tmp_path / "train" / "ant" / name, data)
    put(tmp_path / "train" / "ant" / ".hidden.png", b"")
    put(tmp_path / "train" / "bee" / "0.jpg", encoded())
    return tmp_path


def test_odd_files_are_skipped_or_converted_and_named(odd: Path) -> None:
    listing = list_images(str(odd), "train")
    assert {entry.name for entry in listing.entries} == {f"ant/{name}" for name in KEPT} | {"bee/0.jpg"}
    assert dict(listing.skipped) == {f"ant/{n}": why for n, (_, why) in ODD.items() if n not in KEPT}
    assert dict(listing.converted) == {f"ant/{n}": ODD[n][1] for n in KEPT if ODD[n][1]}
    assert {e.name for e in listing.entries if e.plain} == {"ant/grey.jpg", "bee/0.jpg"}
    for name, (_, reason) in ODD.items():
        assert not reason or (f"ant/{name}" in listing.summary() and reason in listing.summary())
    assert "\n" not in listing.summary() and "hidden" not in listing.summary()
    assert list_images(str(odd), "train", ("bee",)).summary() == ""


@pytest.mark.parametrize("loader", ["dali", "pil"])
def test_odd_files_load_as_rgb_and_the_summary_is_printed(odd: Path, loader: str, capsys) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's would stand on stderr
        images = load_images(str(odd), "train", size=8, channels=3, loader=loader)
    assert images.images.shape == (8, 3, 8, 8) and images.labels.tolist() == [0] * 7 + [1]
    assert "1 skipped (1x1 px: ant/one.png)" in capsys.readouterr().err


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "0.jpg", encoded())
    put(tmp_path / "bee" / "0.jpg", b"nothing")
    with pytest.raises(InputError, match=r"bee is missing or holds no images \(1 skipped, bee/0.jpg: not an"):
        list_images(str(tmp_path), "train")


def test_a_class_digest_is_of_names_and_lengths(odd: Path) -> None:
    first = list_images(str(odd), "train").digests()
    assert list_images(str(odd), "train").digests() == first and len(set(first)) == len(first)
    assert list_images(str(odd), "train", ("bee", "ant")).digests() == first[1::-1]
    put(odd / "train" / "bee" / "1.jpg", encoded(seed=1))
    assert list_images(str(odd), "train").digests() != first


def test_a_file_that_vanished_is_named(odd: Path) -> None:
    entry = list_images(str(odd), "train").entries[-1]
    Path(entry.path).unlink()
    with pytest.raises(InputError, match=r"image bee/0.jpg cannot be read"):
        read_bytes(entry)


def shard(path: Path, samples: dict[str, tuple[bytes, str | None]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (data, label) in samples.items():
            members = [(f"{key}.jpg", data)] + ([(f"{key}.cls", label.encode())] if label else [])
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_shards_give_what_the_same_folders_give(tmp_path: Path) -> None:
    data = [encoded(seed=seed) for seed in range(4)]
    for number, label in enumerate((1, 0, 1, 0)):
        put(tmp_path / "folder" / "train" / ("ant", "bee")[label] / f"{number}.jpg", data[number])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "classes.txt").write_text("ant\nbee\n")
    shard(tmp_path / "shards" / "train-0.tar", {"0": (data[0], "1"), "1": (data[1], "0")})
    shard(tmp_path / "shards" / "train-1.tar", {"2": (data[2], "1"), "3": (data[3], "ant")})
    shard(tmp_path / "shards" / "val-0.tar", {"4": (encoded(seed=9), "1"), "5": (encoded(seed=8), "0")})
    listing = list_images(str(tmp_path / "shards"), "train")
    folder = list_images(str(tmp_path / "folder"), "train")
    assert listing.classes == ("ant", "bee") and listing.labels.tolist() == [0, 0, 1, 1]
    assert [read_bytes(e) for e in listing.entries] == [read_bytes(e) for e in folder.entries]
    assert len(list_images(str(tmp_path / "shards"), "val").entries) == 2
    assert list_images(str(tmp_path / "shards"), "train", ("bee",)).labels.tolist() == [0, 0]
    for pattern in ("*.tar", "train-?.tar"):
        assert list_images(str(tmp_path / "shards" / pattern), "train").entries == listing.entries
    one = list_images(str(tmp_path / "shards" / "val-0.tar"), "val")
    assert [entry.name for entry in one.entries] == ["val-0.tar/5.jpg", "val-0.tar/4.jpg"]


def test_shards_of_one_split_do_not_stand_in_for_the_other(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", {"0": (encoded(), "ant")})
    assert not has_splits(str(tmp_path))
    with pytest.raises(InputError, match=r"has no val shards, only train-0.tar"):
        list_images(str(tmp_path), "val")
    shard(tmp_path / "val-0.tar", {"1": (encoded(seed=1), "ant")})
    assert has_splits(str(tmp_path)) and has_splits(str(tmp_path / "*.tar"))
    (tmp_path / "both").mkdir()
    shard(tmp_path / "both" / "0.tar", {"0": (encoded(), "ant")})
    assert not has_splits(str(tmp_path / "both"))
    assert (
        list_images(str(tmp_path / "both"), "val").entries
        == list_images(str(tmp_path / "both"), "train").entries
    )


def test_a_member_without_a_label_is_of_its_folder(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"train/bee/0": (encoded(), None), "train/ant/0": (encoded(seed=1), None)})
    listing = list_images(str(tmp_path), "train")
    assert listing.classes == ("ant", "bee") and listing.labels.tolist() == [0, 1]
    assert read_bytes(listing.entries[0]) == encoded(seed=1)
    with pytest.raises(InputError, match=r"class cow of the shards in .* is missing .*; known: ant bee$"):
        list_images(str(tmp_path), "train", ("ant", "cow"))


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {str(n): (encoded(seed=n), str(n)) for n in (10, 2, 0)})
    assert list_images(str(tmp_path), "train").classes == ("0", "2", "10")
    with pytest.raises(InputError, match=r"number their classes; name them in .*classes.txt"):
        list_images(str(tmp_path), "train", ("ant", "bee"))
    (tmp_path / "classes.txt").write_text("red ant\nbee\n")
    with pytest.raises(InputError, match=r"0.tar has class 10 for 10.jpg; add it to .*classes.txt"):
        list_images(str(tmp_path), "train")
    (tmp_path / "classes.txt").write_text("\n".join(["red ant", *map(str, range(101, 111))]))
    names = ("red ant", "102", "110")
    assert [e.name for e in list_images(str(tmp_path), "train", names).entries] == [
        "0.tar/0.jpg",
        "0.tar/2.jpg",
        "0.tar/10.jpg",
    ]


def test_unusable_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"0": (encoded(), None)})
    with pytest.raises(InputError, match=r"a.tar has no class for 0.jpg; add a member 0.cls"):
        list_images(str(tmp_path), "train")
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    with pytest.raises(InputError, match=r"a.tar cannot be read"):
        list_images(str(tmp_path), "train")


def test_built_in_class_lists() -> None:
    woof, nette = parse_classes("imagewoof"), parse_classes("imagenette")
    assert (woof[0], woof[-1], len(set(woof))) == ("n02096294", "n02105641", 10) and list(woof) != sorted(
        woof
    )
    assert (nette[0], len(set(nette))) == ("n01440764", 10) and list(nette) == sorted(nette)
    assert len(parse_classes("imagenet1k")) == 1000
    lists = Path(__file__).resolve().parents[2] / "shared" / "data" / "lists"
    if not lists.is_dir():
        pytest.skip("the published lists are not here")
    for name, names in (("class_woof.txt", woof), ("class_nette.txt", nette)):
        assert tuple((lists / name).read_text().split()) == names
