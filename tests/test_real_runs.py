"""Runs on a folder of real images, end to end: objectives, loaders, the record, repulsion, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acs_fast import DistillConfig, EvaluateConfig, InputError, distill, evaluate, steering
from acs_fast.config import resolve
from acs_fast.distributed import Ranks
from acs_fast.judge import by_curriculum
from acs_fast.loader import dali
from acs_fast.models import classifier
from acs_fast.models.checkpoint import save_checkpoint
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.writer import read_tensors
from tests.runs import contents, refused, stored
from tests.test_sampler import randomise

CLASSES = ("ant", "bee", "cow")
LOADERS = [
    "pil",
    pytest.param("dali", marks=pytest.mark.skipif(dali.why_not() is not None, reason="no DALI")),
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`real/{train,val}/<class>` of JPEGs and PNGs, with files that are no image, and a random pixel DiT."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                pixels = rng.integers(0, 80, (20, 24, 3)) + np.eye(3, dtype=int)[label] * 150
                path = root / "real" / split / name / f"{number}.{('jpg', 'png')[number % 2]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (root / "real" / "train" / "ant" / "cut.jpg").write_bytes(b"\xff\xd8 no more")
    shape = DiTConfig(
        16, 4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=True,
        classes=CLASSES,
    )  # fmt: skip
    save_checkpoint(randomise(DiT(shape), 0.2, seed=3), root / "dit.safetensors", torch.float32)
    return root


@pytest.fixture
def make(sources: Path, tmp_path: Path):
    """The configuration of a run of seconds: 3 classes, 3 images of each, 3 curricula."""

    def settings(**changes: object) -> DistillConfig:
        defaults = {
            "out": str(tmp_path / "run"),
            "model": str(sources / "dit.safetensors"),
            "real": str(sources / "real"),
            "ipc": 3,
            "num_curricula": 3,
            "num_sampling_steps": 3,
            "guidance_window": [0.0, 1.0],
            "discriminator": "convnet-2",
            "discriminator_steps": 5,
            "discriminator_batch_size": 8,
            "real_steps": 20,
            "keep_latents": True,
        }
        return resolve(DistillConfig, {**defaults, **changes})

    return settings


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("objective", ["adversarial", "learnability", "density_ratio"])
def test_distill_and_evaluate_from_a_folder(make, tmp_path: Path, objective: str, loader: str) -> None:
    out = distill(make(objective=objective, loader=loader))
    names = {path.name for path in (out / "discriminators").iterdir()}
    assert names == {"2.safetensors", "3.safetensors"} | (
        {"real.safetensors"} if objective == "learnability" else set()
    )
    record = json.loads((out / "curricula.json").read_text())
    assert list(record) == ["2", "3"]
    for number, entry in record.items():
        seen = 3 * (int(number) - 1)
        assert (entry["sampled"]["images"], entry["newest"]["images"]) == (seen, 3)
        assert entry["real"]["images"] == 18 and list(entry["misclassified_real"]) == list(CLASSES)
        wrong = sum(entry["misclassified_real"].values())
        assert entry["real"]["accuracy"] == pytest.approx(100 * (18 - wrong) / 18, abs=1e-3)
    results = evaluate(EvaluateConfig(path=str(out), repeats=1, epochs=1, network=("convnet-2",)))
    (found,) = results["evaluations"]
    assert found["test_images"] == 6 and found["real"].endswith("real")
    rows = json.loads((out / "results.json").read_text())["curricula"]
    assert [row["curriculum"] for row in rows] == [1, 2, 3] and rows == by_curriculum(out)
    assert (rows[0]["discriminator"], rows[0]["before"], rows[2]["after"]) == (None, None, None)
    assert rows[0]["after"] == record["2"]["newest"] and rows[1]["after"] == record["3"]["newest"]
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    losses = [row["discriminator_loss"] for row in manifest if row["curriculum"] == 2]
    assert rows[1]["before"]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)


@pytest.mark.parametrize("objective", ["learnability", "density_ratio"])
def test_a_run_repeats_and_continues_with_the_same_bytes(make, tmp_path: Path, objective: str) -> None:
    out = distill(make(objective=objective, loader="pil", repulsion=0.5))
    whole = contents(out)
    stored(out, 2).unlink()
    stored(out, 3).unlink()
    for name in ("3", "real"):
        (out / "discriminators" / f"{name}.safetensors").unlink(missing_ok=True)
    (out / "curricula.json").write_text("{")
    distill(make(objective=objective, loader="pil", repulsion=0.5))
    assert contents(out) == whole


def test_what_is_left_out_of_the_real_images_is_said(make, sources: Path, capsys) -> None:
    distill(make(objective="density_ratio", num_curricula=2))
    error = capsys.readouterr().err
    assert error.count(f"{sources / 'real'}: 18 images; 1 skipped (") == 1 and "ant/cut.jpg" in error


def test_f_real_is_trained_once(make, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    feed = steering.RealImages.batches
    monkeypatch.setattr(
        steering.RealImages, "batches", lambda self, *given: seeds.append(given) or feed(self, *given)
    )
    distill(make(objective="learnability"))
    assert len(seeds) == 1
    distill(make(objective="density_ratio"), overwrite=True)
    assert len(seeds) == 1 + 2  # once for each discriminator


def test_f_real_learns_the_real_images(make, sources: Path) -> None:
    distill(make(objective="learnability", real_steps=60, num_curricula=2))
    config = make(objective="learnability")
    real = steering.RealImages(config, CLASSES, 3, 16, torch.device("cpu"), Ranks())
    network = steering.Classifiers(config, 3, 16, 3, torch.device("cpu"), Path(config.out) / "discriminators")
    f_real = network.get("real", "", lambda seed: pytest.fail("it is there"), 1)
    images, labels = real.judged()
    assert (f_real(images).argmax(1) == labels).float().mean() > 0.9


def test_repulsion_moves_the_later_curricula_apart(make, tmp_path: Path) -> None:
    plain = distill(make(out=str(tmp_path / "plain"), guidance_scale=1.0))
    repelled = distill(make(out=str(tmp_path / "repelled"), guidance_scale=1.0, repulsion=1e4))

    def cosine(out: Path) -> float:
        rows = [read_tensors(stored(out, i))["samples"].flatten(1) for i in (1, 2)]
        return torch.nn.functional.cosine_similarity(*rows).mean().item()

    assert cosine(repelled) < cosine(plain)


def test_a_source_that_cannot_serve_is_refused_before_anything_is_written(make, sources, tmp_path, capsys):
    shutil.copytree(sources / "real" / "train" / "ant", tmp_path / "less" / "train" / "ant")
    for command, words in (
        (["--real", str(tmp_path / "less")], "bee is missing"),
        (["--real", "digits"], "the digits are grey and 8x8"),
        (["--real", str(tmp_path / "absent")], "there is no image folder"),
    ):
        given = ["--model", str(sources / "dit.safetensors"), "--out", str(tmp_path / "run"), *command]
        assert words in refused(["distill", "--objective", "density_ratio", *given], capsys)
    assert not (tmp_path / "run").exists()


def test_another_loader_is_another_run(make) -> None:
    out = distill(make(objective="density_ratio"))
    used = json.loads((out / "config.json").read_text())["config"]["loader"]
    assert used == ("pil" if dali.why_not() else "dali")
    distill(make(loader="pil", objective="density_ratio"), overwrite=True)
    kept = make(loader="auto", objective="density_ratio")
    distill(kept)  # auto goes on with what the run was begun with
    if dali.why_not() is None:
        with pytest.raises(InputError, match="loader pil there, dali here"):
            distill(make(loader="dali", objective="density_ratio"))
