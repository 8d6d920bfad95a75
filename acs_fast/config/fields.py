"""What a setting is: its help, choices and checks; the settings that several commands share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any, ClassVar, Protocol, TypeVar

from acs_fast.config.presets import PRESETS


class Configuration(Protocol):
    """A dataclass, as the type checker sees it."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


REAL_OBJECTIVES = ("learnability", "density_ratio")  # those that are trained on real images too
BATCH_NORM_NETWORKS = ("resnet18", "resnet50", "resnet101")

T = TypeVar("T", bound=Configuration)


class InputError(ValueError):
    """Something the user gave is unusable; the message is one sentence that names it and says what to do."""


def option(default: Any, text: str, choices: tuple[str, ...] = (), cli: bool = True) -> Any:
    """A dataclass field with the help text and the choices that the command line shows."""
    return field(default=default, metadata={"help": text, "choices": choices, "cli": cli})


def dtype_option() -> Any:
    """The setting as `distill` and `bench` have it; so the next three."""
    return option(
        "auto",
        "the denoiser's; auto: bf16 where its linears are faster in it, else fp32",
        ("auto", "bf16", "fp16", "fp32"),
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


def discriminator_option() -> Any:
    """The network of the discriminators; see `check_discriminator`."""
    return option("convnet-3", "network: convnet-<depth>, resnet-18 or resnetap-10")


def check_discriminator(name: str) -> None:
    """Without BatchNorm: a discriminator must not hang on the number of ranks that train it."""
    require(
        name not in BATCH_NORM_NETWORKS,
        f"--discriminator {name} has BatchNorm, whose statistics would hang on how processes share a batch; "
        "use resnet-18",
    )


def require(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def check(config: Configuration, at_least_one: tuple[str, ...]) -> None:
    """What holds of every configuration: presets, choices, finite numbers, counts of at least 1, a seed."""
    presets = PRESETS[type(config).__name__]
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        wrong = f"--{f.name.replace('_', '-')} is {value!r}, it must be"
        require(not choices or value in (*choices, f.default), f"{wrong} one of {', '.join(choices)}")
        require(not isinstance(value, float) or math.isfinite(value), f"{wrong} finite")
        if f.name in at_least_one and value is not None:
            require(value >= 1, f"{wrong} at least 1")
        if f.name == "seed":
            require(0 <= value < 2**63, f"{wrong} 0 to 2^63 - 1")
        if f.name == "preset" and value is not None:
            require(value in presets, f"there is no preset {value!r}; use {', '.join(presets)}")
