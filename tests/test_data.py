"""The bundled digits, image folders, class lists and the two ranges of pixel values."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acs_fast.config import InputError
from acs_fast.data import (
    ASSETS,
    DIGITS,
    ImageSet,
    check_classes,
    has_splits,
    load_images,
    read_class_list,
    read_image,
    to_model_range,
    to_uint8,
)

BAD_NAMES = ["", ".", "..", "a/b", "/a", "a\\b", "a\0b", "a\nb", "\x1b[2J"]


def pixels(height=6, width=6, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes with 3 and 2 training images and a validation image each, all with pixels of their own."""
    files = [
        "train/wren/10.png",
        "train/wren/2.png",
        "train/wren/1.png",
        "train/ant/b.png",
        "train/ant/a.PNG",
    ]
    for seed, file in enumerate([*files, "val/wren/0.png", "val/ant/0.png"]):
        write(tmp_path / file, pixels(seed=seed))
    return tmp_path


def as_array(images, row):
    return images.images[row].permute(1, 2, 0).numpy()


def test_digits_split_holds_every_image_once():
    train, val = load_images(DIGITS, "train"), load_images(DIGITS, "val")
    assert (len(train), len(val)) == (1297, 500)
    for part in (train, val):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 8, 8)
        assert part.labels.dtype == torch.int64
        assert part.classes == tuple("0123456789") and not part.mirror
    assert val.labels.bincount().tolist() == [50] * 10
    again = load_images(DIGITS, "val")
    assert torch.equal(again.images, val.images) and torch.equal(again.labels, val.labels)


def test_digits_split_is_the_documented_one():
    stored = load_file(ASSETS / "digits.safetensors")
    generator, expected = np.random.default_rng(0), np.zeros(1797, dtype=np.uint8)
    for digit in range(10):
        expected[generator.permutation(np.flatnonzero(stored["labels"].numpy() == digit))[:50]] = 1
    assert np.array_equal(stored["test"].numpy(), expected)


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    # 16 levels to 8 bits: round(v * 255 / 16), half to even
    source = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8)).flatten(1)
    parts = [load_images(DIGITS, split) for split in ("train", "val")]
    ours = torch.cat([part.images.flatten(1) for part in parts])
    labels = torch.cat([part.labels for part in parts])
    expected = sorted((*row, y) for row, y in zip(source.tolist(), digits.target.tolist(), strict=True))
    assert sorted((*row, y) for row, y in zip(ours.tolist(), labels.tolist(), strict=True)) == expected


def test_digits_of_chosen_classes_are_relabelled_in_their_order():
    full, chosen = load_images(DIGITS, "val"), load_images(DIGITS, "val", ("8", "3"))
    assert chosen.classes == ("8", "3") and not chosen.mirror
    assert chosen.labels.bincount().tolist() == [50, 50]
    for label, digit in enumerate((8, 3)):
        assert torch.equal(chosen.images[chosen.labels == label], full.images[full.labels == digit])
    with pytest.raises(InputError, match="no class 'x'; known: 0 1 2"):
        load_images(DIGITS, "val", ("8", "x"))


def test_first_takes_the_leading_images_of_every_class():
    labels = torch.tensor([1, 0, 1, 1, 0, 2])
    data = ImageSet(
        torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), labels, ("a", "b", "c"), mirror=False
    )
    first = data.first(2)
    assert first.images.flatten().tolist() == [1, 4, 0, 2, 5] and first.labels.tolist() == [0, 0, 1, 1, 2]
    assert first.classes == data.classes and first.mirror is False and len(first) == 5


def test_random_draws_without_replacement_by_seed():
    data = load_images(DIGITS, "val")
    drawn = data.random(7, seed=1)
    assert drawn.labels.bincount().tolist() == [7] * 10
    rows = [(data.images == image).flatten(1).all(1).nonzero()[0, 0].item() for image in drawn.images]
    assert len(set(rows)) == 70 and torch.equal(data.labels[rows], drawn.labels)
    assert torch.equal(data.random(7, seed=1).images, drawn.images)
    assert not torch.equal(data.random(7, seed=2).images, drawn.images)
    assert not torch.equal(data.first(7).images, drawn.images)
    with_more = data.random(9, seed=1)  # a larger set of a class holds the smaller one
    assert torch.equal(with_more.images[:7], drawn.images[:7])


def test_folder_with_splits(folder):
    train = load_images(str(folder), "train")
    assert train.classes == ("ant", "wren") and train.labels.tolist() == [0, 0, 1, 1, 1] and train.mirror
    # by file name as text: a.PNG, b.png; 1.png, 10.png, 2.png
    for row, seed in enumerate([4, 3, 2, 0, 1]):
        assert np.array_equal(as_array(train, row), pixels(seed=seed)), row
    val = load_images(str(folder), "val")
    assert val.labels.tolist() == [0, 1] and np.array_equal(as_array(val, 0), pixels(seed=6))


def test_folder_without_splits(folder):
    flat, split = load_images(str(folder / "train"), "val"), load_images(str(folder), "train")
    assert flat.classes == split.classes and torch.equal(flat.images, split.images)


def test_a_distilled_set_is_read_as_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("train", "val")):  # class folders
        write(tmp_path / DIGITS / name / "0.png", pixels(seed=seed))
    data = load_images(DIGITS, None)  # the folder of that name, not the bundled images
    assert data.classes == ("train", "val") and data.labels.tolist() == [0, 1]
    assert np.array_equal(as_array(data, 0), pixels(seed=0))


def test_splits_are_found(folder):
    assert has_splits(DIGITS) and has_splits(str(folder))
    assert not has_splits(str(folder / "train")) and not has_splits(str(folder / "nowhere"))


def test_class_list_gives_the_label_order(folder):
    (folder / "list.txt").write_text("wren\n\n  ant\n")
    names = read_class_list(folder / "list.txt")
    assert names == ("wren", "ant")
    train = load_images(str(folder), "train", names)
    assert train.classes == names and train.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(as_array(train, 0), pixels(seed=2))
    assert len(load_images(str(folder), "train", ("wren",))) == 3
    (folder / "list.txt").write_text("house wren \n")
    assert read_class_list(folder / "list.txt") == ("house wren",)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_unreadable_class_list_is_named(tmp_path, kind):
    path = tmp_path / "list.txt"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match=r"class list .*list\.txt cannot be read"):
        read_class_list(path)


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_class_name_is_refused(folder, name):
    with pytest.raises(InputError, match="not a plain folder name"):
        check_classes(("ant", name))
    with pytest.raises(InputError, match="not a plain folder name"):
        load_images(str(folder), "train", ("ant", name))


@pytest.mark.parametrize("name", ["..", "a/b", "/a", "a\\b"])
def test_bad_class_name_in_a_list_is_refused(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"ant\n{name}\n")
    with pytest.raises(InputError, match="not a plain folder name"):
        read_class_list(tmp_path / "list.txt")


@pytest.mark.parametrize("names", [("n02096294", "Übermaß"), ("a b", "c.d", "..."), ("0",), ()], ids=str)
def test_plain_class_names_pass(names):
    assert check_classes(names) == names


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_class_list_is_refused(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=r"class list .*list\.txt is empty"):
        read_class_list(tmp_path / "list.txt")


@pytest.mark.parametrize("name", [3, None, ["ant"]])
def test_class_name_that_is_no_text_is_refused(name):
    with pytest.raises(InputError, match="is not text"):
        check_classes(("ant", name))


def test_doubled_class_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(InputError, match="'ant' is listed twice"):
        read_class_list(tmp_path / "list.txt")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "folder"])
def test_corrupt_image_is_named(folder, damage, capsys):
    path = folder / "train" / "wren" / "2.png"
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "text": b"no image", "empty": b""}[damage])
    assert len(load_images(str(folder), "train")) == 4  # of real images the others serve, test_listing.py
    if damage != "folder":
        assert "1 skipped" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"image .*wren/2\.png cannot be read"):
        load_images(str(folder / "train"), None)  # a distilled set is used whole or not at all


def test_missing_folder_and_empty_class_are_named(folder):
    with pytest.raises(InputError, match=r"there is no image folder .*nowhere"):
        load_images(str(folder / "nowhere"), "train")
    (folder / "train" / "bat").mkdir()
    (folder / "train" / "bat" / "notes.txt").write_text("no image")
    with pytest.raises(
        InputError, match=r"class folder .*bat is missing or holds no images .*; known: ant bat wren"
    ):
        load_images(str(folder), "train")
    with pytest.raises(InputError, match=r"class folder .*cow is missing"):
        load_images(str(folder), "train", ("ant", "cow"))
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        load_images(str(folder / "empty"), "train")


@pytest.mark.parametrize("first", [1, 3], ids=["grey-first", "rgb-first"])
def test_channels_follow_the_first_image(tmp_path, first):
    grey, rgb = pixels(channels=1), pixels(channels=3, seed=1)
    for name, array in (("0.png", grey), ("1.png", rgb)) if first == 1 else (("0.png", rgb), ("1.png", grey)):
        write(tmp_path / "a" / name, array)
    data = load_images(str(tmp_path), "train")
    assert data.images.shape == (2, first, 6, 6)
    if first == 1:
        assert np.array_equal(data.images[0, 0].numpy(), grey)
        luma = rgb @ np.array([0.299, 0.587, 0.114])
        assert np.abs(data.images[1, 0].numpy() - luma).max() <= 1
    else:
        assert np.array_equal(as_array(data, 0), rgb)
        assert all(np.array_equal(data.images[1, c].numpy(), grey) for c in range(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_asked_for_channels_overrule_the_files(tmp_path, channels):
    for name, stored in (("0.png", 1), ("1.png", 3)):
        write(tmp_path / "a" / name, pixels(channels=stored))
    assert load_images(str(tmp_path), "train", channels=channels).images.shape[1] == channels


def test_other_modes_are_read_as_rgb(tmp_path):
    rgb = Image.fromarray(pixels())
    rgb.convert("RGBA").save(tmp_path / "rgba.png")
    rgb.quantize(200).save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy(), pixels())
    assert read_image(tmp_path / "palette.png").shape == (3, 6, 6)


def test_sixteen_bit_grey_is_not_saturated(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    write(tmp_path / "deep.png", ramp)
    try:
        got = read_image(tmp_path / "deep.png", channels=1)[0].numpy()
    except InputError:
        return
    assert np.abs(got.astype(int) - (ramp // 256).astype(int)).max() <= 1


def test_oversized_image_is_named(tmp_path, monkeypatch):
    write(tmp_path / "large.png", pixels(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"large\.png"):
        read_image(tmp_path / "large.png")


def test_images_are_fitted_to_one_square_size(tmp_path):
    quarters = np.zeros((8, 16), dtype=np.uint8)
    quarters[:, 4:8], quarters[:, 8:12] = 100, 200  # the centre square holds 100 and 200, the sides nothing
    write(tmp_path / "a" / "0.png", quarters)
    write(tmp_path / "a" / "1.png", pixels(30, 20, channels=1))
    data = load_images(str(tmp_path), "train")
    assert data.images.shape == (2, 1, 8, 8)
    assert (data.images[0, 0, :, :4] == 100).all() and (data.images[0, 0, :, 4:] == 200).all()
    assert load_images(str(tmp_path), "train", size=5).images.shape == (2, 1, 5, 5)
    same = write(tmp_path / "same.png", pixels(7, 7))
    assert np.array_equal(read_image(same, 7).permute(1, 2, 0).numpy(), pixels(7, 7))  # nothing to resize


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    Image.fromarray(pixels(6, 6)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy(), np.rot90(pixels(6, 6), -1)
    )


def test_ranges_are_inverse_for_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(levels)
    assert values.dtype == torch.float32 and values[0] == -1 and values[-1] == 1
    torch.testing.assert_close(values.double(), torch.arange(256, dtype=torch.float64) / 127.5 - 1)
    assert torch.equal(to_uint8(values), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2000, generator=generator) * 2 - 1
    error = (to_model_range(to_uint8(values)) - values).abs()
    assert error.max() <= 1 / 255 + 1e-6
    ends = torch.tensor([-9.0, -1.001, 1.001, 9.0, float("inf"), -float("inf")])
    assert to_uint8(ends).tolist() == [0, 0, 255, 255, 255, 0]
