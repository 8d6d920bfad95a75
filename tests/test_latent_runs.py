"""Latent models end to end: a DiT of two blocks with its VAE, all guidance spaces, bad input."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from acs_fast import DistillConfig, InputError, distill, generator
from acs_fast.config import resolve
from acs_fast.engine import StepEngine
from acs_fast.manifest import read_rows
from acs_fast.models import classifier
from acs_fast.models.checkpoint import load_checkpoint, save_checkpoint
from tests.runs import contents, refused, stored
from tests.test_sampler import randomise
from tests.test_vae import small_kl, small_tiny

SIZE, FACTOR, K = 8, 4, 7
CLASSES = ["1", "4"]
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)


def save_pipeline(folder: Path, num_classes: int) -> None:
    """A DiT of random weights as `DiTPipeline` is saved: transformer, vae, scheduler."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=SIZE, num_embeds_ada_norm=num_classes,
    )  # fmt: skip
    randomise(transformer, 0.2, seed=1)
    for block in transformer.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    scheduler = DDIMScheduler(beta_end=0.02, beta_schedule="linear")
    pipeline = DiTPipeline(transformer=transformer, vae=small_kl(scaling_factor=4.0), scheduler=scheduler)
    pipeline.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every kind of model and VAE; nothing in it is written to."""
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "dit", K)
    small_tiny().save_pretrained(folder / "tiny")
    small_kl(scaling_factor=1.0).save_pretrained(folder / "other-vae")
    model = load_checkpoint(folder / "dit")
    save_checkpoint(model, folder / "dit.safetensors", torch.float32)
    torch.save(model.state_dict(), folder / "official.pt")
    return folder


@pytest.fixture
def make(models: Path, tmp_path: Path):
    """The settings of a run of seconds: 2 classes, 2 images of each, 2 curricula, 4 steps."""

    def settings(**changes: Any) -> dict[str, Any]:
        defaults = {
            "out": str(tmp_path / "run"),
            "model": str(models / "dit"),
            "tiny_vae": str(models / "tiny"),
            "classes": ",".join(CLASSES),
            "ipc": 2,
            "keep_latents": True,
            "num_curricula": 2,
            "num_sampling_steps": 4,
            "guidance_window": [0.0, 1.0],
            "discriminator": "convnet-2",
            "discriminator_steps": 3,
            "sampler": "ddpm",
        }
        return {**defaults, **changes}

    return settings


def run(settings: dict[str, Any]) -> Path:
    return distill(resolve(DistillConfig, settings))


def sentence(settings: dict[str, Any], tmp_path: Path, capsys) -> str:
    """What the command line says of these settings, and nothing else."""
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return refused(["distill", "--config", str(tmp_path / "settings.json")], capsys)


def images(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.startswith("images/")}


def samples(out: Path, curriculum: int) -> torch.Tensor:
    """A curriculum's latents, one batch."""
    return load_file(stored(out, curriculum))["samples"]


def assert_whole(out: Path) -> None:
    """Every image is there, in colour and decoded, and the manifest says so of each."""
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    keys = [(row["class"], row["index"], row["curriculum"]) for row in rows]
    assert keys == [("1", 0, 1), ("4", 0, 1), ("1", 1, 2), ("4", 1, 2)]
    for row in rows:
        path = out / "images" / row["class"] / f"{row['index']}.png"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (FACTOR * SIZE, FACTOR * SIZE))
            low, high = zip(*image.getextrema(), strict=True)
            assert min(high) > max(low)  # it is no even plane
        assert (row["discriminator_loss"] is not None) == (row["curriculum"] == 2)
    assert len({row["sha256"] for row in rows}) == len(rows) == len(images(out))


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("space", ["latent", "pixel", "pixel-tiny"])
def test_a_run_is_whole_repeats_and_continues(make, tmp_path: Path, space, jacobian) -> None:
    change = {"guidance_space": space, "jacobian": jacobian}
    out = run(make(**change))
    assert_whole(out)
    whole = contents(out)
    assert samples(out, 1).shape == (2, 4, SIZE, SIZE)
    again = contents(run(make(out=str(tmp_path / "again"), **change)))
    assert again.keys() == whole.keys()
    assert {name for name in whole if whole[name] != again[name]} == {"config.json"}  # it names its folder
    (out / "images" / "4" / "1.png").unlink()
    (out / "images" / "1" / "0.png").write_bytes(b"torn")
    run(make(**change))
    assert contents(out) == whole


def test_space_and_jacobian_change_the_guided_curriculum_alone(make, tmp_path: Path) -> None:
    changes = [{}, {"jacobian": "full"}, {"guidance_scale": 0.0}]
    changes += [{"guidance_space": space} for space in ("pixel", "pixel-tiny")]
    outs = [run(make(out=str(tmp_path / str(number)), **change)) for number, change in enumerate(changes)]
    first = [samples(out, 1) for out in outs]
    for x in first[1:]:  # the full Jacobian keeps its weights unpacked, which may round otherwise
        torch.testing.assert_close(x, first[0], rtol=0, atol=1e-5 * x.abs().max().item())
    second = [samples(out, 2) for out in outs]
    for number, x in enumerate(second):
        assert all((x - y).abs().max() > 1e-3 * x.abs().max() for y in second[:number])


def test_latents_are_not_clamped_unless_it_is_said(make, tmp_path: Path) -> None:
    outs = [
        run(make(out=str(tmp_path / str(clip)), clip_denoised=clip, num_curricula=1))
        for clip in (None, False, True)
    ]
    default, free, clamped = (samples(out, 1) for out in outs)
    assert torch.equal(default, free) and clamped.abs().max() <= 1.0 < default.abs().max()


def test_another_vae_decodes_the_same_latents(make, models: Path, tmp_path: Path) -> None:
    own = run(make())
    other = run(make(out=str(tmp_path / "other"), vae=str(models / "other-vae")))
    assert_whole(other)
    assert torch.equal(samples(own, 2), samples(other, 2))
    assert images(own).keys() == images(other).keys()
    assert all(images(own)[name] != images(other)[name] for name in images(own))


def test_files_without_a_vae_take_the_one_they_are_given(make, models: Path, tmp_path: Path) -> None:
    vae = str(models / "dit")  # a pipeline's folder stands for the VAE in it
    ours = run(make(out=str(tmp_path / "ours"), model=str(models / "dit.safetensors"), vae=vae))
    assert_whole(ours)
    assert images(ours) == images(run(make()))
    official = run(make(out=str(tmp_path / "official"), model=str(models / "official.pt"), vae=vae))
    assert_whole(official)
    # the official format has neither the number of heads nor diffusers' constants
    assert images(official).keys() == images(ours).keys() and images(official) != images(ours)


def test_without_a_vae_and_without_the_hub_one_sentence_says_so(
    make, models: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def unreachable(*args: Any, **keywords: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for name in ("official.pt", "dit.safetensors"):
        text = sentence(make(model=str(models / name)), tmp_path, capsys)
        assert "stabilityai/sd-vae-ft-mse" in text and "no route to host" in text
    assert not (tmp_path / "run").exists()


def test_nan_in_the_weights_is_refused_before_anything_is_written(
    make, models, tmp_path: Path, capsys
) -> None:
    shutil.copytree(models / "dit", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / WEIGHTS)
    tensors["transformer_blocks.1.attn1.to_k.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "broken" / WEIGHTS)
    text = sentence(make(model=str(tmp_path / "broken")), tmp_path, capsys)
    assert "transformer_blocks.1.attn1.to_k.weight holds NaN" in text
    assert not (tmp_path / "run").exists()


def test_nan_in_the_first_latents_names_class_index_and_step(make, models, tmp_path: Path, capsys) -> None:
    shutil.copytree(models / "dit", tmp_path / "wild")
    tensors = load_file(tmp_path / "wild" / WEIGHTS)
    label = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    for block in range(2):
        tensors[label.format(block)][4] = 1e38  # finite, of class 4 alone
    save_file(tensors, tmp_path / "wild" / WEIGHTS)
    text = sentence(make(model=str(tmp_path / "wild")), tmp_path, capsys)
    assert "class 4 index 0 of curriculum 1 is not finite at step 3; " in text
    assert not images(tmp_path / "run")


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_nan_in_later_latents_keeps_what_is_written(make, tmp_path: Path, capsys, space) -> None:
    text = sentence(make(guidance_scale=1e38, guidance_space=space), tmp_path, capsys)
    assert re.search(r"class 1 index 1 of curriculum 2 is not finite at step \d; ", text), text
    out = tmp_path / "run"
    assert sorted(images(out)) == ["images/1/0.png", "images/4/0.png"]
    assert list(read_rows(out)) == [("1", 0), ("4", 0)]
    calm = run(make(out=str(tmp_path / "calm"), guidance_space=space))
    assert all(images(calm)[name] == data for name, data in images(out).items())


def test_imagenet_classes_go_by_wnid_or_number(make, tmp_path: Path, capsys) -> None:
    save_pipeline(tmp_path / "imagenet", 1000)
    model = str(tmp_path / "imagenet")
    text = sentence(make(model=model, classes="n01440764,n99999999"), tmp_path, capsys)
    assert "the model has no class 'n99999999'" in text and not (tmp_path / "run").exists()
    out = run(make(model=model, classes="n01443537,4"))
    record = json.loads((out / "config.json").read_text())
    assert record["class_labels"] == [1, 4] and record["classes"][0] == "n01443537"
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(record["classes"])
    assert all(re.fullmatch(r"n\d{8}", name) for name in record["classes"])


def test_a_batch_beyond_the_memory_is_refused_with_one_that_fits(
    make, tmp_path: Path, monkeypatch, capsys
) -> None:
    free = 1 << 10
    monkeypatch.setattr(generator, "available_memory", lambda device: free)
    text = sentence(make(), tmp_path, capsys)
    assert "a batch of 2 images does not fit into the memory; " in text and "--batch-size" not in text
    assert not images(tmp_path / "run")
    advised: dict[int, int] = {}  # batch sizes, and the least memory that each was advised for
    while free < 1 << 24:
        try:
            run(make(out=str(tmp_path / "fits"), batch_size=4, ipc=8))
            break
        except InputError as error:
            text = str(error)
        assert text.startswith("a batch of 4 images does not fit into the memory; ") and "\n" not in text
        if match := re.search(r"about (\d+) would: --batch-size (\d+)$", text):
            assert match[1] == match[2] and int(match[1]) < 4
            advised.setdefault(int(match[1]), free)
        else:
            assert not advised  # none fits into less than one does
        free = free * 5 // 4
    assert free < 1 << 24 and list(advised) == sorted(advised) and len(advised) > 1
    for batch_size, least in advised.items():
        free = least
        run(make(out=str(tmp_path / str(batch_size)), batch_size=batch_size, ipc=8))


def test_memory_that_runs_out_while_sampling_is_one_sentence(
    make, tmp_path: Path, monkeypatch, capsys
) -> None:
    denoise, calls = StepEngine.denoise, []

    def exhausted(engine: StepEngine, *args: Any) -> Any:
        calls.append(engine)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return denoise(engine, *args)

    monkeypatch.setattr(StepEngine, "denoise", exhausted)
    text = sentence(make(ipc=4, batch_size=2), tmp_path, capsys)
    assert "a batch of 2 images does not fit into the memory; about 1 would: --batch-size 1" in text
    monkeypatch.undo()
    out = tmp_path / "run"
    assert len(images(out)) == 4  # the first two batches


def test_a_run_is_not_continued_with_another_vae(make, tmp_path: Path, capsys) -> None:
    settings = make()
    out = run(settings)
    record = json.loads((out / "config.json").read_text())
    assert len(record["vae_sha256"]) == 64 and record["seen_by_sha256"] is None
    (out / "config.json").write_text(json.dumps({**record, "vae_sha256": "0" * 64}))
    assert f"vae_sha256 {'0' * 64} there, {record['vae_sha256']} here" in sentence(settings, tmp_path, capsys)
