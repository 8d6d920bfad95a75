"""Unusable input gets one sentence and exit code 2, and nothing already written is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acs_fast import InputError, distill
from acs_fast.config import DistillConfig, EvaluateConfig, TrainConfig, resolve
from acs_fast.data import ASSETS
from acs_fast.models.checkpoint import save_checkpoint
from acs_fast.models.dit import DiT, DiTConfig
from tests.runs import contents, refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "nope"], "there is no preset 'nope'; use digits"),
        (["--ipc", "3", "--num-curricula", "4"], "--ipc 3 is smaller than --num-curricula 4"),
        (["--ipc", "0"], "--ipc 0 is smaller"),
        (["--num-curricula", "0"], "--num-curricula is 0"),
        (["--num-sampling-steps", "1"], "--num-sampling-steps is 1"),
        (["--guidance-window", "0.7", "0.1"], "--guidance-window 0.7 0.1"),
        (["--guidance-scale", "-1"], "--guidance-scale is -1"),
        (["--eta", "2"], "--eta is 2"),
        (["--seed", "-1"], "--seed is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", "absent.safetensors"], "there is no checkpoint absent.safetensors"),
        (["--discriminator", "vgg"], "there is no network 'vgg'"),
        (["--discriminator", "convnet-4"], "acs-fast: convnet-4 "),
        (["--classes", "absent.txt"], "class list absent.txt cannot be read"),
        (["--config", "absent.json"], "configuration absent.json cannot be read"),
        (["--real", "absent", "--objective", "learnability"], "there is no image folder absent"),
        (["--baselines", "plain"], "--baselines are evaluated, so they need --evaluate"),
        (["--evaluate", "--baselines", "best"], "there is no baseline 'best'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_distill_refuses(flags: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--num-sampling-steps", "2", "--discriminator-steps", "1", "--ipc", "2", "--num-curricula", "2"]
    assert message in refused(["distill", *short, *flags], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(tmp_path: Path, capsys) -> None:
    assert "--device cuda" in refused(["distill", "--device", "cuda", "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["..", "../elsewhere", "a/b", "/absolute", "a\\b"])
def test_class_names_cannot_leave_the_output_folder(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "classes.txt").write_text(f"{name}\n")
    flags = ["--classes", str(tmp_path / "classes.txt"), "--out", str(tmp_path / "run")]
    assert "is not a plain folder name" in refused(["distill", *flags], capsys)
    model = DiT(DiTConfig(8, 2, 1, 16, 1, 2, 1, True, classes=(name,)))
    save_checkpoint(model, tmp_path / "evil.safetensors")
    flags = ["--model", str(tmp_path / "evil.safetensors"), "--out", str(tmp_path / "run")]
    assert "is not a plain folder name" in refused(["distill", *flags], capsys)
    assert not (tmp_path / "run").exists()


def test_a_class_that_the_model_does_not_know(tmp_path: Path, capsys) -> None:
    (tmp_path / "classes.txt").write_text("3\nn02096294\n")
    flags = ["--classes", str(tmp_path / "classes.txt"), "--out", str(tmp_path / "run")]
    assert "the model has no class 'n02096294'; known: 0 1 2" in refused(["distill", *flags], capsys)


def test_a_checkpoint_of_another_shape_names_the_first_mismatch(tmp_path: Path, capsys) -> None:
    bundled = ASSETS / "digits-dit.safetensors"
    tensors = load_file(bundled)
    tensors["blocks.1.attn.qkv.weight"] = tensors["blocks.1.attn.qkv.weight"][:-1].clone()
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"][:-1].clone()
    from safetensors import safe_open

    with safe_open(bundled, framework="pt") as file:
        save_file(tensors, tmp_path / "model.safetensors", metadata=file.metadata())
    error = refused(["distill", "--model", str(tmp_path / "model.safetensors")], capsys)
    assert "blocks.1.attn.qkv.weight has shape [383, 128]" in error and "[384, 128]" in error


def test_a_truncated_checkpoint(tmp_path: Path, capsys) -> None:
    data = (ASSETS / "digits-dit.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "is damaged" in refused(["distill", "--model", str(tmp_path / "model.safetensors")], capsys)


def test_a_latent_model_without_its_vae_is_refused_before_anything_is_written(tmp_path: Path, capsys) -> None:
    save_checkpoint(DiT(DiTConfig(8, 2, 4, 16, 1, 2, 2)), tmp_path / "latent.safetensors")
    flags = ["--model", str(tmp_path / "latent.safetensors"), "--out", str(tmp_path / "run")]
    assert str(tmp_path / "vae") in refused(["distill", *flags, "--vae", str(tmp_path / "vae")], capsys)
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_and_the_run_kept(tiny, tmp_path: Path, capsys) -> None:
    out = distill(tiny())
    before = contents(out)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny(cfg_scale=2.5))))
    error = refused(["distill", "--config", str(settings)], capsys)
    assert "another configuration" in error and "2.5 here" in error and "--overwrite" in error
    assert contents(out) == before


def test_evaluate_refuses(tiny, tmp_path: Path, capsys) -> None:
    out = distill(tiny())
    images = str(out / "images")
    assert "there is no folder" in refused(["evaluate", str(tmp_path / "absent")], capsys)
    assert "name the real images" in refused(["evaluate", images], capsys)
    plain = ["evaluate", images, "--real", "digits", "--baselines", "plain"]
    assert "--baselines plain" in refused(plain, capsys)
    assert "only 4" in refused(["evaluate", str(out), "--ipc", "5"], capsys)
    assert "there is no baseline 'best'" in refused(["evaluate", str(out), "--baselines", "best"], capsys)
    assert "resnet-18 needs images of 16 px" in refused(
        ["evaluate", str(out), "--network", "resnet-18"], capsys
    )
    (out / "images" / "8" / "2.png").write_bytes(b"\x89PNG not really")
    assert "8/2.png cannot be read" in refused(["evaluate", str(out)], capsys)
    (out / "images" / "8" / "2.png").unlink()
    assert "is unfinished: 7 of 8 images" in refused(["evaluate", str(out)], capsys)


def test_train_refuses(tmp_path: Path, capsys) -> None:
    assert "--patch-size 3" in refused(["train", "--patch-size", "3", "--out", str(tmp_path)], capsys)
    assert "--hidden-size 30" in refused(["train", "--hidden-size", "30", "--out", str(tmp_path)], capsys)
    assert "there is no image folder" in refused(
        ["train", "--real", "absent", "--out", str(tmp_path)], capsys
    )


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ('{"ipx": 3}', "json", "'ipx' is no setting"),
        ('{"ipc": "ten"}', "json", "ipc is 'ten', it must be int"),
        ('{"ipc": true}', "json", "ipc is True, it must be int"),
        ('{"sampler": "euler"}', "json", "sampler is 'euler', it must be one of ddpm, ddim"),
        ('{"guidance_window": [0.1]}', "json", "guidance_window is"),
        ('{"preset": ["digits"]}', "json", "preset is ['digits'], it must be str"),
        ("[1, 2]", "json", "holds no settings"),
        ('{"config": [1]}', "json", "holds no settings"),
        ("{", "json", "cannot be read"),
        ("ipc: [", "yaml", "is not valid YAML"),
        ("", "yaml", "holds no settings"),
    ],
)
def test_configuration_files(text: str, suffix: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / f"settings.{suffix}"
    path.write_text(text)
    assert message in refused(["distill", "--config", str(path), "--out", str(tmp_path / "run")], capsys)


def test_file_preset_and_flags_overrule_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("ipc: 20\nguidance_scale: 1\nguidance_window: [0, 1]\n")
    config = resolve(DistillConfig, {"ipc": 30}, str(tmp_path / "a.yaml"))
    assert (config.ipc, config.guidance_scale, config.guidance_window) == (30, 1.0, (0.0, 1.0))
    assert resolve(EvaluateConfig, {}).protocol == ()
    assert resolve(EvaluateConfig, {"preset": "digits"}).protocol == ("hard-adamw",)
    assert resolve(TrainConfig, {"iterations": 3}).iterations == 3
    with pytest.raises(InputError, match="repeats"):
        resolve(EvaluateConfig, {"repeats": 0})


@pytest.mark.parametrize("cls", [DistillConfig, TrainConfig])
def test_a_configuration_in_python_is_the_bare_command(cls: type) -> None:
    assert resolve(cls, {}) == cls()
    assert resolve(cls, {"preset": "digits", "seed": 5}) == cls(seed=5)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (DistillConfig, {"objective": "adverserial"}, "one of adversarial, nonsaturating, learnability"),
        (DistillConfig, {"preset": "nope"}, "there is no preset 'nope'; use digits"),
        (DistillConfig, {"omega": float("nan")}, "--omega is nan, it must be finite"),
        (DistillConfig, {"discriminator_steps": 0}, "--discriminator-steps is 0, it must be at least 1"),
        (
            EvaluateConfig,
            {"protocol": ("softer",)},
            "there is no protocol 'softer'; use hard-sgd, hard-adamw, soft",
        ),
        (EvaluateConfig, {"network": "vgg"}, r"network is 'vgg', it must be a tuple: \('vgg',\)"),
        (EvaluateConfig, {"seed": -1}, "--seed is -1, it must be 0 to 2"),
        (EvaluateConfig, {"epochs": 0}, "--epochs is 0, it must be at least 1"),
        (TrainConfig, {"device": "gpu"}, "--device is 'gpu', it must be one of auto, cpu, cuda"),
        (TrainConfig, {"batch_size": 0}, "--batch-size is 0"),
        (TrainConfig, {"patch_size": 0}, "--patch-size is 0"),
        (TrainConfig, {"num_heads": 0}, "--num-heads is 0"),
        (TrainConfig, {"depth": 0}, "--depth is 0"),
        (TrainConfig, {"hidden_size": 0}, "--hidden-size is 0"),
        (TrainConfig, {"iterations": 0}, "--iterations is 0"),
        (TrainConfig, {"lr": 0.0}, "--lr is 0.0, it must be positive"),
        (TrainConfig, {"lr": float("inf")}, "--lr is inf, it must be finite"),
        (TrainConfig, {"weight_decay": -0.1}, "--weight-decay is -0.1"),
        (TrainConfig, {"class_dropout_prob": 1.0}, "--class-dropout-prob is 1.0"),
        (TrainConfig, {"ema_decay": 1.0}, "--ema-decay is 1.0"),
        (TrainConfig, {"seed": 2**63}, "it must be 0 to 2"),
    ],
    ids=str,
)
def test_configurations_in_python_are_checked(cls: type, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cls(**settings)
