"""`acs-fast encode` from outside: what it makes, that `distill` uses it, kills, and what it refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acs_fast import latents
from acs_fast.cli import main
from acs_fast.latents import write_cache
from acs_fast.listing import list_images
from acs_fast.models import classifier
from acs_fast.models.vae import VAE, load_vae
from tests.runs import contents, refused
from tests.test_latent_runs import FACTOR, SIZE, K, save_pipeline
from tests.test_vae import small_kl

EDGE = FACTOR * SIZE
CPU = torch.device("cpu")
CLASSES = ("1", "4")
NAMES = ["--classes", ",".join(CLASSES)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of seven classes, another VAE and five images of each of two classes; nobody writes there."""
    folder = tmp_path_factory.mktemp("sources")
    save_pipeline(folder / "dit", K)
    small_kl(scaling_factor=1.0).save_pretrained(folder / "vae")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "real" / "train" / name).mkdir(parents=True)
        for number in range(5):
            pixels = generator.integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "real" / "train" / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)
    monkeypatch.setattr(latents, "SHARD", 2)  # three shards a class


def command(sources: Path, out: Path, *more: str) -> list[str]:
    argv = ["encode", "--real", str(sources / "real"), "--model", str(sources / "dit"), "--out", str(out)]
    return [*argv, *NAMES, "--loader", "pil", "--batch-size", "2", *more]


def test_the_cache_is_of_the_models_own_vae_and_size(tmp_path, sources, capsys):
    assert main(command(sources, tmp_path / "cache")) == 0
    assert capsys.readouterr().out.splitlines()[-1].strip() == str(tmp_path / "cache")
    listing = list_images(str(sources / "real"), "train", CLASSES)
    vae = load_vae(str(sources / "dit"), False, CPU, torch.float32, encoder=True)
    cache = write_cache(tmp_path / "cache", listing, vae, EDGE, loader="pil", batch_size=4)  # makes none
    assert cache is not None
    assert cache.classes == CLASSES and cache.labels.tolist() == [0] * 5 + [1] * 5
    images = np.stack([np.asarray(Image.open(entry.path)) for entry in listing.entries])
    expected = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    found = cache.take(torch.arange(10), torch.zeros(10).bool())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_distill_reuses_it(tmp_path, sources, monkeypatch):
    cache = tmp_path / "cache"
    assert main(command(sources, cache)) == 0
    before = contents(cache)
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("encoded again"))
    argv = ["distill", "--out", str(tmp_path / "run"), "--cache", str(cache), *NAMES, "--loader", "pil"]
    argv += ["--model", str(sources / "dit"), "--real", str(sources / "real"), "--ipc", "2"]
    argv += ["--objective", "density_ratio", "--num-curricula", "2", "--num-sampling-steps", "3"]
    assert main([*argv, "--discriminator-steps", "2", "--real-steps", "2", "--batch-size", "3"]) == 0
    assert contents(cache) == before and not (tmp_path / "run" / "latents").exists()


KILLED = """
import os, signal, sys
from acs_fast import latents
from acs_fast.cli import main
from acs_fast.models.vae import VAE
latents.SHARD, left, encode = 2, int(sys.argv[1]), VAE.encode
def counted(vae, images):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(vae, images)
VAE.encode = counted
main(sys.argv[2:])
"""


def test_after_sigkill_it_continues_to_the_same_bytes(tmp_path, sources, capsys):
    assert main(command(sources, tmp_path / "whole")) == 0
    argv = [sys.executable, "-c", KILLED, "5", *command(sources, tmp_path / "cache")]
    killed = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, left = contents(tmp_path / "whole"), contents(tmp_path / "cache")
    finished = {name for name in left if name.endswith(".safetensors")}
    assert finished == {"1-0000.safetensors", "1-0001.safetensors"}  # four calls for two shards
    assert all(whole[name] == data for name, data in left.items())
    assert main(command(sources, tmp_path / "cache")) == 0
    assert contents(tmp_path / "cache") == whole


def test_ranks_share_the_work(tmp_path, sources, capsys):
    assert main(command(sources, tmp_path / "whole")) == 0
    for rank, ending in ((1, "other ranks have not ended yet"), (0, str(tmp_path / "cache"))):
        share = ["--rank", str(rank), "--num-ranks", "2"]
        assert main(command(sources, tmp_path / "cache", *share)) == 0
        assert capsys.readouterr().out.rstrip().endswith(ending)
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_left_out_files_are_named(tmp_path, sources, capsys):
    real = tmp_path / "real" / "train"
    for name in CLASSES:
        (real / name).mkdir(parents=True)
        Image.new("RGB", (EDGE, EDGE)).save(real / name / "image.png")
    (real / "4" / "notes.txt").write_text("no image")
    assert main(command(sources, tmp_path / "cache", "--real", str(tmp_path / "real"))) == 0
    text = capsys.readouterr().out
    assert "2 images; 1 skipped (" in text and "4/notes.txt" in text
    assert f"{tmp_path / 'cache'}: 2 images encoded, " in text and text.count(" images/s\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_how_to_continue(tmp_path, sources, capsys, monkeypatch, code):
    real = os.replace

    def full(source, target):
        if str(target).endswith("4-0000.safetensors"):
            raise OSError(code, os.strerror(code))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        text = refused(command(sources, tmp_path / "cache"), capsys)
    assert f"{tmp_path / 'cache' / '4-0000.safetensors'}: {os.strerror(code)}" in text
    assert "run the same command again to continue" in text
    assert main(command(sources, tmp_path / "cache")) == 0
    assert main(command(sources, tmp_path / "whole")) == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


REFUSED = {
    "pixels": (["--model", "digits"], "--model digits samples pixels"),
    "digits": (["--real", "digits"], "--real digits: the digits are grey and 8x8"),
    "no-images": (["--real", "nowhere"], "there is no image folder nowhere"),
    "no-real": (["--real", ""], "encode needs the images' folder: --real FOLDER"),
    "no-model": (["--model", "nowhere"], "nowhere"),
    "empty-class": (["--classes", "1,5"], "is missing or holds no images; known: 1 4"),
    "unknown-class": (["--classes", "1,9"], "the model has no class '9'"),
    "rank": (["--rank", "2", "--num-ranks", "2"], "--rank is 2, it must be 0 to --num-ranks - 1"),
    "batch-size": (["--batch-size", "0"], "--batch-size is 0, it must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_input_is_refused_and_nothing_is_written(tmp_path, sources, capsys, case):
    more, message = REFUSED[case]
    assert message in refused(command(sources, tmp_path / "cache", *more), capsys)
    assert not (tmp_path / "cache").exists()


def test_another_vae_is_refused(tmp_path, sources, capsys):
    assert main(command(sources, tmp_path / "cache")) == 0
    text = refused(command(sources, tmp_path / "cache", "--vae", str(sources / "vae")), capsys)
    assert "is of another VAE; give another folder" in text


def test_both_loaders_make_the_same_latents_but_for_rounding(tmp_path, sources):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for loader in ("pil", "dali"):
        assert main(command(sources, tmp_path / loader, "--loader", loader)) == 0
    files = sorted((tmp_path / "pil").glob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        found = load_file(tmp_path / "dali" / file.name)["latents"]
        torch.testing.assert_close(found, load_file(file)["latents"], rtol=2e-3, atol=2e-3)
