"""Models by Hugging Face id: the cache first, then what is needed of the hub, else one sentence."""

import os
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from acs_fast.config import InputError
from acs_fast.models.checkpoint import load_checkpoint, resolve
from tests.test_diffusers_checkpoint import WEIGHTS, assert_same_model, save_pipeline, small_dit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, in a folder of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub" / "models--some--dit"


def hub_refusal(source):
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        resolve(source)
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_existing_paths_are_used_as_they_are(cache, tmp_path):
    (tmp_path / "some" / "dit").mkdir(parents=True)
    assert str(resolve("some/dit")) == "some/dit"
    (tmp_path / "model.pt").touch()
    assert resolve(str(tmp_path / "model.pt")) == tmp_path / "model.pt"


@pytest.mark.parametrize(
    "source", ["some/dit.safetensors", "dit", "/some/dit", "a/b/c", "./some/dit", "some/dit.pt"]
)
def test_what_is_no_id_is_a_missing_checkpoint(cache, monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "there is no checkpoint" in hub_refusal(source)


def test_hub_that_cannot_be_reached_is_one_sentence_with_the_folder(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))
    text = hub_refusal("some/dit")
    assert f"neither in the cache {cache} nor can it be fetched (ConnectError" in text
    assert "give its folder" in text


def test_id_that_the_hub_does_not_allow_is_one_sentence(cache):
    assert "nor can it be fetched (HFValidationError" in hub_refusal("some/dit..x")


def test_offline_mode_is_one_sentence_with_the_folder(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = hub_refusal("some/dit")
    assert f"neither in the cache {cache} nor can it be fetched (OfflineModeIsEnabled" in text


def test_missing_package_is_one_sentence(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'acs-fast[diffusers]'" in hub_refusal("some/dit")


def fill(cache, build):
    """A snapshot in the hub's cache, as a download leaves it."""
    snapshot = cache / "snapshots" / ("0" * 40)
    build(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def unreachable(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no hub here")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)


def test_cached_model_needs_no_hub(cache, unreachable):
    model = small_dit()
    snapshot = fill(cache, lambda folder: save_pipeline(model, folder))
    assert resolve("some/dit") == resolve("some/dit", "vae") == snapshot
    assert_same_model(model, load_checkpoint(resolve("some/dit")))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_half_a_cached_model_is_not_used(cache, unreachable, part):
    snapshot = fill(cache, lambda folder: save_pipeline(small_dit(), folder))
    next((snapshot / part).glob("*.safetensors")).unlink()
    assert "ConnectionError: no hub here" in hub_refusal("some/dit")


def fake_hub(monkeypatch, folder, cache):
    """A hub whose only model is a folder; returns the names of the files that were fetched."""
    fetched = []

    def snapshot_download(source, local_files_only=False, allow_patterns=None):
        assert source == "some/dit"
        if local_files_only:
            raise FileNotFoundError("nothing cached")
        for name in allow_patterns:
            fetched.append(name)
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, cache / name)
        return str(cache)

    files = [SimpleNamespace(rfilename=str(p.relative_to(folder))) for p in folder.rglob("*") if p.is_file()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, source, timeout: SimpleNamespace(siblings=files)
    )
    return fetched


def test_only_what_is_needed_is_fetched(cache, tmp_path, monkeypatch):
    model, remote = small_dit(), tmp_path / "remote"
    save_pipeline(model, remote)
    state = load_file(remote / "vae" / WEIGHTS)
    (remote / "vae" / WEIGHTS).unlink()
    torch.save(state, remote / "vae" / "diffusion_pytorch_model.bin")
    (remote / "safety").mkdir()
    for name in (
        "README.md",
        "DiT-XL-2-256x256.pt",
        "safety/config.json",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/flax_model.msgpack",
    ):
        (remote / name).write_text("large")
    fetched = fake_hub(monkeypatch, remote, cache)
    assert_same_model(model, load_checkpoint(resolve("some/dit")))
    assert sorted(fetched) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]


def test_sharded_model_is_fetched_whole(cache, tmp_path, monkeypatch):
    model, remote = small_dit(), tmp_path / "remote"
    model.save_pretrained(remote, max_shard_size="40KB")
    fetched = fake_hub(monkeypatch, remote, cache)
    assert_same_model(model, load_checkpoint(resolve("some/dit")))
    assert sorted(fetched) == sorted(p.name for p in remote.iterdir())


def test_hub_model_without_a_dit_is_refused(cache, tmp_path, monkeypatch):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "remote")
    (tmp_path / "remote" / WEIGHTS).unlink()
    fake_hub(monkeypatch, tmp_path / "remote", cache)
    assert re.fullmatch("the Hugging Face model some/dit has no transformer .*", hub_refusal("some/dit"))


def test_the_command_line_refuses_a_model_that_is_nowhere_in_one_sentence(tmp_path) -> None:
    # in a process of its own, where nobody has imported diffusers before
    command = [
        sys.executable,
        "-m",
        "acs_fast.cli",
        "distill",
        "--model",
        "nobody/nothing",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert str(tmp_path / "hub") in done.stderr and "nobody/nothing" in done.stderr
    assert not (tmp_path / "run").exists()
