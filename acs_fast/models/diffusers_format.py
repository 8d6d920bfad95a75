"""DiTs in diffusers format: what its configurations mean and where each official parameter is stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from acs_fast.config import InputError
from acs_fast.models.dit import DiTConfig, sincos_pos_embed
from acs_fast.models.weights import Weights, list_weights

WEIGHTS = "diffusion_pytorch_model"  # what diffusers calls its weight files

# diffusers' settings that the DiT's code has built in; a setting that is not there has diffusers' default
FIXED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
# the noise schedule of acs_fast/diffusion.py; the first four stand in every scheduler that has one
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}
REQUIRED_SCHEDULE = 4


@dataclass(frozen=True)
class Layout:
    """Where the official parameters are in a file: `parts`, joined along the first axis, for each of them.

    copies: tensors that must equal the one they are listed under. constants: parameters that are computed,
    and the tensor that a file may hold of each.
    """

    parts: Mapping[str, tuple[str, ...]]
    copies: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, tuple[str, Tensor]] = dataclasses.field(default_factory=dict)


def part_folder(path: Path, part: str) -> Path:
    """The folder of one part of a diffusers pipeline, or the folder itself if it is that part."""
    return path / part if (path / part / "config.json").is_file() else path


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a part, shards in the order of their names; [] if there are none or one is missing.

    Safetensors before `.bin`, one file before shards.
    """
    for kind in ("safetensors", "bin"):
        file, index = folder / f"{WEIGHTS}.{kind}", folder / f"{WEIGHTS}.{kind}.index.json"
        files = [file]
        if not file.is_file() and index.is_file():
            shards = read_json(index).get("weight_map")
            names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
            files = [folder / Path(name).name for name in sorted(names)]
        if files and all(file.is_file() for file in files):
            return files
    return []


def read_folder(path: Path) -> tuple[Weights, DiTConfig, Layout]:
    """A model in diffusers format: the pipeline's folder or its transformer's."""
    folder = part_folder(path, "transformer")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"folder {path} holds no model in diffusers format: {path}/transformer/config.json is missing; "
            "give a pipeline's folder, its transformer folder or a checkpoint file"
        )
    config = read_dit_config(read_json(folder / "config.json"), str(folder / "config.json"))
    scheduler = path / "scheduler" / "scheduler_config.json"
    if folder != path and scheduler.is_file():
        check_scheduler(scheduler)
    files = weight_files(folder)
    if not files:
        raise InputError(f"folder {folder} holds no {WEIGHTS}.safetensors or .bin; copy or download it again")
    lists = [list_weights(file)[0] for file in files]
    weights = Weights(
        {name: file for part in lists for name, file in part.files.items()},
        {name: shape for part in lists for name, shape in part.shapes.items()},
    )
    return weights, config, diffusers_layout(config)


def read_dit_config(stored: Mapping[str, Any], file: str) -> DiTConfig:
    """The DiTConfig of a `DiTTransformer2DModel`, as diffusers 0.36 to 0.42 runs it.

    stored: its settings. file: where they stand, for the sentence of an InputError.
    """
    name = stored.get("_class_name", "DiTTransformer2DModel")
    if name not in ("DiTTransformer2DModel", "Transformer2DModel"):  # the second: what it was until 0.28
        raise InputError(f"{file} describes a {name}, not a DiT; give a DiT's folder")
    for key, value in FIXED.items():
        if stored.get(key, value) != value:
            raise InputError(f"{file} has {key} {stored[key]!r}, a DiT has {value!r}; give another model")
    try:
        in_channels, out_channels = stored.get("in_channels", 4), stored.get("out_channels")
        if out_channels not in (None, in_channels, 2 * in_channels):
            raise ValueError(f"out_channels {out_channels} for in_channels {in_channels}")
        num_heads = stored.get("num_attention_heads", 16)
        return DiTConfig(
            input_size=stored.get("sample_size", 32),
            patch_size=stored.get("patch_size", 2),
            in_channels=in_channels,
            hidden_size=num_heads * stored.get("attention_head_dim", 72),
            depth=stored.get("num_layers", 28),
            num_heads=num_heads,
            num_classes=stored.get("num_embeds_ada_norm", 1000),
            learn_sigma=out_channels == 2 * in_channels,
            mlp_norm_eps=float(stored.get("norm_eps", 1e-5)),
            downscale_freq_shift=1,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{file} describes no DiT that can be run ({error}); give another model") from error


def diffusers_layout(config: DiTConfig) -> Layout:
    """diffusers' tensor of every official parameter: its `scripts/convert_dit_to_diffusers.py` backwards."""
    first = "transformer_blocks.0.norm1.emb"
    modules: dict[str, tuple[str, ...]] = {
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": (f"{first}.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (f"{first}.timestep_embedder.linear_2",),
        "y_embedder.embedding_table": (f"{first}.class_embedder.embedding_table",),
    }
    for i in range(config.depth):
        block, stored = f"blocks.{i}", f"transformer_blocks.{i}"
        modules |= {
            f"{block}.attn.qkv": tuple(f"{stored}.attn1.to_{x}" for x in "qkv"),
            f"{block}.attn.proj": (f"{stored}.attn1.to_out.0",),
            f"{block}.mlp.fc1": (f"{stored}.ff.net.0.proj",),
            f"{block}.mlp.fc2": (f"{stored}.ff.net.2",),
            f"{block}.adaLN_modulation.1": (f"{stored}.norm1.linear",),
        }
    modules |= {"final_layer.adaLN_modulation.1": ("proj_out_1",), "final_layer.linear": ("proj_out_2",)}
    parts = {
        f"{name}.{kind}": tuple(f"{module}.{kind}" for module in stored)
        for name, stored in modules.items()
        for kind in (("weight", "bias") if name != "y_embedder.embedding_table" else ("weight",))
    }
    copies = {
        part: tuple(part.replace(".0.", f".{i}.", 1) for i in range(1, config.depth))
        for (part, *_) in parts.values()
        if part.startswith(first)
    }
    table = sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size)
    return Layout(parts, copies, {"pos_embed": ("pos_embed.pos_embed", table)})


def check_scheduler(file: Path) -> None:
    """InputError for a diffusers scheduler of another noise schedule than this package samples with."""
    stored = read_json(file)
    for number, (key, value) in enumerate(SCHEDULE.items()):
        if stored.get(key, None if number < REQUIRED_SCHEDULE else value) != value:
            raise InputError(
                f"{file} has {key} {stored.get(key)!r}, this version samples with {value!r} alone (epsilon "
                "prediction, linear betas 0.0001 to 0.02, 1000 steps); give a model of that schedule"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's settings; InputError for one that holds none."""
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("it is no dictionary")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); copy or download it again") from error
    return values
