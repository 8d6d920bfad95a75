"""Lists of real images: class folders, shards, odd files, what is left out and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acs_fast.config import InputError
from acs_fast.data import load_images, parse_classes
from acs_fast.listing import list_images, read_bytes


def encoded(form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (12, 9), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=form)
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
    "grey.jpg": (encoded(mode="L"), "grey"),
    "cmyk.jpg": (encoded(mode="CMYK"), "CMYK"),
    "alpha.png": (encoded("PNG", "RGBA"), "alpha"),
    "palette.png": (encoded("PNG", "P"), "palette"),
    "fine.webp": (encoded("WEBP"), ""),
}
KEPT = {"grey.jpg", "cmyk.jpg", "alpha.png", "palette.png", "fine.webp"}


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
    images = load_images(str(odd), "train", size=8, channels=3, loader=loader)
    assert images.images.shape == (6, 3, 8, 8) and images.labels.tolist() == [0] * 5 + [1]
    assert "1 skipped (1x1 px: ant/one.png)" in capsys.readouterr().err


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "0.jpg", encoded())
    put(tmp_path / "bee" / "0.jpg", b"nothing")
    with pytest.raises(InputError, match=r"bee is missing or holds no images \(1 skipped, bee/0.jpg: not an"):
        list_images(str(tmp_path), "train")


def test_the_digest_is_of_names_labels_and_lengths(odd: Path) -> None:
    first = list_images(str(odd), "train").digest()
    assert list_images(str(odd), "train").digest() == first
    assert list_images(str(odd), "train", ("bee", "ant")).digest() != first
    put(odd / "train" / "bee" / "1.jpg", encoded(seed=1))
    assert list_images(str(odd), "train").digest() != first


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
