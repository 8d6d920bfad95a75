"""The two loaders side by side, and the stream: balance, determinism, resume, ranks."""

from __future__ import annotations

import io
import itertools
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acs_fast import environment, loader
from acs_fast.config import InputError
from acs_fast.discriminator import Trainer
from acs_fast.feeds import Ahead, Examples
from acs_fast.listing import Listing, list_images
from acs_fast.loader import Balanced, ordered, resolve_loader, stream, training_crop
from acs_fast.loader.pixels import batch, resized
from acs_fast.loader.request import Crop
from acs_fast.models.classifier import build_classifier

CPU = torch.device("cpu")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CUDA = torch.device("cuda")
MIXED = (("dali", CUDA), ("pil", CPU))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
has_dali = pytest.mark.skipif(loader.dali.why_not() is not None, reason="nvidia-dali is not installed")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """Smooth JPEGs and PNGs of several sizes, a grey and a turned one among them; 3 classes."""
    root, rng = tmp_path_factory.mktemp("drawn"), np.random.default_rng(0)
    for number in range(21):
        width, height = (40, 30) if number % 2 else (33, 57)
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        path = root / "train" / "abc"[number % 3] / f"{number:02d}.{'png' if number % 5 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if number == 7:
            exif[0x0112] = 6
        (image.convert("L") if number == 4 else image).save(path, quality=90, exif=exif)
    return list_images(str(root), "train")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    if not DATA.is_dir():
        pytest.skip("ImageWoof is not here")
    root = tmp_path_factory.mktemp("woof")
    with zipfile.ZipFile(DATA / "imagewoof-224.zip") as archive:
        files = [name for name in archive.namelist() if name.lower().endswith(".jpeg") and "train" in name]
        for name in files[:: len(files) // 60]:
            path = root / "train" / Path(name).parts[-2] / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    return list_images(str(root), "train")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Listing:
    """CIFAR-10 as PNGs."""
    if not DATA.is_dir():
        pytest.skip("CIFAR-10 is not here")
    root = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(DATA / "cifar10-webp.zip") as archive:
        files = [name for name in archive.namelist() if name.endswith(".webp") and "train/" in name]
        for name in files[:: len(files) // 60]:
            path = root / "train" / Path(name).parts[-2] / Path(name).with_suffix(".png").name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(archive.read(name))).save(path)
    return list_images(str(root), "train")


def in_order(
    listing: Listing, which: str, size: int = 24, channels: int = 3, device: torch.device = CPU
) -> torch.Tensor:
    settings = {"size": size, "channels": channels, "batch_size": 8, "loader": which, "device": device}
    return torch.cat([batch.images for batch in ordered(listing, range(len(listing.entries)), **settings)])


def streamed(listing: Listing, which: str = "pil", count: int = 4, **changed):
    settings = {"size": 24, "channels": 3, "batch_size": 7, "device": CPU, "seed": 3, "mirror": True}
    batches = stream(listing, loader=which, **{**settings, **changed})
    return list(itertools.islice(batches, count))


@has_dali
@pytest.mark.parametrize("which", ["drawn", "photographs", "small"])
def test_both_loaders_give_the_same_pixels_within_a_grey_level(which: str, request) -> None:
    listing = request.getfixturevalue(which)
    for size, channels in ((24, 3), (64, 3), (24, 1)):
        pair = [in_order(listing, name, size, channels) for name in ("dali", "pil")]
        assert (
            pair[0].shape == (len(listing.entries), channels, size, size) and pair[0].dtype == torch.float32
        )
        level = (pair[0] - pair[1]).abs().max() * 127.5
        assert level < 1.01, (size, channels, level)
        assert pair[0].std() > 0.2 and pair[0].abs().max() <= 1.0
    parts = [torch.cat([b.images for b in streamed(listing, name)]) for name in ("dali", "pil")]
    assert (parts[0] - parts[1]).abs().max() * 127.5 < 1.01


def test_the_plain_loader_reads_the_central_square(drawn: Listing) -> None:
    images = in_order(drawn, "pil", 30)
    for row, entry in enumerate(drawn.entries):
        if (entry.width, entry.height) == (40, 30) and entry.plain:
            expected = np.asarray(Image.open(entry.path).convert("RGB"))[:, 5:35]
            got = ((images[row] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.array_equal(got, expected)
    turned = next(e for e in drawn.entries if e.name.endswith("07.jpg"))
    assert (turned.width, turned.height, turned.plain) == (30, 40, False)


@has_dali
@needs_gpu
@pytest.mark.parametrize("which", ["drawn", "photographs"])
def test_a_gpu_decodes_what_pillow_does(which: str, request) -> None:
    listing = request.getfixturevalue(which)
    for size, channels in ((24, 3), (64, 3), (24, 1)):
        pair = [in_order(listing, name, size, channels, device) for name, device in MIXED]
        apart = (pair[0].cpu() - pair[1]).abs() * 127.5  # nvJPEG rounds and upsamples in its own way
        assert pair[0].is_cuda and apart.mean() < 1.0 and apart.quantile(0.999) < 8.0


@has_dali
@needs_gpu
def test_dali_decodes_while_a_training_step_is_captured(photographs: Listing) -> None:
    """The stream runs in its own thread and on its own CUDA stream while two batch shapes are captured."""
    feed = Ahead(
        Examples(b.images, b.labels)
        for b in stream(
            photographs, size=32, channels=3, batch_size=16, device=CUDA, seed=0, mirror=True, loader="dali"
        )
    )
    network = build_classifier("convnet-3", 3, 10, 32).to(CUDA)
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    with closing(feed):
        next(feed)  # DALI is at work
        for count in (8, 16):
            batches = (Examples(x[:count], y[:count]) for x, y, _ in feed)
            losses = list(Trainer(network).learn(initial, batches, steps=20, lr=1e-3))
            assert torch.stack(losses).isfinite().all()
        after = [next(feed) for _ in range(3)]
    for step, (images, labels, _) in enumerate(after, start=41):
        expected = streamed(photographs, "dali", 1, size=32, batch_size=16, seed=0, device=CUDA, step=step)[0]
        assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)


@pytest.mark.parametrize("width,height,size", [(90, 70, 32), (33, 57, 24), (20, 31, 64), (24, 24, 24)])
def test_boxes_are_resized_as_pillow_resizes(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    expected = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    for channels in (3, 1):
        got = resized(torch.from_numpy(pixels[..., :channels].copy()), size)
        assert got.dtype == torch.uint8 and got.shape == (channels, size, size)
        wanted = torch.from_numpy(np.array(expected)[..., :channels]).permute(2, 0, 1)
        assert (got.int() - wanted.int()).abs().max() <= 1


def test_a_batch_is_mirrored_image_by_image_and_normalised() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    whole = Crop(0, 0, 4, 4, False)
    got = batch(list(images), [whole, whole._replace(flip=True)], CPU)
    expected = images.float() / 127.5 - 1.0
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1].flip(-1))


@pytest.mark.parametrize("which", ["pil", pytest.param("dali", marks=has_dali)])
def test_a_stream_goes_on_where_another_ended(drawn: Listing, which: str) -> None:
    whole, rest = streamed(drawn, which, 5), streamed(drawn, which, 2, step=3)
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.images, other.images)
    again = streamed(drawn, which, 5, seed=4)
    assert any(not torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(6, 2), (7, 3), (2, 3)])
def test_ranks_share_one_global_batch(drawn: Listing, batch_size: int, num_ranks: int) -> None:
    """Uneven parts, and one that is empty."""
    whole = streamed(drawn, count=2, batch_size=batch_size)
    settings = {"count": 2, "batch_size": batch_size, "num_ranks": num_ranks}
    parts = [streamed(drawn, rank=rank, **settings) for rank in range(num_ranks)]
    for step in range(2):
        assert torch.equal(torch.cat([part[step].images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part[step].labels for part in parts]), whole[step].labels)
        sizes = [len(part[step].images) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_every_round_of_a_stream_has_every_class_and_every_image_comes() -> None:
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 3)
    draw = Balanced(labels, 7)
    rows = torch.tensor([draw(place) for place in range(3 * 30)])
    assert all(sorted(part.tolist()) == [0, 1, 2] for part in labels[rows].view(-1, 3))
    for y, count in enumerate((5, 2, 3)):
        own = rows[labels[rows] == y]
        assert all(len(set(part.tolist())) == count for part in own.split(count))


def test_training_crops_lie_inside_and_vary(drawn: Listing) -> None:
    entry = drawn.entries[0]
    crops = [training_crop(entry, 1, place, True) for place in range(300)]
    for left, top, width, height, _ in crops:
        assert 0 <= left <= entry.width - width and 0 <= top <= entry.height - height
        assert 0.45 < width * height / (entry.width * entry.height) <= 1 and 0.7 < width / height < 1.45
    assert 100 < sum(crop.flip for crop in crops) < 200 and len(set(crops)) > 200
    assert not any(training_crop(entry, 1, place, False).flip for place in range(50))


def test_an_image_that_changed_since_it_was_listed_is_named(drawn: Listing, tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "train" / "a" / "0.png")
    listing = list_images(str(tmp_path), "train")
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"gone")
    with pytest.raises(InputError, match=r"a/0.png"):
        in_order(listing, "pil")
    if loader.dali.why_not() is None:
        with pytest.raises(InputError, match=r"DALI cannot decode one of a/0.png"):
            in_order(listing, "dali")


def test_the_choice_is_named_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.dali, "why_not", lambda: "nvidia-dali is not installed")
    assert resolve_loader("auto") == resolve_loader("pil") == "pil"
    with pytest.raises(
        InputError, match=r"--loader dali: nvidia-dali is not installed; pip install 'acs-fast"
    ):
        resolve_loader("dali")
    monkeypatch.setattr(loader.dali, "why_not", lambda: None)
    assert resolve_loader("auto") == "dali"


def test_the_report_says_which_loader_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, line in (
        ("nvidia-dali-cuda130", "loader: dali 2.4.0\n"),
        ("nvidia-dali-cuda120", "loader: dali 2.4.0\n"),
        ("other", "loader: pil (nvidia-dali is not installed)\n"),
    ):
        monkeypatch.setattr(
            environment, "version", lambda name, own=package: "2.4.0" if name == own else None
        )
        assert line in environment.report()
