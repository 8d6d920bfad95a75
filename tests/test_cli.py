"""The command line from outside: speed, help, env, and that a new user's first commands work."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

import acs_fast
from acs_fast import cli
from acs_fast.cli import main
from acs_fast.config import PRESETS, DistillConfig, EncodeConfig, TrainConfig


def fastest(code: str, runs: int = 5) -> float:
    """Processor seconds of the fastest of several runs of a Python program, from its start to its end."""
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
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


@pytest.mark.parametrize(("command", "config"), [("distill", DistillConfig), ("encode", EncodeConfig)])
def test_every_field_is_a_flag_with_help(command: str, config: type, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"]


def test_an_unknown_flag_is_refused_with_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "--icp", "3"])
    assert end.value.code == 2


@pytest.mark.parametrize("argv", [["--vers"], ["distill", "--num-curr", "1"], ["train", "--iter", "1"]])
def test_shortened_flags_are_refused(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2


def test_help_shows_the_defaults_in_effect(capsys, monkeypatch) -> None:
    monkeypatch.setitem(PRESETS["DistillConfig"], "digits", {"cfg_scale": 7.25})
    monkeypatch.setenv("COLUMNS", "400")  # else a line may end at a hyphen
    text = {}
    for command in ("distill", "evaluate", "train"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text[command] = " ".join(capsys.readouterr().out.split())
    assert "(default 7.25, " in text["distill"]
    assert "(default 0.1 0.7, 0.204 0.917 with preset imagewoof, " in text["distill"]
    assert "(hard-adamw with preset digits)" in text["evaluate"]
    assert f"(default {TrainConfig().out})" in text["train"]
    assert "default ()" not in text["evaluate"]


@pytest.mark.parametrize("command", ["distill", "encode", "evaluate", "train"])
def test_only_distill_and_encode_speak_of_continuing(command: str, capsys, monkeypatch) -> None:
    argv = ["evaluate", "runs/absent"] if command == "evaluate" else [command]
    for error, code in ((OSError(28, "No space left on device", "a/file"), 2), (KeyboardInterrupt(), 130)):

        def fail(*args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(cli, f"run_{command}", fail)
        assert main(argv) == code
        text = capsys.readouterr().err
        assert ("run the same command again to continue" in text) == (command in ("distill", "encode"))
        assert text.count("\n") == 1 and ("a/file: No space left" in text or "interrupted" in text)


def test_env_says_what_is_missing_and_why(capsys) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for word in (
        f"acs-fast {acs_fast.__version__}",
        "torch ",
        "device cpu",
        "reference",
        "discriminator_guided_step",
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


def test_the_digits_take_under_a_minute_and_two_gigabytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "acs_fast.cli", "distill", "--out", str(tmp_path / "run")]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    assert time.perf_counter() - started < 60
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2_000_000  # KiB, the largest child so far
    assert len(list((tmp_path / "run" / "images").rglob("*.png"))) == 100


def test_a_reader_that_ends_is_no_error() -> None:
    command = f"{sys.executable} -m acs_fast env | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("141\n", "")
