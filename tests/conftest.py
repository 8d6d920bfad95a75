"""Tiny runs that every end-to-end test shares."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before acs_fast.kernels.triton

from acs_fast import DistillConfig
from acs_fast.config import resolve

torch.backends.cudnn.allow_tf32 = False  # on a GPU too, fp32 is what errors are measured by
NEED_DIFFUSERS = [
    *("diffusers_checkpoint", "encode", "examples", "guided_step", "hub", "latent_runs", "latents", "parity"),
    *("pipeline", "schedulers", "vae"),
]
collect_ignore: list[str] = []
if importlib.util.find_spec("diffusers") is None:  # a GPU machine's own Python need not have it
    collect_ignore = [f"test_{name}.py" for name in NEED_DIFFUSERS]


def pytest_report_header() -> str:
    """Which files are left out, and why."""
    return f"left out, for diffusers is not installed: {', '.join(collect_ignore)}" if collect_ignore else ""


torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


@pytest.fixture
def two_digits(tmp_path: Path) -> str:
    """A class list of two digits."""
    path = tmp_path / "classes.txt"
    path.write_text("3\n8\n")
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path, two_digits: str):
    """Makes configurations of runs of seconds: 2 classes, 3 curricula, 4 steps, samples kept."""

    def make(**settings: object) -> DistillConfig:
        defaults = {
            "out": str(tmp_path / "run"),
            "classes": two_digits,
            "ipc": 4,
            "num_curricula": 3,
            "num_sampling_steps": 4,
            "guidance_window": [0.0, 1.0],
            "discriminator_steps": 3,
            "real_steps": 3,
            "batch_size": 3,
            "keep_latents": True,
        }
        return resolve(DistillConfig, {**defaults, **settings})

    return make
