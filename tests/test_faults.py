"""Faults of ranks and around them: kills, full and read-only disks, a dead rank, a clock that jumps."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acs_fast import curriculum, distill, writer
from acs_fast.cli import main
from acs_fast.heartbeat import SILENCE
from acs_fast.log import read_events
from benchmarks import faults
from benchmarks.faults import CASES, FORKS, Launch
from tests.runs import contents, refused, torchrun


def after(event: str, **values: Any) -> Callable[[Launch, int], bool]:
    """The moment when a rank has logged it."""

    def reached(launch: Launch, rank: int) -> bool:
        found = launch.events(rank) or []
        return any(e["event"] == event and values.items() <= e.items() for e in found)

    return reached


# in the order of a run: each start goes further than the one before
MOMENTS = [
    (1, lambda launch, rank: rank in launch.pids() and time.monotonic() > launch.began + 1.0),
    (1, after("batch")),
    (0, after("curriculum", number=1)),
    (0, after("curriculum", number=3)),
]


def test_killed_in_every_phase_a_run_of_two_ranks_ends_with_the_bytes_of_one(tmp_path, monkeypatch) -> None:
    """The long form is `python -m benchmarks.faults`."""
    case, phases = CASES[1], []
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    assert main(case.argv) == 0
    expected = faults.read_whole(whole / "run", case)
    FORKS.set_forkserver_preload(["torch.distributed.run"])
    for rank, moment in MOMENTS:
        launch = Launch(tmp_path / "killed", case.argv, 2)
        assert launch.wait_for(lambda: moment(launch, rank)), launch.text  # noqa: B023
        phase = faults.phase(launch, rank) if launch.kill(rank) else None
        code = launch.wait()
        assert code == 1 or (code == 0 and moment is MOMENTS[-1][1]), launch.text  # it may be too late
        phases += [phase] * code
        assert faults.damage(launch.out, case, expected) == []
    for name in ("images/8/7.png.tmp", "manifest.jsonl.tmp", "discriminators/3.safetensors.tmp"):
        (launch.out / name).parent.mkdir(exist_ok=True)
        (launch.out / name).write_bytes(b"cut short")  # what a kill within a write leaves behind
    launch = Launch(tmp_path / "killed", case.argv, 2)
    assert launch.wait() == 0, launch.text
    assert phases[:2] == ["starting", "sampling"] and len(phases) >= 3
    assert faults.differences(launch.out, expected) == []


FULL = """
    import os, sys
    from acs_fast import writer
    from acs_fast.cli import main
    calls, real = iter(range(1, 10_000)), os.fsync
    def fsync(descriptor):
        if os.environ["RANK"] == "1" and next(calls) > 4:
            raise OSError(28, "No space left on device")
        real(descriptor)
    writer.os.fsync = fsync
    sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_for_one_rank_stops_all_and_the_run_continues_later(tiny, tmp_path: Path) -> None:
    settings, script = tmp_path / "settings.json", tmp_path / "full.py"
    settings.write_text(json.dumps(dataclasses.asdict(tiny(deterministic=True))))
    script.write_text(textwrap.dedent(FULL))
    full = torchrun(2, str(script), "distill", "--config", str(settings), check=False)
    assert full.returncode == 1, full.stderr
    own = [line for line in full.stderr.splitlines() if line.startswith("acs-fast: cannot read or write ")]
    (line,) = own
    assert "No space left on device; what is written is whole, mend this and run the same command" in line
    out = Path(tiny().out)
    assert not (out / "contact_sheet.png").exists()
    rest = contents(distill(tiny(deterministic=True)))
    whole = contents(distill(tiny(deterministic=True, out=str(tmp_path / "whole"))))
    rest.pop("config.json"), whole.pop("config.json")
    assert rest == whole


def test_an_output_below_a_file_is_one_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    text = refused(["distill", "--out", str(tmp_path / "file" / "run")], capsys)
    assert f"{tmp_path / 'file' / 'run'}" in text and "Not a directory" in text


@pytest.mark.parametrize("writes", [0, 1, 9])
def test_a_disk_that_turns_read_only_is_one_sentence_and_nothing_is_lost(
    tiny, tmp_path: Path, monkeypatch, capsys, writes: int
) -> None:
    whole = contents(distill(tiny()))
    os.rename(tiny().out, tmp_path / "whole")
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(tiny())))
    calls, real = iter(range(10_000)), open

    def read_only(path: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
        if "w" in mode and next(calls) >= writes:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, mode, *others, **named)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "open", read_only, raising=False)
        text = refused(["distill", "--config", str(settings)], capsys)
    assert tiny().out in text and "Read-only file system; what is written is whole, mend this" in text
    assert contents(distill(tiny())) == whole


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_that_may_not_be_written_to_is_one_sentence(tiny, tmp_path: Path, capsys) -> None:
    settings, parent = tmp_path / "settings.json", tmp_path / "kept"
    parent.mkdir(mode=0o500)
    settings.write_text(json.dumps(dataclasses.asdict(tiny(out=str(parent / "run")))))
    assert "Permission denied" in refused(["distill", "--config", str(settings)], capsys)


def test_what_fails_before_the_record_is_written_leaves_a_folder_that_can_be_used(
    tiny, monkeypatch, capsys
) -> None:
    """Its log is all that lies there then."""
    argv = ["distill", *(f"--out={tiny().out} --classes=3,8 --ipc=1 --num-curricula=1").split()]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(curriculum, "ImageGenerator", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        main(argv)
    logs = Path(tiny().out) / "logs"
    assert list(logs.parent.iterdir()) == [logs]
    (logs / "mine.txt").write_text("of another program")
    assert "something else" in refused(argv, capsys)
    (logs / "mine.txt").unlink()
    assert main(argv) == 0


HEART = """
    import sys, time
    from torch.distributed import TCPStore
    from acs_fast.heartbeat import Watch
    role, port = sys.argv[1], int(sys.argv[2])
    store = TCPStore("127.0.0.1", port, is_master=role == "store", wait_for_workers=False)
    if role == "store":
        print(store.port, flush=True)
    else:
        watch = Watch(int(role), 2, store, beat=0.05)
        print("beats", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("dies", "named"), [("1", "rank 1 (process {pid} on "), ("store", "torchrun's store")]
)
def test_a_rank_that_dies_is_named_by_the_heartbeat_alone(dies: str, named: str) -> None:
    """Two ranks without an agent, which never exchange a word: their main threads sleep."""
    processes: dict[str, subprocess.Popen[str]] = {}

    def start(role: str, port: str) -> str:
        command = [sys.executable, "-c", textwrap.dedent(HEART), role, port]
        processes[role] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        stdout = processes[role].stdout
        return stdout.readline().strip() if stdout and role == "store" else ""

    try:
        port = start("store", "0")
        start("0", port), start("1", port)
        for role in "01":
            stdout = processes[role].stdout
            assert stdout and stdout.readline() == "beats\n"
        time.sleep(0.3)  # they have seen one another
        assert processes["0"].poll() is None
        processes[dies].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, text = processes["0"].communicate(timeout=30)
        assert 0.05 * (SILENCE - 5) < time.monotonic() - killed < 20
        assert processes["0"].returncode == 1
        assert named.format(pid=processes["1"].pid) in text and text.count("acs-fast: ") == 1, text
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_a_clock_that_jumps_changes_no_image_and_no_log(tiny, tmp_path: Path, monkeypatch) -> None:
    settings = {"format": "wds", "keep_latents": False}
    whole = contents(distill(tiny(**settings)))
    os.rename(tiny().out, tmp_path / "whole")
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(dataclasses.asdict(tiny(**settings))))
    calls, real = iter(range(1_000_000)), time.time_ns
    days = [0, 400, -400, 3, -10_000, 10_000]

    def jumping() -> int:
        return real() + days[next(calls) % len(days)] * 86_400 * 10**9

    monkeypatch.setattr(time, "time_ns", jumping)
    monkeypatch.setattr(time, "time", lambda: jumping() / 1e9)
    assert main(["distill", "--config", str(file)]) == 0
    monkeypatch.undo()
    assert contents(Path(tiny().out)) == whole
    events = list(read_events(Path(tiny().out)))
    since = [event["since"] for event in events]
    assert len({event["time"][:4] for event in events}) > 2  # the clock did jump
    assert since == sorted(since) and since[0] >= 0 and since[-1] < 60
