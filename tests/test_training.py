"""Training: a few iterations, the loss by its formula, and the record beside the bundled model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from acs_fast import InputError, TrainConfig, train, training
from acs_fast.cli import main
from acs_fast.data import ASSETS
from acs_fast.diffusion import linear_alphas_cumprod
from acs_fast.models.checkpoint import load_checkpoint
from acs_fast.training import HybridLoss, stratified_timesteps
from tests.runs import refused

SMALL = ["--hidden-size", "32", "--depth", "1", "--num-heads", "2", "--batch-size", "16"]


def test_a_few_iterations_make_a_checkpoint_that_samples(tmp_path: Path, capsys) -> None:
    out = tmp_path / "dit"
    assert main(["train", "--preset", "digits", "--out", str(out), "--iterations", "3", *SMALL]) == 0
    record = json.loads((out / "train.json").read_text())
    assert record["images"] == 1297 and record["config"]["iterations"] == 3 and record["loss"] > 0
    model = load_checkpoint(out / "model.safetensors")
    assert model.config.classes == tuple("0123456789") and model.config.learn_sigma
    command = [
        "distill",
        "--model",
        str(out / "model.safetensors"),
        "--out",
        str(tmp_path / "run"),
        "--ipc",
        "1",
    ]
    assert main([*command, "--num-curricula", "1", "--num-sampling-steps", "2"]) == 0


def test_the_same_seed_trains_the_same_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["train", "--out", str(tmp_path / name), "--iterations", "2", *SMALL]) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    losses = []
    for iterations in ("10", "150"):
        out = tmp_path / iterations
        assert main(["train", "--out", str(out), "--iterations", iterations, *SMALL]) == 0
        losses.append(json.loads((out / "train.json").read_text())["loss"])
    assert losses[1] < 0.9 * losses[0]


def test_the_hybrid_loss_is_the_mse_plus_the_kl_of_the_posteriors() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(5, 1, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator)
    output = 0.3 * torch.randn(5, 2, 4, 4, generator=generator)
    timesteps = torch.tensor([1, 10, 300, 700, 999])

    class Model(torch.nn.Module):
        class config:
            learn_sigma = True

        def forward(self, x, t, y):
            return output

    loss = HybridLoss(torch.device("cpu"))(Model(), x0, noise, timesteps, torch.zeros(5, dtype=torch.long))
    a = torch.from_numpy(linear_alphas_cumprod())
    total = []
    for i, t in enumerate(timesteps):
        at, prev = a[t], a[t - 1]
        beta = 1 - at / prev
        variance = beta * (1 - prev) / (1 - at)
        x = at.sqrt() * x0[i].double() + (1 - at).sqrt() * noise[i].double()
        eps, values = output[i].double()
        predicted = (x - (1 - at).sqrt() * eps) / at.sqrt()
        coefficients = prev.sqrt() * beta / (1 - at), (1 - beta).sqrt() * (1 - prev) / (1 - at)
        log_variance = (values + 1) / 2 * beta.log() + (1 - values) / 2 * variance.log()
        true = Normal(coefficients[0] * x0[i].double() + coefficients[1] * x, variance.sqrt())
        model = Normal(coefficients[0] * predicted + coefficients[1] * x, (0.5 * log_variance).exp())
        total.append(kl_divergence(true, model).mean())
    expected = (output[:, :1] - noise).double().square().mean() + torch.stack(total).mean() / math.log(2)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_columns_of_the_loss_are_those_of_the_schedule() -> None:
    a = linear_alphas_cumprod()
    a_prev = np.append(1.0, a[:-1])
    beta = 1.0 - a / a_prev
    variance = beta * (1.0 - a_prev) / (1.0 - a)
    expected = {
        "sqrt_a": np.sqrt(a),
        "sqrt_1ma": np.sqrt(1.0 - a),
        "mean_x0": np.sqrt(a_prev) * beta / (1.0 - a),
        "mean_xt": np.sqrt(1.0 - beta) * (1.0 - a_prev) / (1.0 - a),
        "min_log": np.log(np.append(variance[1], variance[1:])),
        "max_log": np.log(beta),
    }
    table = HybridLoss(torch.device("cpu")).table
    assert table.keys() == expected.keys()
    for name, column in expected.items():
        assert torch.equal(table[name], torch.tensor(column, dtype=torch.float32)), name


@pytest.mark.parametrize("count", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_timesteps_lie_in_the_schedule(count: int, u: float) -> None:
    timesteps = stratified_timesteps(count, torch.tensor([u]))
    assert timesteps.dtype == torch.int64 and len(timesteps) == count
    assert timesteps.min() >= 0 and timesteps.max() <= 999


@pytest.mark.parametrize("kind", ["file", "model"])
def test_an_unusable_out_is_refused_before_training(kind: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(training, "_fit", lambda *args: pytest.fail("trained"))
    out = tmp_path / "dit"
    kept = out if kind == "file" else out / "model.safetensors"
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"kept")
    message = "is a file" if kind == "file" else "holds a model already; give another --out"
    assert message in refused(["train", "--out", str(out), *SMALL], capsys)
    assert kept.read_bytes() == b"kept"


def test_a_full_disk_is_one_sentence_and_leaves_no_half_model(tmp_path: Path, capsys, monkeypatch) -> None:
    synced = []

    def fail_the_second_time(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:  # train.json is the first file
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("acs_fast.writer.os.fsync", fail_the_second_time)
    out = tmp_path / "dit"
    assert "No space left" in refused(["train", "--out", str(out), "--iterations", "1", *SMALL], capsys)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "train.json"]


def test_a_loss_that_is_not_finite_names_its_iteration(tmp_path: Path, monkeypatch) -> None:
    real, calls = HybridLoss.__call__, []

    def explode(self, *args):
        calls.append(None)
        return real(self, *args) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(HybridLoss, "__call__", explode)
    settings = {"hidden_size": 32, "depth": 1, "num_heads": 2, "batch_size": 4, "iterations": 9}
    with pytest.raises(InputError, match="iteration 2 is nan"):
        train(TrainConfig(out=str(tmp_path / "dit"), **settings))
    assert not (tmp_path / "dit" / "model.safetensors").exists()


def test_the_bundled_model_comes_with_its_recipe_and_is_small() -> None:
    path = ASSETS / "digits-dit.safetensors"
    assert path.stat().st_size <= 4_000_000
    record = json.loads((ASSETS / "digits-dit.json").read_text())
    assert record["config"]["preset"] == "digits" and record["minutes"] > 0 and record["loss"] > 0
    model = load_checkpoint(path)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
