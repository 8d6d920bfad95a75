"""What the methods of a comparison share: models with random weights, settings, the work of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast.config import DistillConfig
from acs_fast.guidance import Guidance
from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import FREQUENCY_EMBEDDING_SIZE, DiT, DiTConfig, official_config, sincos_pos_embed

DIFFUSERS: dict[str, Any] = {
    "mlp_norm_eps": 1e-5,
    "downscale_freq_shift": 1,
}  # where its DiT differs from the official one
MODELS = {
    "dit-xl-2": dataclasses.replace(official_config("DiT-XL/2"), **DIFFUSERS),
    "small": DiTConfig(8, 2, hidden_size=64, depth=2, num_heads=4, num_classes=7, **DIFFUSERS),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUM_CLASSES = 10  # of the run, which the discriminator tells apart: the subsets that the field distils
CFG_SCALE = 4.0
VAE_FACTOR = 8  # pixels per latent edge


def random_dit(config: DiTConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> DiT:
    """A frozen DiT with random weights, no gate of it zero: the same numbers, rounded, in every dtype."""
    with torch.device("meta"):
        model = DiT(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            parameter.copy_(sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size))
            continue
        spread = 0.02 if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())
        if "adaLN_modulation" in name:  # gates of either sign, scales around 1
            spread = 0.2 if parameter.dim() < 2 else 0.5 * spread
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, device=device))
    return model


def denoiser_flops(config: DiTConfig) -> int:
    """2 x multiply-add of one branch of one sample: linears, attention and the patch convolution."""
    d, t = config.hidden_size, (config.input_size // config.patch_size) ** 2
    patch = config.in_channels * config.patch_size**2
    block = 2 * t * d * (3 * d + d + 8 * d) + 4 * t * t * d + 2 * d * 6 * d
    outputs = patch * (2 if config.learn_sigma else 1)
    ends = 2 * t * patch * d + 2 * d * (FREQUENCY_EMBEDDING_SIZE + d) + 2 * d * 2 * d + 2 * t * d * outputs
    return config.depth * block + ends


def gemm_shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Of a block's linears: name -> (K, N)."""
    d = config.hidden_size
    return {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, 4 * d), "fc2": (4 * d, d)}


def gemm_rows(config: DiTConfig, batch_size: int) -> int:
    """Rows of a block's linears with classifier-free guidance: 2 B T."""
    return 2 * batch_size * (config.input_size // config.patch_size) ** 2


def run_config(steps: int, batch_size: int, device: torch.device, **settings: Any) -> DistillConfig:
    """A run in which every step is guided: learned-range DDPM, CFG on all channels."""
    values: dict[str, Any] = {
        "num_sampling_steps": steps,
        "batch_size": batch_size,
        "cfg_scale": CFG_SCALE,
        "guidance_window": (0.0, 1.0),
        "device": device.type,
    }
    return DistillConfig(**{**values, **settings})


def guidance(config: DistillConfig, channels: int, size: int, device: torch.device) -> Guidance:
    """The guidance of a run by an untrained discriminator, whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = build_classifier(config.discriminator, channels, NUM_CLASSES, size)
    network = network.eval().requires_grad_(False).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
    return Guidance(config.objective, network, None, config.omega, *how_far)


@dataclass(frozen=True)
class Batch:
    """The labels of a batch: the denoiser's, the discriminator's, and the image's number in its class."""

    class_labels: Tensor  # int64 [B]
    targets: Tensor  # int64 [B]
    indices: Tensor  # int64 [B]


def run_labels(config: DiTConfig) -> list[int]:
    """The model's labels of the run's classes."""
    count = min(NUM_CLASSES, config.num_classes)
    return [number * (config.num_classes // count) for number in range(count)]


def batch(config: DiTConfig, batch_size: int, device: torch.device) -> Batch:
    """B images of the run's classes in turn."""
    numbers = torch.arange(batch_size, device=device)
    labels = torch.tensor(run_labels(config), device=device)
    targets = numbers % len(labels)
    class_labels = labels[targets]
    return Batch(class_labels, targets, numbers)


def random_vae(dtype: torch.dtype, device: torch.device, width: int = 128) -> Callable[[Tensor], Tensor]:
    """Decode of diffusers' AutoencoderKL in the shape of Stable Diffusion's, with random weights.

    [B, 4, h, w] to [B, 3, 8h, 8w], differentiable. ImportError without diffusers.
    """
    from diffusers import AutoencoderKL  # deferred: an optional package

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=min(32, width),
        )
    vae.eval().requires_grad_(False)
    nn.Module.to(vae, device=device, dtype=dtype)

    def decode(latents: Tensor) -> Tensor:
        out: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return out

    return decode
