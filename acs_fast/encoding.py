"""`encode`: the real images of a data set through a model's VAE, into the latent cache."""

from __future__ import annotations

from pathlib import Path

import torch

from acs_fast.config import EncodeConfig, InputError
from acs_fast.data import DIGITS, select_classes
from acs_fast.environment import resolve_device
from acs_fast.latents import write_cache
from acs_fast.listing import list_images
from acs_fast.loader import resolve_loader
from acs_fast.models.checkpoint import read_config
from acs_fast.networks import checkpoint_path, load_own_vae, resolve_dtype, samples_pixels


def encode(config: EncodeConfig) -> tuple[Path, bool]:
    """Encode the training images of `config.real`, or this rank's share; the folder, and if it is whole.

    An interrupted cache is continued and ends with the same bytes. Raises InputError for a pixel model, for
    images that are missing, and for a folder that holds a cache of something else.
    """
    device, out = resolve_device(config.device), Path(config.out)
    if config.real == DIGITS:
        raise InputError("--real digits: the digits are grey and 8x8; name other images: --real FOLDER")
    loader = resolve_loader(config.loader)
    checkpoint = checkpoint_path(config.model)
    shape = read_config(checkpoint)
    if samples_pixels(shape):
        raise InputError(f"--model {config.model} samples pixels; there is nothing to encode for it")
    dtype = resolve_dtype(config.dtype, device, shape) if device.type == "cuda" else torch.float32
    vae = load_own_vae(config.vae, checkpoint, shape, device, dtype, encoder=True)
    classes, _ = select_classes(shape.class_names, config.classes)
    listing = list_images(config.real, "train", classes)
    if text := listing.summary():
        print(text, flush=True)
    cache = write_cache(
        out, listing, vae, vae.factor * shape.input_size,
        loader=loader, batch_size=config.batch_size, rank=config.rank, num_ranks=config.num_ranks,
    )  # fmt: skip
    return out, cache is not None
