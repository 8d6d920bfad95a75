"""Presets by command."""

from __future__ import annotations

from typing import Any

# name -> values other than the class's defaults; benchmarks/README.md says how they were chosen
# The digits are the class defaults, so that DistillConfig() in Python is `acs-fast distill`.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "DistillConfig": {"digits": {}},
    "EvaluateConfig": {"digits": {"protocol": "hard-adamw", "epochs": 400}},
    "EncodeConfig": {"digits": {}},
    "TrainConfig": {"digits": {}},
    "BenchConfig": {"digits": {"model": "digits"}},
}
