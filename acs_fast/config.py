"""Frozen configurations and presets: the only place where a default value stands. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


class Configuration(Protocol):
    """A dataclass, as the type checker sees it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


REAL_OBJECTIVES = ("learnability", "density_ratio")  # those that are trained on real images too

T = TypeVar("T", bound=Configuration)


class InputError(ValueError):
    """Something the user gave is unusable; the message is one sentence that names it and says what to do."""


def option(default: Any, text: str, choices: tuple[str, ...] = (), cli: bool = True) -> Any:
    """A dataclass field with the help text and the choices that the command line shows."""
    return field(default=default, metadata={"help": text, "choices": choices, "cli": cli})


def dtype_option() -> Any:
    """The setting as `distill` and `bench` have it; so the next three."""
    return option(
        "auto", "the denoiser's; auto: bf16 where its linears are faster in it", ("auto", "bf16", "fp32")
    )


def attention_option() -> Any:
    """The attention kernel."""
    kernels = ("auto", "cudnn", "flash", "efficient", "math", "xformers")
    return option("auto", "attention kernel; auto: the fastest here", kernels)


def compile_option() -> Any:
    """Whether the CPU's elementwise ops are compiled."""
    text = "on a CPU, compile the denoiser's elementwise ops; auto: for large models, if it is faster"
    return option("auto", text, ("auto", "on", "off"))


def guidance_space_option() -> Any:
    """Where the gradient is taken."""
    text = "what the discriminator sees: the sample itself, or its decode by the (tiny) VAE"
    return option("latent", text, ("latent", "pixel", "pixel-tiny"))


def loader_option() -> Any:
    """Which loader decodes real images."""
    return option("auto", "decodes real images; auto: DALI where it is installed", ("auto", "dali", "pil"))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def _check(config: Configuration, at_least_one: tuple[str, ...]) -> None:
    """What holds of every configuration: presets, choices, finite numbers, counts of at least 1, a seed."""
    presets = PRESETS[type(config)]
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        wrong = f"--{f.name.replace('_', '-')} is {value!r}, it must be"
        _require(not choices or value in (*choices, f.default), f"{wrong} one of {', '.join(choices)}")
        _require(not isinstance(value, float) or math.isfinite(value), f"{wrong} finite")
        if f.name in at_least_one and value is not None:
            _require(value >= 1, f"{wrong} at least 1")
        if f.name == "seed":
            _require(0 <= value < 2**63, f"{wrong} 0 to 2^63 - 1")
        if f.name == "preset" and value is not None:
            _require(value in presets, f"there is no preset {value!r}; use {', '.join(presets)}")


@dataclass(frozen=True)
class DistillConfig:
    """What `distill` does: model, method (METHOD.md equations 1 to 4) and output. Every field is a flag."""

    preset: str = option("digits", "named set of defaults for the fields below")
    out: str = option("runs/digits", "output folder; an interrupted run there is continued")
    model: str = option(
        "digits",
        "DiT: the bundled 'digits', a Hugging Face id or folder in diffusers format, an official .pt, or our "
        ".safetensors",
    )
    vae: str | None = option(
        None,
        "VAE of a latent model: Hugging Face id or folder in diffusers format; default: the model folder's "
        "own, else stabilityai/sd-vae-ft-mse",
    )
    tiny_vae: str = option(
        "madebyollin/taesd", "AutoencoderTiny of --guidance-space pixel-tiny: id or folder"
    )
    real: str = option(
        "digits",
        "real images: the bundled 'digits', a folder train/<class>/*, val/<class>/*, or WebDataset shards",
    )
    loader: str = loader_option()
    cache: str | None = option(
        None,
        "latents of the real images, as `encode` makes them, for latent models whose objective needs real "
        "images; made there if absent; default: latents/ in the output folder",
    )
    classes: str | None = option(
        None,
        "class names or label numbers, comma-separated, a text file with one a line (ImageNet: wnids) or one "
        "of the lists imagewoof, imagenette, imagenet1k; "
        "default: all of the model's",
    )
    ipc: int = option(10, "images per class")
    num_curricula: int = option(5, "number of curricula the ipc images are split into")
    objective: str = option(
        "adversarial",
        "what the guidance ascends; learnability and density_ratio are trained on real images too",
        ("adversarial", "nonsaturating", "learnability", "density_ratio"),
    )
    omega: float = option(1.0, "weight of the real-image classifier in the learnability objective")
    repulsion: float = option(
        0.0, "weight of the repulsion from the nearest earlier sample of the class (IGD's diversity term)"
    )
    guidance_scale: float = option(
        0.15, "length of the guidance step in trust radii; 0 samples without guidance"
    )
    trust_radius: str = option("sigma", "unit of the guidance step", ("sigma", "eps"))
    guidance_window: tuple[float, float] = option((0.1, 0.7), "guide while t/T lies in this closed interval")
    guidance_space: str = guidance_space_option()
    jacobian: str = option("identity", "how d x0 / d x_t is taken", ("identity", "full"))
    cfg_scale: float = option(2.0, "classifier-free guidance scale; 1 is the conditional model")
    cfg_channels: int | None = option(
        None, "guide the first so many channels (3 for the official DiT); default all"
    )
    num_sampling_steps: int = option(50, "denoising steps after respacing")
    sampler: str = option("ddpm", "sampler", ("ddpm", "ddim"))
    eta: float = option(0.0, "DDIM noise level: 0 deterministic, 1 as much as DDPM")
    variance: str = option(
        "auto",
        "DDPM variance; auto: learned_range if the model has it",
        ("auto", "learned_range", "fixed_small"),
    )
    clip_denoised: bool | None = option(
        None, "clamp the predicted x0 to [-1, 1]; default: for pixel models, not for latent ones"
    )
    discriminator: str = option("convnet-3", "network: convnet-<depth>, resnet-18 or resnetap-10")
    discriminator_init: str = option(
        "scratch", "start each discriminator anew or from the last one", ("scratch", "warm")
    )
    discriminator_steps: int = option(100, "training steps of each discriminator")
    discriminator_lr: float = option(3e-3, "AdamW learning rate of the discriminators")
    discriminator_batch_size: int = option(64, "images per training step of the discriminators")
    real_steps: int = option(2000, "training steps of the real-image classifier (learnability)")
    batch_size: int | None = option(
        None, "images sampled together; default: 66 on a GPU, 4 on a CPU, 100 for small models"
    )
    seed: int = option(0, "seed of the run: noise is keyed by (seed, class, index, step)")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    backend: str = option(
        "auto", "kernels: auto (the fastest here), cuda, triton, reference (plain PyTorch) or op=backend,..."
    )
    dtype: str = dtype_option()
    attention: str = attention_option()
    compile: str = compile_option()

    def __post_init__(self) -> None:
        counts = (
            "num_curricula",
            "discriminator_steps",
            "discriminator_batch_size",
            "real_steps",
            "batch_size",
        )
        _check(self, counts)
        low, high = self.guidance_window
        curricula, steps = self.num_curricula, self.num_sampling_steps
        _require(
            self.ipc >= curricula,
            f"--ipc {self.ipc} is smaller than --num-curricula {curricula}; "
            "every curriculum needs an image of each class",
        )
        _require(2 <= steps <= 1000, f"--num-sampling-steps is {steps}, it must be 2 to 1000")
        _require(0 <= low <= high <= 1, f"--guidance-window {low} {high} is no interval inside 0 to 1")
        _require(self.repulsion >= 0, f"--repulsion is {self.repulsion}, it must not be negative")
        _require(
            self.guidance_scale >= 0, f"--guidance-scale is {self.guidance_scale}, it must not be negative"
        )
        _require(0 <= self.eta <= 1, f"--eta is {self.eta}, it must be 0 to 1")
        _require(
            self.discriminator_lr > 0, f"--discriminator-lr is {self.discriminator_lr}, it must be positive"
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """How to judge a distilled set: fresh classifiers trained on it alone, tested on real held-out images."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    path: str = option("runs/digits", "run folder or image folder <class>/*.png", cli=False)
    real: str | None = option(None, "real images: 'digits' or a folder; default: those of the run")
    protocol: str | None = option(
        None,
        "training protocol; default hard-sgd, hard-adamw for runs on the bundled digits",
        ("hard-sgd", "hard-adamw"),
    )
    network: str | None = option(
        None, "convnet-<depth>, resnet-18 or resnetap-10; default: convnet of the size's depth"
    )
    ipc: int | None = option(None, "use the first so many images of each class; default all")
    repeats: int = option(3, "classifiers trained, with seeds seed, seed + 1, ...")
    epochs: int | None = option(None, "training epochs; default: the protocol's, by ipc")
    baselines: tuple[str, ...] = option(
        (), "comma-separated: random (real images), plain (unguided sampling)"
    )
    seed: int = option(0, "seed of the first repeat")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        _check(self, ("ipc", "repeats", "epochs"))
        for name in self.baselines:
            _require(name in ("random", "plain"), f"there is no baseline {name!r}; use random, plain or both")


@dataclass(frozen=True)
class EncodeConfig:
    """What `encode` puts through which VAE: the latent cache of a set of real images."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    out: str = option("runs/latents", "the cache's folder; an interrupted one is continued")
    real: str = option("", "real images: a folder train/<class>/* or <class>/*, or WebDataset shards")
    model: str = option("facebook/DiT-XL-2-256", "the latent DiT that they are for, as distill takes it")
    vae: str | None = option(None, "its VAE, as distill takes it")
    classes: str | None = option(
        None, "class names or label numbers, comma-separated or a text file; default: all of the model's"
    )
    loader: str = loader_option()
    batch_size: int = option(16, "images encoded together")
    dtype: str = option(
        "auto", "the VAE's on a GPU: that of distill's --dtype; auto: bf16", ("auto", "bf16", "fp32")
    )
    rank: int = option(0, "this process's number, where several share the work")
    num_ranks: int = option(1, "how many processes share the work")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        _check(self, ("batch_size", "num_ranks"))
        _require(
            0 <= self.rank < self.num_ranks,
            f"--rank is {self.rank}, it must be 0 to --num-ranks - 1, {self.num_ranks - 1}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How a DiT is trained: epsilon prediction with learned-range variance (the hybrid loss of IDDPM)."""

    preset: str = option("digits", "named set of defaults for the fields below")
    out: str = option("runs/dit", "output folder for model.safetensors and train.json")
    real: str = option("digits", "training images: the bundled 'digits' or a folder train/<class>/*")
    hidden_size: int = option(128, "width of the transformer")
    depth: int = option(5, "number of blocks")
    num_heads: int = option(4, "attention heads")
    patch_size: int = option(2, "patch edge in pixels")
    iterations: int = option(13000, "training steps")
    batch_size: int = option(64, "images per step")
    lr: float = option(1e-3, "peak AdamW learning rate, cosine to zero after a short warm-up")
    weight_decay: float = option(0.01, "AdamW weight decay")
    class_dropout_prob: float = option(0.1, "probability of the null label, for classifier-free guidance")
    ema_decay: float = option(0.999, "decay of the exponential moving average that is saved")
    seed: int = option(0, "seed of weights, batches and noise")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        _check(self, ("hidden_size", "depth", "num_heads", "patch_size", "iterations", "batch_size"))
        dropped = self.class_dropout_prob
        _require(self.lr > 0, f"--lr is {self.lr}, it must be positive")
        _require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}, it must not be negative")
        _require(0 <= dropped < 1, f"--class-dropout-prob is {dropped}, it must be 0 or more and below 1")
        _require(
            0 <= self.ema_decay < 1, f"--ema-decay is {self.ema_decay}, it must be 0 or more and below 1"
        )


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` times, of which model, where. Settings of sampling are those of `distill`."""

    preset: str | None = option(None, "named set of defaults for the fields below")
    what: str = option("step", "what is timed", ("step", "trajectory", "discriminator"), cli=False)
    model: str = option(
        "dit-xl-2",
        "a size, with random weights (dit-xl-2, dit-l-4, dit-s-8, ...), or a checkpoint as distill takes it",
    )
    batch_size: int | None = option(
        None,
        "images sampled together, or of a discriminator's training step; default: distill's on this device",
    )
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda"))
    backend: str = option("auto", "kernels: auto (the fastest here), cuda, triton or op=backend,...")
    dtype: str = dtype_option()
    attention: str = attention_option()
    compile: str = compile_option()
    guidance_space: str = guidance_space_option()
    discriminator: str = option("convnet-3", "network: convnet-<depth>, resnet-18 or resnetap-10")
    num_classes: int = option(
        10, "classes of the batch, which the discriminator tells apart; at most the model's"
    )
    num_sampling_steps: int = option(50, "denoising steps of a trajectory")
    repeats: int = option(5, "timed rounds")

    def __post_init__(self) -> None:
        _check(self, ("batch_size", "repeats"))
        _require(self.num_classes >= 2, f"--num-classes is {self.num_classes}, it must be at least 2")


# name -> values other than the class's defaults; benchmarks/README.md says how they were chosen
# The digits are the class defaults, so that DistillConfig() in Python is `acs-fast distill`.
PRESETS: dict[type, dict[str, dict[str, Any]]] = {
    DistillConfig: {"digits": {}},
    EvaluateConfig: {"digits": {"protocol": "hard-adamw", "epochs": 400}},
    EncodeConfig: {"digits": {}},
    TrainConfig: {"digits": {}},
    BenchConfig: {"digits": {"model": "digits"}},
}


def resolve(cls: type[T], given: dict[str, Any], file: str | None = None) -> T:
    """A configuration from, in falling order, the given values, a JSON or YAML file, preset and defaults.

    Raises InputError for an unknown preset, a name that is no field, or a value of the wrong type.
    """
    values = {**(_read_file(Path(file)) if file else {}), **given}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{key!r} is no setting of {cls.__name__}; known: {', '.join(fields)}")
        values[key] = _convert(key, value, hints[key])
    preset = PRESETS[cls].get(values.get("preset", fields["preset"].default), {})
    return cls(**{**preset, **values})


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; JSON and YAML have lists for tuples and integers for floats."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            raise InputError(f"{name} is {value!r}, it must be a list like {kind}")
        return tuple(_convert(name, part, parts[0]) for part in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}, it must be {kind.__name__}")
    return value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        if path.suffix in (".yaml", ".yml"):
            import yaml  # deferred: the command line starts without it

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(
            f"configuration {path} cannot be read ({error}); give a JSON or YAML file"
        ) from error
    except Exception as error:  # yaml.YAMLError, a class of the deferred module
        raise InputError(f"configuration {path} is not valid YAML ({error})") from error
    if isinstance(values, dict):
        values = values.get("config", values)  # a run's own config.json serves too
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} holds no settings; write one 'name: value' a line")
    return values
