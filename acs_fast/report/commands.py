"""The commands that make what a page shows, as they are typed."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from acs_fast.config import EvaluateConfig
from acs_fast.report.results import Evaluation, Protocol, Redundancy
from acs_fast.writer import RUN_CONFIG

FLAGS = {field.name for field in dataclasses.fields(EvaluateConfig)}


def distill(run: Path, *more: str) -> str:
    """The run again, in a folder beside it."""
    again = run.with_name(f"{run.resolve().name}-again")
    return shlex.join(["acs-fast", "distill", "--config", str(run / RUN_CONFIG), "--out", str(again), *more])


def resume(run: Path) -> str:
    """The rest of a run that is not finished."""
    return shlex.join(["acs-fast", "distill", "--config", str(run / RUN_CONFIG), "--out", str(run)])


def report(run: Path) -> str:
    """The page again."""
    return shlex.join(["acs-fast", "report", str(run)])


def evaluate(run: Path, *more: str) -> str:
    """An evaluation with the defaults of the run."""
    return shlex.join(["acs-fast", "evaluate", str(run), *more])


def evaluation(run: Path, found: Evaluation) -> str:
    """The same evaluation again."""
    epochs = found.protocol.epochs[0]
    settings: dict[str, Any] = {
        **protocol_settings(found.protocol),
        "epochs": epochs if epochs != found.protocol_epochs else None,
        "repeats": found.repeats,
        "seed": found.seed,
        "baselines": ",".join(found.baselines) or None,
        "real": found.real or None,
        **found.flags,
    }
    return evaluate(run, *flags(settings))


def redundancy(run: Path, found: Redundancy | None = None) -> str:
    """The redundancy figures again, or for the first time."""
    settings = {} if found is None else protocol_settings(found.protocol)
    if found is not None:
        epochs = set(found.protocol.epochs)  # if they are the protocol's own, they may differ by increment
        settings |= {
            "epochs": epochs.pop() if len(epochs) == 1 else None,
            "repeats": found.repeats,
            "seed": found.seed,
            "baselines": ",".join(found.baselines) or None,
            "real": found.real or None,
            **found.flags,
        }
    return evaluate(run, "--redundancy", *flags(settings))


def protocol_settings(protocol: Protocol) -> dict[str, Any]:
    """The settings that make a protocol's results what they are, but for the epochs."""
    return {
        "protocol": protocol.name,
        "network": protocol.network,
        "image_size": protocol.image_size,
        "ipc": protocol.ipc,
    }


def flags(settings: dict[str, Any]) -> list[str]:
    """The settings that `evaluate` has, as flags; those that are None are left out."""
    given = {name: value for name, value in settings.items() if name in FLAGS and value is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
