"""Presets by command."""

from __future__ import annotations

from typing import Any


def _imagenet(name: str, steps: int, batch_size: int) -> dict[str, Any]:
    """`distill` of a class list by DiT-XL/2 with the field's sampler; steps, batch_size: the discriminators'.

    The window is LGD's (arXiv 2604.00519), respaced steps 10 to 45 of 50: their t/T are 204/1000 and
    917/1000, since step i is round(i * 999 / 49). IGD's, steps 30 to 45, would be 0.612 0.917. 50 DDPM steps,
    five curricula and `adversarial` are the class's defaults; five, the discriminators' training and the
    guidance's length are ours, and not yet measured on this model. No real images: the objective needs none,
    and an evaluation of the run names them, `--real FOLDER`.
    """
    return {
        "out": f"runs/{name}",
        "model": "facebook/DiT-XL-2-256",
        "classes": name,
        "guidance_window": (0.204, 0.917),
        "cfg_scale": 4.0,
        "discriminator_steps": steps,
        "discriminator_batch_size": batch_size,
    }


# name -> values other than the class's defaults; benchmarks/README.md says how the digits' were chosen
# The digits are the class defaults, so that DistillConfig() in Python is `acs-fast distill`.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "DistillConfig": {
        "digits": {},
        # at 50 images a class the last discriminator sees each of its samples 80, 80, 32 and 6 times
        "imagewoof": _imagenet("imagewoof", 500, 64),
        "imagenette": _imagenet("imagenette", 500, 64),
        "imagenet100": _imagenet("imagenet100", 1000, 128),
        "imagenet1k": _imagenet("imagenet1k", 1000, 256),
    },
    "EvaluateConfig": {
        "digits": {"protocol": ("hard-adamw",), "epochs": 400},
        # the one of the field's three networks that most tables have, and that of ImageNet-1K's tables
        "imagewoof": {"network": ("resnetap-10",)},
        "imagenette": {"network": ("resnetap-10",)},
        "imagenet100": {"network": ("resnetap-10",)},
        "imagenet1k": {"network": ("resnet-18",)},
    },
    "EncodeConfig": {"digits": {}},
    "TrainConfig": {"digits": {}},
    "BenchConfig": {"digits": {"model": "digits"}},
}
