"""Frozen configurations and presets: the only place where a default value stands. Imports no torch."""

from acs_fast.config.distilling import DistillConfig
from acs_fast.config.fields import REAL_OBJECTIVES, Configuration, InputError
from acs_fast.config.others import BenchConfig, EncodeConfig, EvaluateConfig, TrainConfig
from acs_fast.config.presets import PRESETS
from acs_fast.config.resolving import resolve

__all__ = [
    "PRESETS",
    "REAL_OBJECTIVES",
    "BenchConfig",
    "Configuration",
    "DistillConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "InputError",
    "TrainConfig",
    "resolve",
]
