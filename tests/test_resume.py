"""Killed anywhere, a run ends with the same bytes; a second process and a full disk do no harm."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from acs_fast import InputError, distill, writer
from acs_fast.data import ASSETS
from tests.runs import contents, refused, stored


class Killed(BaseException):
    """Stands for the end of the process: no handler of the package catches it."""


def kill_at_write(monkeypatch, number: int) -> None:
    """Die in the middle of a write: the data are in a temporary file or the manifest's tail, unsynced."""
    calls = iter(range(1, 10_000))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == number:
            raise Killed
        real(descriptor)

    monkeypatch.setattr(writer.os, "fsync", fsync)


def test_killed_at_every_write_the_run_ends_with_the_same_bytes(tiny, tmp_path: Path, monkeypatch) -> None:
    config = tiny(objective="learnability", num_curricula=2)
    whole = contents(distill(config))
    os.rename(config.out, tmp_path / "whole")
    kills = 0
    for number in range(1, 200):
        with monkeypatch.context() as patch:
            kill_at_write(patch, number)
            try:
                distill(config)
            except Killed:
                kills += 1
            else:
                break
        if number % 3 == 0:  # a kill can also cut the manifest's last line
            manifest = Path(config.out) / "manifest.0.jsonl"
            if manifest.is_file():
                manifest.write_bytes(manifest.read_bytes()[:-7])
    # every kill was followed by a start that found the wreck of the one before
    assert kills >= 3
    assert {k: v for k, v in contents(Path(config.out)).items() if not k.endswith(".tmp")} == whole


@pytest.mark.parametrize("number", range(1, 24, 3))
def test_one_kill_and_one_start_give_the_same_bytes(tiny, tmp_path: Path, monkeypatch, number: int) -> None:
    config = tiny()
    whole = contents(distill(config))
    os.rename(config.out, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at_write(patch, number)
        with pytest.raises(Killed):
            distill(config)
    assert contents(distill(config)) == whole


VICTIM = """
    import os, signal, sys
    from acs_fast import {module} as module
    from acs_fast.cli import main
    calls = iter(range(1, 10_000))
    real = {target}
    def die(*args, **kwargs):
        if next(calls) == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    {target} = die
    sys.exit(main(sys.argv[1:]))
"""

POINTS = {
    "sampling": ("engine", "module.StepEngine._step", 7),
    "discriminator": ("discriminator", "module.F.cross_entropy", 5),
    "writing": ("writer", "module.os.replace", 9),
}


@pytest.mark.parametrize("point", POINTS)
def test_sigkill_and_the_same_command_again(tiny, tmp_path: Path, point: str) -> None:
    module, target, number = POINTS[point]
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny())))
    script = textwrap.dedent(VICTIM).format(module=module, target=target, number=number)
    command = [sys.executable, "-c", script, "distill", "--config", str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = contents(distill(tiny()))
    resumed_again = contents(distill(tiny(out=str(tmp_path / "whole"))))
    resumed.pop("config.json"), resumed_again.pop("config.json")
    assert {k: v for k, v in resumed.items() if not k.endswith(".tmp")} == resumed_again


def test_a_damaged_or_missing_image_is_made_again(tiny) -> None:
    out = distill(tiny())
    whole = contents(out)
    (out / "images" / "3" / "0.png").write_bytes(b"junk")
    (out / "images" / "8" / "3.png").unlink()
    stored(out, 2).write_bytes(b"\\x00")
    assert contents(distill(tiny())) == whole


def test_a_second_process_is_refused(tiny, tmp_path: Path, capsys) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny())))
    with writer.lock(Path(tiny().out)):
        assert "another process is writing" in refused(["distill", "--config", str(settings)], capsys)
    assert not (Path(tiny().out) / "config.json").exists()


FULL = """
    import resource, sys
    from acs_fast.cli import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_without_room_is_one_sentence_and_the_run_continues_later(tiny, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny())))
    command = [sys.executable, "-c", textwrap.dedent(FULL), "distill", "--config", str(settings)]
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode == 2
    assert full.stderr.count("\n") == 1 and "discriminators/2.safetensors" in full.stderr, full.stderr
    assert len(list((Path(tiny().out) / "images").rglob("*.png"))) == 2
    rest = contents(distill(tiny()))
    whole = contents(distill(tiny(out=str(tmp_path / "whole"))))
    rest.pop("config.json"), whole.pop("config.json")
    assert rest == whole


def test_no_space_left_names_the_file(tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny())))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    assert "config.json: No space left on device" in refused(["distill", "--config", str(settings)], capsys)


def lose_the_last(out: Path) -> None:
    """Remove the third curriculum's samples, so that a run has something to continue with."""
    for path in (out / "samples").glob("3-*"):
        path.unlink()


def test_a_lost_warm_discriminator_is_trained_again_from_the_samples(tiny) -> None:
    out = distill(tiny(discriminator_init="warm"))
    whole = contents(out)
    lose_the_last(out)
    shutil.rmtree(out / "discriminators")
    assert contents(distill(tiny(discriminator_init="warm"))) == whole


@pytest.mark.parametrize("setting", ["device", "backend", "model", "classes"])
def test_a_run_is_continued_by_what_comes_to_the_same(tiny, tmp_path: Path, setting: str, two_digits) -> None:
    out = distill(tiny(device="auto"))
    whole = contents(out)
    lose_the_last(out)
    device = json.loads((out / "config.json").read_text())["device"].split()[0]
    same = {"device": device, "backend": "guided_step=reference"}
    same["model"] = shutil.copy(ASSETS / "digits-dit.safetensors", tmp_path / "copy.safetensors")
    same["classes"] = shutil.copy(two_digits, tmp_path / "copy.txt")
    assert contents(distill(tiny(**{"device": "auto", setting: str(same[setting])}))) == whole


def edit(out: Path, **changes: object) -> None:
    """Change a run's record."""
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(record | changes))


def test_a_run_of_another_device_is_refused(tiny) -> None:
    out = distill(tiny(device="cpu"))
    edit(out, device="cuda (NVIDIA H200)")
    with pytest.raises(InputError, match="device cuda there, cpu here"):
        distill(tiny(device="cpu"))


@pytest.mark.parametrize(
    "changes", [{"commit": "0123456789ab"}, {"versions": {"torch": "2.0.1"}}, {"versions": 1}], ids=str
)
def test_other_code_goes_on_with_a_warning(tiny, capsys, changes: dict) -> None:
    out = distill(tiny())
    edit(out, **changes)
    distill(tiny())
    assert capsys.readouterr().err == ""  # nothing was left to do
    lose_the_last(out)
    distill(tiny())
    warning = capsys.readouterr().err
    assert warning.startswith("warning: this run was started with torch ") and warning.count("\n") == 1
    whole = contents(out)
    distill(tiny())
    assert contents(out) == whole and capsys.readouterr().err == ""


def test_a_lock_that_cannot_be_had_is_not_taken_for_another_process(tiny, monkeypatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(writer.fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available"):
        distill(tiny())


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"row"',
        b"{}",
        b'{"class": [], "index": 0, "sha256": ""}',
        b'{"class": "3"',
        b'{"class": "3", "index": 0}',
        b'{"class": "3", "index": 0, "sha256": null}',
    ],
)
def test_junk_in_the_manifest_is_ignored(tiny, junk: bytes) -> None:
    out = distill(tiny())
    whole = contents(out)
    manifest = out / "manifest.jsonl"
    manifest.write_bytes(whole["manifest.jsonl"] + junk + b"\n")
    distill(tiny())
    assert contents(out) == whole
