"""The command line from outside: speed, help, env, and that a new user's first commands work."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

import acs_fast
from acs_fast.cli import main
from acs_fast.config import DistillConfig


def fastest(code: str, runs: int = 5) -> float:
    """Seconds of the fastest of several runs of a Python program."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return min(times)


def test_help_takes_under_half_a_second() -> None:
    code = "import sys; sys.argv = ['acs-fast', '--help']; from acs_fast.cli import main; main()"
    assert fastest(code) < 0.5


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom acs_fast.cli import main\n"
        "for argv in (['--help'], ['distill', '--help'], ['evaluate', '--help']):\n"
        "    try: main(argv)\n    except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_field_is_a_flag_with_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(DistillConfig):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"]


def test_an_unknown_flag_is_refused_with_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "--icp", "3"])
    assert end.value.code == 2


def test_env_says_what_is_missing_and_why(capsys) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in (
        f"acs-fast {acs_fast.__version__}",
        "torch ",
        "device cpu",
        "backend reference",
        "triton",
        "diffusers",
    ):
        assert word in text


def test_distill_prints_the_plan_first_and_the_paths_last(tmp_path: Path, two_digits: str) -> None:
    command = [
        sys.executable,
        "-m",
        "acs_fast.cli",
        "distill",
        "--out",
        str(tmp_path / "run"),
        "--classes",
        two_digits,
    ]
    command += [
        "--ipc",
        "2",
        "--num-curricula",
        "2",
        "--num-sampling-steps",
        "3",
        "--discriminator-steps",
        "2",
    ]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("plan: 4 images (2 classes x 2) in 2 curricula")
    assert "s" in lines[2] and "about" in lines[2]
    assert lines[-1].strip() == str(tmp_path / "run" / "contact_sheet.png")
    assert run.stderr == ""  # no progress bars where there is no terminal


def test_public_names_are_the_same_objects_after_their_rooms_are_imported() -> None:
    code = (
        "import acs_fast.evaluation, acs_fast.training, acs_fast.curriculum\n"
        "from acs_fast import DistillConfig, distill, evaluate, train\n"
        "assert callable(distill) and callable(evaluate) and callable(train) and DistillConfig().ipc == 10"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with pytest.raises(AttributeError):
        _ = acs_fast.nothing
