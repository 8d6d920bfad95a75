"""The networks that a run samples with, from where their weights lie: the denoiser and its VAEs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from acs_fast.config import REAL_OBJECTIVES, DistillConfig, InputError
from acs_fast.data import ASSETS, DIGITS
from acs_fast.models.checkpoint import load_checkpoint, resolve
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.models.vae import VAE, check_fits, load_vae

VAE_DEFAULT = "stabilityai/sd-vae-ft-mse"
LARGE = 512  # hidden size from which a model is worth measurements, and batches are bounded
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Networks:
    """A denoiser; the VAE that makes its samples images; the one that decodes for the discriminator."""

    model: DiT
    vae: VAE | None  # None: samples are images
    seen_by: VAE | None  # None: the discriminator sees samples
    checkpoint: Path | None = None  # None: the weights are random


def load_networks(config: DistillConfig, device: torch.device) -> Networks:
    """The networks of a configuration on a device.

    Raises InputError for what is missing, damaged or does not fit together, and for what the model cannot do.
    """
    checkpoint = checkpoint_path(config.model)
    model = load_checkpoint(checkpoint, partial(resolve_dtype, config.dtype, device)).to(device)
    check(config, model.config)

    # real latents are made by the VAE's encoder
    encodes = config.guidance_space == "latent" and config.objective in REAL_OBJECTIVES

    vae = seen_by = None
    if not samples_pixels(model.config):
        vae = load_own_vae(config.vae, checkpoint, model.config, device, vae_dtype(model), encoder=encodes)
    if config.guidance_space == "pixel-tiny":
        seen_by = load_vae(config.tiny_vae, True, device, vae_dtype(model))
        check_fits(seen_by, model.config)
    elif config.guidance_space == "pixel":
        seen_by = vae
    return Networks(model, vae, seen_by, checkpoint)


def checkpoint_path(model: str) -> Path:
    """Where the checkpoint of `--model` lies; InputError where there is none."""
    return ASSETS / "digits-dit.safetensors" if model == DIGITS else resolve(model)


def load_own_vae(
    source: str | None,
    checkpoint: Path,
    shape: DiTConfig,
    device: torch.device,
    dtype: torch.dtype,
    encoder: bool,
) -> VAE:
    """The VAE whose latents a model samples: that of `source`, else the checkpoint folder's, else SD's."""
    own = (checkpoint / "vae" / "config.json").is_file()
    vae = load_vae(source or (str(checkpoint) if own else VAE_DEFAULT), False, device, dtype, encoder=encoder)
    check_fits(vae, shape)
    return vae


def check(config: DistillConfig, shape: DiTConfig) -> None:
    """InputError for what a model of this shape cannot do."""
    pixels, channels = samples_pixels(shape), shape.in_channels
    if config.variance == "learned_range" and not shape.learn_sigma:
        raise InputError("--variance learned_range: this model has no variance channels; use fixed_small")
    if config.cfg_channels is not None and not 1 <= config.cfg_channels <= channels:
        raise InputError(f"--cfg-channels is {config.cfg_channels}, this model has {channels}")
    if pixels and config.guidance_space != "latent":
        raise InputError(
            f"--guidance-space {config.guidance_space}: this model samples pixels, there is nothing to "
            "decode; use latent, which is the sample itself"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The value of `--dtype` that means a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def samples_pixels(shape: DiTConfig) -> bool:
    """Whether the model's samples are images in [-1, 1], not latents of a VAE."""
    return shape.in_channels in (1, 3)


def vae_dtype(model: DiT) -> torch.dtype:
    """A VAE's dtype beside this model: the model's on CUDA, fp32 on a CPU."""
    return model.pos_embed.dtype if model.pos_embed.is_cuda else torch.float32


def has_bf16() -> bool:
    """Whether this processor multiplies matrices in bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_dtype(name: str, device: torch.device, shape: DiTConfig) -> torch.dtype:
    """The denoiser's dtype: a named one, or for `auto` bf16 on CUDA and on CPUs where its linears gain by it.

    A processor with bf16 instructions need not be faster in them: a large model's widest linear is timed in
    both dtypes, and bf16 must win by a fifth. Small models stay in fp32: their runs repeat to the byte.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    if shape.hidden_size < LARGE or not has_bf16():
        return torch.float32
    rows, d = 2 * (shape.input_size // shape.patch_size) ** 2, shape.hidden_size

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(size, dtype=dtype) for size in ((rows, d), (4 * d, d)))
        times = []
        for _ in range(6):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    return torch.bfloat16 if 1.2 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
