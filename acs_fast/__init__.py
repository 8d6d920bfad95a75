"""Adversary-guided curriculum sampling: fast, trustworthy dataset distillation with diffusion models.

>>> from acs_fast import DistillConfig, distill, evaluate
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acs_fast.backends import Backend, get_backend
    from acs_fast.config import DistillConfig, EvaluateConfig, InputError, TrainConfig
    from acs_fast.curriculum import distill
    from acs_fast.evaluation import evaluate
    from acs_fast.parts import Discriminator, GuidedStep, philox_normal
    from acs_fast.pipeline import ACSPipeline, accelerate
    from acs_fast.schedulers import read_schedule
    from acs_fast.training import train

__version__ = "0.1.0"
__all__ = [
    "ACSPipeline",
    "Backend",
    "Discriminator",
    "DistillConfig",
    "EvaluateConfig",
    "GuidedStep",
    "InputError",
    "TrainConfig",
    "accelerate",
    "distill",
    "evaluate",
    "get_backend",
    "philox_normal",
    "read_schedule",
    "train",
]

_ROOMS = {
    "distill": "curriculum",
    "evaluate": "evaluation",
    "train": "training",
    "read_schedule": "schedulers",
    **dict.fromkeys(("ACSPipeline", "accelerate"), "pipeline"),
    **dict.fromkeys(("Backend", "get_backend"), "backends"),
    **dict.fromkeys(("Discriminator", "GuidedStep", "philox_normal"), "parts"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing the package imports no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS.get(name, 'config')}"), name)
