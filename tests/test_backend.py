"""Which backend serves which op: choices, refusals with their reasons, and a run by another backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from acs_fast import ops
from acs_fast.config import InputError
from acs_fast.curriculum import distill
from acs_fast.kernels import reference
from acs_fast.writer import read_tensors

CPU = torch.device("cpu")
NO_CUDA = ops.why_not("guided_step", "cuda", CPU) or ""  # no library here, or no GPU


def test_every_op_has_a_reference() -> None:
    chosen = ops.select("auto", CPU)
    assert set(chosen.sources) == set(ops.OPS)
    assert set(chosen.sources.values()) == {"reference"}, "the interpreter is no choice of `auto`"
    assert all(getattr(chosen, op) is getattr(reference, op) for op in ops.OPS)


def test_a_choice_op_by_op() -> None:
    chosen = ops.select(ops.parse_choice("guided_step=triton, to_uint8=reference"), CPU)
    assert chosen.sources["guided_step"] == "triton"
    assert {backend for op, backend in chosen.sources.items() if op != "guided_step"} == {"reference"}
    assert chosen.guided_step is not reference.guided_step


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("cudnn", ["'cudnn'", "auto", "cuda", "triton", "reference"]),
        ("guided_step=cudnn", ["'cudnn'", "triton"]),
        ("guided_stop=triton", ["'guided_stop'", "guided_step"]),
        ("cuda", ["--backend cuda cannot serve here: ", NO_CUDA]),
        ("guided_step=cuda", ["guided_step=cuda: ", NO_CUDA]),
        ("adaln=cuda", ["adaln=cuda"]),
    ],
)
def test_refusals_name_the_thing_and_what_there_is(choice: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        ops.select(ops.parse_choice(choice), CPU)
    for word in words:
        assert word in str(error.value)


def test_the_cuda_library_serves_no_cpu() -> None:
    assert "GPU" in NO_CUDA or "not built" in NO_CUDA


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command without Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton serves")
def test_without_a_gpu_triton_is_refused_in_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("acs_fast.cli", "distill", "--backend", "triton", "--out", str(out))
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.count("\n") == 1 and "triton" in done.stderr and "GPU" in done.stderr


def test_env_prints_op_by_backend_and_why_not() -> None:
    text = run("acs_fast.cli", "env").stdout
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1]}
    for op in ops.OPS:
        assert len(rows[op]) == len(ops.BACKENDS) and rows[op][-1] == "yes"
    if not torch.cuda.is_available():
        assert "triton no: " in text and "cuda no: " in text
        assert rows["guided_step"] == ["no", "no", "yes"] and rows["adaln"] == ["-", "no", "yes"]


def test_a_run_by_triton_samples_what_the_plain_sampler_does(tiny, tmp_path: Path) -> None:
    # one guided step, for the interpreter is slow
    settings = {
        "ipc": 2,
        "num_curricula": 2,
        "discriminator": "convnet-2",
        "guidance_scale": 1.0,
        "guidance_window": [0.5, 0.7],
    }
    plain = distill(tiny(**settings, out=str(tmp_path / "plain")))
    fused = distill(tiny(**settings, out=str(tmp_path / "fused"), backend="triton"))
    record = json.loads((fused / "config.json").read_text())
    assert record["ops"]["sources"]["discriminator_guidance"] == "triton"
    for path in sorted((plain / "samples").iterdir()):
        expected, got = read_tensors(path), read_tensors(fused / "samples" / path.name)
        assert expected is not None and got is not None
        torch.testing.assert_close(got["samples"], expected["samples"], rtol=1e-3, atol=1e-3)
