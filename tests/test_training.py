"""Training: a few iterations, the loss by its formula, and the record beside the bundled model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch.distributions import Normal, kl_divergence

from acs_fast.cli import main
from acs_fast.data import ASSETS
from acs_fast.diffusion import linear_alphas_cumprod
from acs_fast.models.dit import load_checkpoint
from acs_fast.training import HybridLoss

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
        assert main(["train", "--out", str(tmp_path / "dit"), "--iterations", iterations, *SMALL]) == 0
        losses.append(json.loads((tmp_path / "dit" / "train.json").read_text())["loss"])
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


def test_the_bundled_model_comes_with_its_recipe_and_is_small() -> None:
    path = ASSETS / "digits-dit.safetensors"
    assert path.stat().st_size <= 4_000_000
    record = json.loads((ASSETS / "digits-dit.json").read_text())
    assert record["config"]["preset"] == "digits" and record["minutes"] > 0 and record["loss"] > 0
    model = load_checkpoint(path)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
