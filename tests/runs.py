"""What the end-to-end tests share: the bytes of a run folder, and the command line called in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from acs_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run folder but its lock and its logs, by relative path."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock")
    files = (path for path in files if path.parent.name != "logs")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def stored(out: Path, curriculum: int) -> Path:
    """The file of a curriculum's samples, in a run that keeps them: 512 lie in one."""
    (path,) = (out / "samples").glob(f"{curriculum}-0-*.safetensors")
    return path


def refused(argv: list[str], capsys) -> str:
    """The one sentence that the command line answers unusable input with."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("acs-fast: ") and error.count("\n") == 1, error
    return error


def torchrun_command(num_ranks: int, *command: str) -> list[str]:
    """The command line of torchrun for a script, or `-m` and a module, with its arguments."""
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*python, "--nproc-per-node", str(num_ranks), *command]


def torchrun(num_ranks: int, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Let ranks run to their end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = torchrun_command(num_ranks, *command)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=180)
    assert not check or done.returncode == 0, done.stderr
    return done
