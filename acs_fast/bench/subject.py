"""What is benchmarked: a run's networks, with random weights where a model is named by its size."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import DistillConfig, InputError
from acs_fast.data import DIGITS
from acs_fast.generator import ImageGenerator
from acs_fast.models.checkpoint import load_checkpoint
from acs_fast.models.dit import SIZES, DiT, DiTConfig, official_config, sincos_pos_embed
from acs_fast.models.vae import VAE, check_fits, load_vae
from acs_fast.networks import Networks, check, checkpoint_path, resolve_dtype, samples_pixels, vae_dtype

MODELS = {f"{size.lower()}-{p}": official_config(f"{size}/{p}") for size in SIZES for p in (2, 4, 8)}
KL: dict[str, Any] = {  # Stable Diffusion's
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
TINY: dict[str, Any] = {}  # TAESD's shape is diffusers' default


def make_subject(config: DistillConfig, device: torch.device, depth: int | None = None) -> ImageGenerator:
    """The `ImageGenerator` of a run, whose networks may have random weights: speed does not depend on them.

    A checkpoint in a folder brings its VAE. Otherwise, and for a model by its size, a random one of Stable
    Diffusion's shape stands for it, and for `pixel-tiny` one of TAESD's; without diffusers there is none.
    depth: of a model by its size, where not the size's own.
    """
    shape, checkpoint = sized(config.model), None
    dtype = partial(resolve_dtype, config.dtype, device)
    if shape is None:
        checkpoint = checkpoint_path(config.model)
        model = load_checkpoint(checkpoint, dtype).to(device)
    else:
        model = random_dit(dataclasses.replace(shape, depth=depth or shape.depth), dtype(shape), device)
    check(config, model.config)
    vae = seen_by = None
    if not samples_pixels(model.config):
        vae = _make_vae(model, checkpoint)
    if config.guidance_space != "latent":
        seen_by = vae if config.guidance_space == "pixel" else random_vae(True, model)
        if seen_by is None:
            raise InputError(
                f"--guidance-space {config.guidance_space} needs pip install 'acs-fast[diffusers]'"
            )
    return ImageGenerator(config, device, Networks(model, vae, seen_by, checkpoint))


def _make_vae(model: DiT, checkpoint: Path | None) -> VAE | None:
    if checkpoint is None or not (checkpoint / "vae" / "config.json").is_file():
        return random_vae(False, model)
    vae = load_vae(str(checkpoint), False, model.pos_embed.device, vae_dtype(model))
    check_fits(vae, model.config)
    return vae


def sized(name: str) -> DiTConfig | None:
    """The shape of a model by its size, as `dit-xl-2`; None for what can be a checkpoint."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    if name != DIGITS and not any(mark in name for mark in "/.") and not Path(name).exists():
        raise InputError(
            f"--model {name} is neither a checkpoint nor a size; the sizes are {', '.join(MODELS)}"
        )
    return None


@torch.no_grad()
def random_dit(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> DiT:
    """A frozen DiT with random weights, none zero, drawn in `dtype` itself."""
    with torch.device("meta"):
        model = DiT(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = 0.02 if parameter.dim() < 2 else 1.0 / math.sqrt(parameter[0].numel())
        parameter.normal_(0.0, 0.5 * spread if "adaLN" in name else spread, generator=generator)
    model.pos_embed.copy_(sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size))
    return model


def random_vae(tiny: bool, model: DiT) -> VAE | None:
    """A decoder with random weights for the model's latents; None without diffusers."""
    channels, device = model.config.in_channels, model.pos_embed.device
    try:
        import diffusers  # deferred: an optional package
    except ImportError:
        return None
    module: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tiny:
            module = diffusers.AutoencoderTiny(latent_channels=channels, **TINY)
        else:
            n = len(KL["block_out_channels"])
            kinds = {
                "down_block_types": ("DownEncoderBlock2D",) * n,
                "up_block_types": ("UpDecoderBlock2D",) * n,
            }
            module = diffusers.AutoencoderKL(latent_channels=channels, **kinds, **KL)
    module.encoder = module.quant_conv = None
    module = module.to(device)
    if device.type == "cuda":  # as `load_vae` has it
        module = module.to(vae_dtype(model)).to(memory_format=torch.channels_last)
    return VAE(module.eval().requires_grad_(False))
