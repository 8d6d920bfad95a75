"""The VAE of latent models: diffusers' `AutoencoderKL`, or `AutoencoderTiny`, as decoder and encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acs_fast.config import InputError
from acs_fast.models.checkpoint import resolve
from acs_fast.models.diffusers_format import part_folder, read_json
from acs_fast.models.dit import DiTConfig

BUDGET = {"cuda": 4 << 30, "cpu": 1 << 30}  # bytes that a decode or encode may need beyond its result
ACTIVATIONS = 4  # of the widest size at once: 3.1 are alive in both decoders, one is for workspaces
ENCODER = ("encoder.", "quant_conv.")  # where the names of its parameters begin


class VAE:
    """A VAE: latents [B, C, h, w] as the DiT makes them to images [B, 3, factor h, factor w] and back.

    The module stays as it is given.

    images = decoder(latents / scaling_factor + shift_factor), in about [-1, 1];
    latents = (encoder(images) - shift_factor) * scaling_factor, the mean of the posterior. `AutoencoderKL` of
    Stable Diffusion has scaling_factor 0.18215; `AutoencoderTiny` has the scaled latents themselves and 1.
    """

    def __init__(self, module: Any, budget: int | None = None):
        self.module = module
        settings, parameter = module.config, next(module.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.budget = budget or BUDGET.get(self.device.type, BUDGET["cpu"])
        self.latent_channels: int = settings.latent_channels
        self.scaling_factor: float = settings.scaling_factor
        self.shift_factor: float = settings.shift_factor or 0.0
        self.out_channels: int = settings.out_channels
        if type(module).__name__ == "AutoencoderTiny":
            self.widths = tuple(settings.decoder_block_out_channels)
            self.encoder_widths = tuple(reversed(settings.encoder_block_out_channels))
            growth = settings.upsampling_scaling_factor
        else:
            self.widths = self.encoder_widths = tuple(reversed(settings.block_out_channels))
            growth = 2
        self.growth: int = growth  # of the edges, from stage to stage
        self.factor: int = growth ** (len(self.widths) - 1)

    def bytes_per_image(self, height: int, width: int) -> int:
        """What decoding latents [C, height, width] needs: `ACTIVATIONS` times the widest activation."""
        before = (self.widths[0], *self.widths)  # a stage starts with the channels of the one before it
        return self._peak([max(pair) for pair in zip(before, self.widths, strict=False)], height, width)

    def bytes_per_encoded(self, height: int, width: int) -> int:
        """What encoding an image to latents [C, height, width] needs: the same of the encoder."""
        widths = self.encoder_widths
        before = (*widths[1:], widths[-1])  # a stage starts with the channels of the finer one
        return self._peak([max(pair) for pair in zip(before, widths, strict=True)], height, width)

    def digest(self) -> str:
        """SHA-256 of names, dtypes and bytes of the decoder's weights, whether the encoder is kept or not."""
        return self._digest(False)

    def encoder_digest(self) -> str:
        """SHA-256 of what the latents of an image hang on: the encoder's weights, scaling and shift."""
        return self._digest(True, f"{self.scaling_factor!r} {self.shift_factor!r}")

    @torch.no_grad()
    def decode(self, latents: Tensor, out: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] of latents [B, C, h, w], in the VAE's dtype or into `out` of any float dtype.

        Batches beyond the memory budget are decoded in equal parts, which changes rounding at most.
        """
        b, _, h, w = latents.shape
        if out is None:
            shape = (b, self.out_channels, self.factor * h, self.factor * w)
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        size = self._part(b, self.bytes_per_image(h, w))
        for start in range(0, b, size):
            out[start : start + size] = self.decode_differentiable(latents[start : start + size])
        return out

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents fp32 [B, C, h, w] of images [B, 3, H, W] in [-1, 1] of any float dtype: no noise is drawn.

        H and W are multiples of `factor`. Batches beyond the memory budget are encoded in equal parts.
        Raises ValueError where the encoder was left out.
        """
        if self.module.encoder is None:
            raise ValueError("this VAE was loaded without its encoder; load_vae(..., encoder=True) keeps it")
        b, _, height, width = images.shape
        h, w = height // self.factor, width // self.factor
        out = torch.empty(b, self.latent_channels, h, w, device=self.device)
        size = self._part(b, self.bytes_per_encoded(h, w))
        for start in range(0, b, size):
            x = self._layout(images[start : start + size].to(self.device, self.dtype))
            found = self.module.encode(x, return_dict=False)[0]
            mean = found if isinstance(found, Tensor) else found.mode()  # AutoencoderTiny has no posterior
            out[start : start + size] = (mean.float() - self.shift_factor) * self.scaling_factor
        return out

    def decode_differentiable(self, latents: Tensor) -> Tensor:
        """As `decode`, all at once and with the gradient to the latents."""
        z = (latents.to(self.device) / self.scaling_factor + self.shift_factor).to(self.dtype)
        return self.module.decode(self._layout(z), return_dict=False)[0]

    def _layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else x

    def _part(self, batch: int, each: int) -> int:
        """How many of a batch to work on together, each of which needs so many bytes: equal parts."""
        parts = -(-batch * each // self.budget)
        return max(1, -(-batch // max(1, parts)))

    def _peak(self, channels: list[int], height: int, width: int) -> int:
        sizes = [most * self.growth ** (2 * stage) for stage, most in enumerate(channels)]
        return ACTIVATIONS * max(sizes) * height * width * self.dtype.itemsize

    def _digest(self, encoder: bool, text: str = "") -> str:
        total = hashlib.sha256(text.encode())
        for name, value in sorted(self.module.state_dict().items()):
            if name.startswith(ENCODER) == encoder:
                total.update(f"{name} {value.dtype}".encode())
                total.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()


def load_vae(
    source: str,
    tiny: bool,
    device: torch.device,
    dtype: torch.dtype,
    budget: int | None = None,
    encoder: bool = False,
) -> VAE:
    """The VAE of a folder (its own or its pipeline's, in diffusers format) or of a Hugging Face id.

    tiny: an `AutoencoderTiny` is wanted, else an `AutoencoderKL`. dtype: bf16 on CUDA, where the weights are
    laid out channels-last; fp32 elsewhere. budget: bytes a decode or encode may need; default `BUDGET`.
    encoder: whether it is kept; else `encode` cannot be called.
    Raises InputError for a source that is missing, damaged, incomplete or of another class.
    """
    folder = _folder(resolve(source, "vae"), tiny)
    try:
        import diffusers  # deferred: an optional package
    except ImportError as error:
        raise InputError(f"VAE {source} needs diffusers: pip install 'acs-fast[diffusers]'") from error
    name = "AutoencoderTiny" if tiny else "AutoencoderKL"
    try:
        module, report = getattr(diffusers, name).from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many kinds for a damaged file or a wrong configuration
        reason = str(error).strip().splitlines() or [""]
        raise InputError(
            f"VAE {folder} cannot be loaded ({type(error).__name__}: {reason[0][:160]}); "
            "copy or download it again"
        ) from error
    _check_complete(folder, module, report)
    if getattr(module.config, "latents_mean", None) is not None:
        raise InputError(
            f"VAE {folder} normalises its latents by channel, which DiTs do not; give another --vae"
        )
    if not encoder:
        module.encoder = module.quant_conv = None
    module = module.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        module = module.to(memory_format=torch.channels_last)
    return VAE(module, budget)


def check_fits(vae: VAE, config: DiTConfig) -> None:
    """InputError for a VAE whose latents have other channels than the DiT's samples."""
    if vae.latent_channels != config.in_channels:
        raise InputError(
            f"the VAE has {vae.latent_channels} latent channels, the model samples {config.in_channels}; "
            "give the VAE that the model was trained with"
        )


def _folder(path: Path, tiny: bool) -> Path:
    """The folder of the VAE itself, once its configuration names the class that is wanted."""
    folder, wanted = part_folder(path, "vae"), "AutoencoderTiny" if tiny else "AutoencoderKL"
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{path} holds no VAE in diffusers format: {path}/config.json is missing; give a VAE's "
            "folder or its pipeline's"
        )
    found = read_json(folder / "config.json").get("_class_name")
    if found != wanted:
        flag = "--tiny-vae" if tiny else "--vae"
        raise InputError(
            f"VAE {folder} is of class {found}, {flag} needs {wanted}; give another folder or id"
        )
    return folder


def _check_complete(folder: Path, module: nn.Module, report: dict[str, Any]) -> None:
    """What diffusers only logs: tensors that the file lacks keep their random start values."""
    for kind, names in (("lacks", report["missing_keys"]), ("has the unexpected", report["unexpected_keys"])):
        if names:
            listed = ", ".join(sorted(names)[:5])
            raise InputError(f"VAE {folder} {kind} {listed}; its weights do not fit its configuration")
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise InputError(f"VAE {folder}: {name} holds NaN or infinite values; copy or download it again")
