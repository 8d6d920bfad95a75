"""What a run's record keeps of its settings, for whoever continues it."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from acs_fast.config import DistillConfig, resolve
from acs_fast.data import DIGITS
from acs_fast.writer import RUN_CONFIG, is_record, read_json

# settings whose `auto` is resolved by measurement or by the machine: a run that is continued keeps its own
RESOLVED = ("dtype", "attention", "compile", "batch_size", "loader")


def with_absolute_paths(config: DistillConfig) -> DistillConfig:
    """The configuration as a later command can use it from any folder; the bundled names stay."""
    names = ("model", "real", "vae", "tiny_vae", "classes", "cache")
    given = {name: value for name in names if (value := getattr(config, name)) and value != DIGITS}
    exists = {name: os.path.isfile if name == "classes" else os.path.exists for name in given}
    paths = {name: os.path.abspath(value) for name, value in given.items() if exists[name](value)}
    return dataclasses.replace(config, **paths)


def keep_resolved(config: DistillConfig, out: Path, device: torch.device) -> DistillConfig:
    """The configuration with what the run in `out` resolved, on this kind of device, where it says auto."""
    stored = read_json(out / RUN_CONFIG) if (out / RUN_CONFIG).is_file() else None
    if stored is None or not is_record(stored) or str(stored.get("device")).partition(" ")[0] != device.type:
        return config
    auto = {name for name in RESOLVED if getattr(config, name) in ("auto", None)}
    values = {name: value for name, value in stored["config"].items() if name in auto}
    return resolve(DistillConfig, {**dataclasses.asdict(config), **values})


def warn_of_other_code(stored: dict[str, Any], record: dict[str, Any]) -> None:
    """Say so when a run is continued by another torch or another commit than it was started by."""

    def code(side: dict[str, Any]) -> str:
        versions = side.get("versions")
        torch_version = versions.get("torch") if isinstance(versions, dict) else None
        return f"torch {torch_version}, commit {side.get('commit')}"

    if code(stored) != code(record):
        print(
            f"warning: this run was started with {code(stored)} and goes on with {code(record)}; "
            "what is sampled now may differ in rounding",
            file=sys.stderr,
        )
