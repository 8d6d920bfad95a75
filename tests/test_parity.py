"""Parity: our trajectories are those of diffusers' `DiTPipeline` and of the official DiT sampler's formula.

By the rule of `acs_fast.testing`: against the trajectory in float64, our error is at most twice theirs.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from acs_fast import attention, diffusion, ops
from acs_fast.config import DistillConfig
from acs_fast.engine import StepEngine
from acs_fast.kernels.reference import philox_normal
from acs_fast.models.checkpoint import load_checkpoint
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.networks import has_bf16
from acs_fast.plan import available_memory
from acs_fast.testing import excess
from tests.test_sampler import randomise

CPU = torch.device("cpu")
LABELS, INDICES = torch.tensor([7, 0, 993]), torch.tensor([5, 0, 12])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLERS = {
    "ddim": {"sampler": "ddim", "eta": 0.0},
    "ddim-eta": {"sampler": "ddim", "eta": 0.7},
    "ddpm-fixed-small": {"sampler": "ddpm", "variance": "fixed_small"},
    "ddpm-learned-range": {"sampler": "ddpm", "variance": "learned_range"},
}
SHAPES = {
    "patch-2": {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8},
    "patch-4": {"patch_size": 4, "num_attention_heads": 3, "attention_head_dim": 12},
    "no-sigma": {"patch_size": 1, "num_attention_heads": 1, "attention_head_dim": 16, "out_channels": 4},
}
XL_BYTES = 6 << 30  # free memory that a copy of DiT-XL/2 in fp32 runs in with ease


def make_config(**settings: object) -> DistillConfig:
    return DistillConfig(
        **{"num_sampling_steps": 10, "cfg_scale": 2.5, "seed": 2**40 + 3, "clip_denoised": False, **settings}
    )


def small_transformer(**shape: int) -> DiTTransformer2DModel:
    """diffusers' DiT with random weights everywhere, and one embedder in all blocks."""
    settings = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}
    model = randomise(DiTTransformer2DModel(**{**settings, **shape}), 0.2, seed=1)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def noise(config: DistillConfig, step: int, shape: tuple[int, ...], batch: int) -> Tensor:
    """Ours, as the engine draws it."""
    key = (torch.tensor([number]) for number in (config.seed, step))
    return philox_normal(LABELS[:batch], INDICES[:batch], *key, shape=shape)


def make_scheduler(config: DistillConfig, dtype: torch.dtype) -> DDIMScheduler | DDPMScheduler:
    """diffusers' own, at our timesteps; in float64 for the truth."""
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    settings["timestep_spacing"] = "linspace"
    if config.sampler == "ddim":
        scheduler = DDIMScheduler(**settings)
    else:
        scheduler = DDPMScheduler(**settings, variance_type=config.variance)
    if dtype == torch.float64:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        scheduler.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return scheduler


def by_diffusers(
    transformer: DiTTransformer2DModel,
    config: DistillConfig,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.float32,
    batch: int = 3,
) -> Tensor:
    """The latents after every step [steps, B, C, H, W] of `DiTPipeline.__call__`, with our noise as its own.

    dtype: of the latents. They stay in it beside a transformer in bf16, as ours do; the pipeline alone would
    round them too, which is no bound for us.
    """
    scheduler = make_scheduler(config, dtype)
    own_step, channels = scheduler.step, transformer.config.in_channels
    shape = (channels, transformer.config.sample_size, transformer.config.sample_size)
    steps = {c.timestep: n for n, c in enumerate(diffusion.step_coefficients(config.num_sampling_steps))}
    outputs, latents = [], []

    def cast(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].to(transformer.dtype), *args[1:])

    def step(model_output: Tensor, t: Tensor, sample: Tensor) -> SimpleNamespace:
        number = steps[int(t)]
        drawn = noise(config, number, shape, batch).to(dtype).repeat(2, 1, 1, 1)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **keywords: drawn)
        keywords = {}
        if config.sampler == "ddim":
            # its next timestep is t - 1000 // steps, which no linspace has: with one step it lies below zero
            scheduler.num_inference_steps = 1
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[scheduler.timesteps[-number]]
            if number == 0:
                scheduler.final_alpha_cumprod = torch.tensor(1.0)
            keywords = {"eta": config.eta, "variance_noise": drawn if config.eta else None}
        elif config.variance == "learned_range":  # the pipeline has split it off
            model_output = torch.cat((model_output, outputs[-1][:, channels:]), dim=1)
        result = own_step(model_output, t, sample, **keywords)
        latents.append(result.prev_sample[:batch].clone())
        return result

    scheduler.step = step
    start = noise(config, 1000, shape, batch).to(dtype)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **keywords: start)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).to(dtype)
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    hooks = [
        transformer.register_forward_pre_hook(cast),
        transformer.register_forward_hook(lambda module, args, output: outputs.append(output.sample)),
    ]
    labels, count = LABELS[:batch].tolist(), config.num_sampling_steps
    pipeline(labels, config.cfg_scale, num_inference_steps=count, output_type="pt")
    for hook in hooks:
        hook.remove()
    assert scheduler.timesteps.tolist() == sorted(steps, reverse=True)
    return torch.stack(latents)


def by_engine(model: DiT, config: DistillConfig, batch: int = 3) -> Tensor:
    """Ours, unguided: the latents after every step."""
    engine = StepEngine(
        model, config, ops.select("reference", CPU), CPU,
        batch_size=batch, class_labels=LABELS.tolist(), attention=attention.Attention("flash"),
    )  # fmt: skip
    inputs = LABELS[:batch], INDICES[:batch], torch.zeros(batch, dtype=torch.long)
    return torch.stack([x.clone() for x in engine.denoise(*inputs)])


def worst(ours: Tensor, theirs: Tensor, truth: Tensor) -> float:
    """The largest excess over the steps; above 1 is a failure."""
    return max(excess(list(ours), list(theirs), list(truth)))


@pytest.mark.parametrize("num_sampling_steps", [2, 4, 10, 25, 50, 100, 250, 999, 1000])
def test_timesteps_are_diffusers_linspace(num_sampling_steps) -> None:
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(num_sampling_steps)
    ours = [c.timestep for c in diffusion.step_coefficients(num_sampling_steps)]
    assert scheduler.timesteps.tolist() == ours[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "sampler"),
    [(a, b) for a in SHAPES for b in SAMPLERS if (a, b) != ("no-sigma", "ddpm-learned-range")],
)
def test_every_step_is_that_of_the_pipeline(tmp_path: Path, monkeypatch, shape, sampler, dtype) -> None:
    transformer, config = small_transformer(**SHAPES[shape]), make_config(**SAMPLERS[sampler])
    transformer.save_pretrained(tmp_path)
    ours = by_engine(load_checkpoint(tmp_path, DTYPES[dtype]), config)
    exact = by_diffusers(copy.deepcopy(transformer).double(), config, monkeypatch, torch.float64)
    theirs = by_diffusers(transformer.to(DTYPES[dtype]), config, monkeypatch)
    assert worst(ours, theirs, exact) <= 1.0


def xl_transformer(dtype: torch.dtype = torch.float32) -> DiTTransformer2DModel:
    """DiT-XL/2 of diffusers; its 675 million weights are windows into one tensor of 16 million, for speed.

    No two blocks have the same window, but for the embedder that they must share.
    """
    pool = (0.04 * torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.device("meta"):
        model = DiTTransformer2DModel(in_channels=4, out_channels=8, norm_eps=1e-6)
    state, start = {}, 0
    for name, value in model.state_dict().items():
        first = ".".join(("transformer_blocks.0", *name.split(".")[2:]))
        if ".norm1.emb." in name and first in state:
            state[name] = state[first]
        else:
            start = (start + 999_983) % (len(pool) - value.numel())
            state[name] = pool[start : start + value.numel()].view(value.shape)
    model.load_state_dict(state, assign=True)
    table = DiTTransformer2DModel(in_channels=4, num_layers=0).pos_embed.pos_embed
    model.pos_embed.pos_embed = table.to(dtype)
    return model.eval().requires_grad_(False)


@pytest.mark.skipif((available_memory(CPU) or XL_BYTES) < XL_BYTES, reason="DiT-XL/2 needs more free memory")
@pytest.mark.parametrize("name", ["ddim", "ddpm-learned-range"])
def test_dit_xl_2_is_the_pipelines(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr("acs_fast.models.weights.MAPPED_BYTES", 1 << 40)  # the file is small, its tensors not
    config = make_config(**SAMPLERS[name], num_sampling_steps=2)
    transformer = xl_transformer()
    transformer.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="100GB")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours = by_engine(load_checkpoint(tmp_path), config, batch=1)
        theirs = by_diffusers(transformer, config, monkeypatch, batch=1)
        exact = by_diffusers(xl_transformer(torch.float64), config, monkeypatch, torch.float64, batch=1)
        assert worst(ours, theirs, exact) <= 1.0
        if name == "ddim" and has_bf16():
            ours = by_engine(load_checkpoint(tmp_path, torch.bfloat16), config, batch=1)
            half = xl_transformer().to(torch.bfloat16)
            assert worst(ours, by_diffusers(half, config, monkeypatch, batch=1), exact) <= 1.0
    finally:
        torch.set_num_threads(threads)


def official_model(path: Path) -> DiT:
    """A DiT of random weights through an official `.pt`."""
    shape = DiTConfig(8, 2, in_channels=4, hidden_size=128, depth=2, num_heads=2, num_classes=1000)
    model = randomise(DiT(shape), 0.08, seed=2)
    torch.save(model.state_dict(), path)
    return load_checkpoint(path)


def by_the_official_formula(model: DiT, config: DistillConfig, dtype: torch.dtype) -> Tensor:
    """The official sampler: `forward_with_cfg` on three channels, and SpacedDiffusion's step.

    dtype: the model's; what is made of its output is in fp32 at least.

    forward_with_cfg (models.py of facebookresearch/DiT) guides the first three channels alone: the fourth and
    the variance are those of each branch, and the loop keeps the conditional one. The step is p_sample or
    ddim_sample of its diffusion/gaussian_diffusion.py with learned-range variance and without clipping.
    """
    model, wide = copy.deepcopy(model).to(dtype), torch.promote_types(dtype, torch.float32)
    steps, labels = config.num_sampling_steps, torch.cat((LABELS, torch.full_like(LABELS, 1000)))
    timesteps = [round(999 / (steps - 1) * i) for i in range(steps)]
    kept = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[timesteps]
    betas = 1.0 - kept / np.append(1.0, kept[:-1])  # respace.py: those of the kept steps alone
    a = np.cumprod(1.0 - betas)
    a_prev = np.append(1.0, a[:-1])
    variance = betas * (1.0 - a_prev) / (1.0 - a)
    min_log, max_log = np.log(np.append(variance[1], variance[1:])), np.log(betas)
    x = noise(config, 1000, (4, 8, 8), 3).to(wide)
    latents = []
    for i in reversed(range(steps)):
        out = model(torch.cat((x, x)).to(dtype), torch.full_like(labels, timesteps[i]), labels).to(wide)
        eps, rest = out[:, :3], out[:, 3:]
        cond_eps, uncond_eps = eps.chunk(2)
        half_eps = uncond_eps + config.cfg_scale * (cond_eps - uncond_eps)
        out = torch.cat((torch.cat((half_eps, half_eps)), rest), dim=1)[:3]
        eps, values = out[:, :4], out[:, 4:]
        drawn = noise(config, i, (4, 8, 8), 3).to(wide)
        xstart = math.sqrt(1.0 / a[i]) * x - math.sqrt(1.0 / a[i] - 1.0) * eps
        if config.sampler == "ddim":
            sigma = config.eta * math.sqrt((1 - a_prev[i]) / (1 - a[i])) * math.sqrt(1 - a[i] / a_prev[i])
            x = math.sqrt(a_prev[i]) * xstart + math.sqrt(1.0 - a_prev[i] - sigma**2) * eps + sigma * drawn
        else:
            frac = (values + 1.0) / 2.0
            log_variance = frac * max_log[i] + (1.0 - frac) * min_log[i]
            mean = betas[i] * math.sqrt(a_prev[i]) / (1.0 - a[i]) * xstart
            mean = mean + (1.0 - a_prev[i]) * math.sqrt(1.0 - betas[i]) / (1.0 - a[i]) * x
            x = mean + float(i != 0) * torch.exp(0.5 * log_variance) * drawn
        latents.append(x)
    return torch.stack(latents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampler", ["ddim", "ddim-eta", "ddpm-learned-range"])
def test_cfg_on_three_channels_is_the_official_formula(tmp_path: Path, sampler, dtype) -> None:
    model, config = official_model(tmp_path / "dit.pt"), make_config(**SAMPLERS[sampler], cfg_channels=3)
    exact = by_the_official_formula(model, config, torch.float64)
    model = load_checkpoint(tmp_path / "dit.pt", DTYPES[dtype])
    theirs = by_the_official_formula(model, config, DTYPES[dtype])
    assert worst(by_engine(model, config), theirs, exact) <= 1.0
