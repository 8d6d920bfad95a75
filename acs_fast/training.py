"""Train a DiT on an image set; the bundled digits model was made with `acs-fast train --preset digits`."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from acs_fast.config import InputError, TrainConfig
from acs_fast.data import ImageSet, load_images, to_model_range
from acs_fast.diffusion import NUM_TRAIN_TIMESTEPS, step_coefficients
from acs_fast.environment import resolve_device
from acs_fast.models.checkpoint import checkpoint_bytes
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.writer import lock, write_atomic, write_json

WARMUP_STEPS = 200
MAX_GRAD_NORM = 1.0


class HybridLoss:
    """L_simple + L_vlb of IDDPM (Nichol & Dhariwal 2021, eq. 16) for a model of (eps, variance values).

    L_simple is the mean squared error of eps. L_vlb is the KL divergence of DDPM (5) in bits per dimension,
    with the mean detached so that it trains the variance alone, times T / 1000 = 1 as in the official code.
    """

    def __init__(self, device: torch.device):
        steps = step_coefficients(NUM_TRAIN_TIMESTEPS)
        columns = {
            "sqrt_a": [math.sqrt(c.alpha_cumprod) for c in steps],
            "sqrt_1ma": [math.sqrt(1.0 - c.alpha_cumprod) for c in steps],
            "mean_x0": [c.posterior_mean_x0 for c in steps],
            "mean_xt": [c.posterior_mean_xt for c in steps],
            "min_log": [c.min_log_variance for c in steps],
            "max_log": [c.max_log_variance for c in steps],
        }
        self.table = {
            name: torch.tensor(v, dtype=torch.float32, device=device) for name, v in columns.items()
        }

    def __call__(
        self, model: DiT, x0: Tensor, noise: Tensor, timesteps: Tensor, class_labels: Tensor
    ) -> Tensor:
        c = {name: column[timesteps].view(-1, 1, 1, 1) for name, column in self.table.items()}
        x = c["sqrt_a"] * x0 + c["sqrt_1ma"] * noise  # DDPM (4)
        output = model(x, timesteps, class_labels)
        if not model.config.learn_sigma:
            return F.mse_loss(output, noise)
        eps, values = output.chunk(2, dim=1)
        pred_xstart = (x - c["sqrt_1ma"] * eps.detach()) / c["sqrt_a"]
        mean = c["mean_x0"] * pred_xstart + c["mean_xt"] * x
        true_mean = c["mean_x0"] * x0 + c["mean_xt"] * x
        log_variance = (values + 1) / 2 * (c["max_log"] - c["min_log"]) + c["min_log"]
        kl = 0.5 * (
            log_variance
            - c["min_log"]
            - 1
            + torch.exp(c["min_log"] - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        # at t = 0 the same Gaussian term replaces the decoder likelihood; this keeps the variance learnable
        return F.mse_loss(eps, noise) + kl.mean() / math.log(2.0)


def train(config: TrainConfig) -> Path:
    """Train on the images of `config.real`; write `model.safetensors` (EMA weights, fp16) and `train.json`.

    Returns the checkpoint's path. The same seed on the same machine gives the same weights.
    """
    device, out = resolve_device(config.device), Path(config.out)
    real = load_images(config.real, "train")
    model = _new_model(config, real).to(device)
    with lock(
        out
    ):  # makes the folder too, so that one that cannot be written to is known before the training
        path = out / "model.safetensors"
        if path.exists():
            raise InputError(f"{out} holds a model already; give another --out")
        started = time.perf_counter()
        ema, losses = _fit(config, model, real, device)
        record = {
            "config": dataclasses.asdict(config),
            "parameters": sum(p.numel() for p in model.parameters()),
            "images": len(real),
            "loss": statistics.fmean(losses[-max(1, config.iterations // 10) :]),  # of the last tenth
            "minutes": round((time.perf_counter() - started) / 60, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        write_json(out / "train.json", record)
        write_atomic(path, checkpoint_bytes(ema))
    return path


def _fit(config: TrainConfig, model: DiT, real: ImageSet, device: torch.device) -> tuple[DiT, list[float]]:
    """Train `model` in place; returns its moving average and the loss of every iteration."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )
    loss_fn = HybridLoss(device)
    images, labels = to_model_range(real.images), real.labels
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    progress = tqdm(range(config.iterations), desc="train", unit="step", disable=None)
    for iteration in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _learning_rate_factor(iteration, config.iterations)
        rows = torch.randint(0, len(real), (config.batch_size,), generator=generator)
        batch = images[rows].to(device)
        noise = torch.randn(batch.shape, generator=generator).to(device)
        timesteps = stratified_timesteps(len(rows), torch.rand(1, generator=generator)).to(device)
        dropped = torch.rand(len(rows), generator=generator) < config.class_dropout_prob
        class_labels = torch.where(dropped, model.null_label, labels[rows]).to(device)
        loss = loss_fn(model, batch, noise, timesteps, class_labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise InputError(f"the loss of iteration {iteration} is {losses[-1]}; lower --lr")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        _update_ema(ema, model, min(config.ema_decay, (1 + iteration) / (10 + iteration)))
        if iteration % 50 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.4f}")
    return ema, losses


def stratified_timesteps(count: int, u: Tensor) -> Tensor:
    """One timestep from each of `count` equal strata: unbiased, with less variance (VDM, Kingma 2021).

    u: fp32 [1] in [0, 1); just below 1 the sum rounds up, so the last timestep is clamped.
    """
    timesteps = ((torch.arange(count) + u) * (NUM_TRAIN_TIMESTEPS / count)).long()
    return timesteps.clamp(max=NUM_TRAIN_TIMESTEPS - 1)


def _new_model(config: TrainConfig, real: ImageSet) -> DiT:
    size = real.images.shape[-1]
    if size % config.patch_size:
        raise InputError(f"--patch-size {config.patch_size} does not divide the image size {size}")
    if config.hidden_size % config.num_heads or config.hidden_size % 4:
        raise InputError(f"--hidden-size {config.hidden_size} must be a multiple of 4 and of --num-heads")
    torch.manual_seed(config.seed)
    model = DiT(
        DiTConfig(
            input_size=size,
            patch_size=config.patch_size,
            in_channels=real.images.shape[1],
            hidden_size=config.hidden_size,
            depth=config.depth,
            num_heads=config.num_heads,
            num_classes=len(real.classes),
            classes=real.classes,
        )
    )
    model.initialize_weights()
    return model


def _learning_rate_factor(iteration: int, iterations: int) -> float:
    warmup = min(1.0, (iteration + 1) / min(WARMUP_STEPS, iterations))
    return warmup * 0.5 * (1.0 + math.cos(math.pi * iteration / iterations))


@torch.no_grad()
def _update_ema(ema: DiT, model: DiT, decay: float) -> None:
    for averaged, value in zip(ema.parameters(), model.parameters(), strict=True):
        averaged.lerp_(value, 1.0 - decay)
