"""Log files: what is written is read again, whatever was killed or full; no rate hangs on a wall clock."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from acs_fast import log
from acs_fast.log import Log, Pace, read_events

VALUES = {
    "images": 66,
    "seconds": 12.3,
    "name": "2",
    "signal": "SIGTERM",
    "loss": None,
    "text": 'cannot write "a b": no\nspace=left\u2028 \\',
    "done": True,
    "word": "true",
    "nothing": "",
}


class Clocks:
    """Stands for the module `time` in log: a monotonic clock that is set, a wall clock that jumps."""

    def __init__(self, jumps: bool = True):
        self.seconds, self.calls, self.jumps = 0.0, 0, jumps

    def monotonic(self) -> float:
        return 5000.0 + self.seconds

    def time(self) -> float:
        self.calls += 1
        return 1.8e9 + self.seconds + (self.jumps and (-1) ** self.calls * 3600 * 24 * self.calls)

    def __getattr__(self, name: str) -> object:
        return getattr(log_time, name)


log_time = log.time


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(log, "time", made)
    return made


def values_of(event: dict) -> dict:
    """What of an event is its own."""
    return {name: value for name, value in event.items() if name not in ("time", "rank", "event", "since")}


def sample(out: Path, clocks: Clocks, rank: int, batches: list[tuple[float, int]], **start: int) -> None:
    """A process that samples: (seconds, images) of its batches, after seven seconds without one."""
    begun = clocks.seconds
    with Log(out, rank) as file:
        file.event("start", **start)
        clocks.seconds += 7
        for seconds, images in batches:
            clocks.seconds += seconds
            file.event("batch", curriculum=1, images=images, seconds=seconds)
    clocks.seconds = begun


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, as_json: bool) -> None:
    with Log(tmp_path, 3, as_json) as file:
        file.event("everything", **VALUES)
        file.event("nothing")
    first, second = read_events(tmp_path)
    assert values_of(first) == VALUES and values_of(second) == {}
    assert (first["rank"], first["event"], second["event"]) == (3, "everything", "nothing")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])
    assert 0 <= first["since"] <= second["since"] < 5


def test_the_text_is_for_people(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(log, "time", Clocks(jumps=False))
    with Log(tmp_path, 0) as file:
        file.event("batch", curriculum=1, images=66, seconds=12.3)
        file.event("error", text="no space left")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == (
        "2027-01-15T08:00:00Z rank 0 batch curriculum=1 images=66 seconds=12.3 since=0.0\n"
        '2027-01-15T08:00:00Z rank 0 error text="no space left" since=0.0\n'
    )


def test_every_line_of_the_json_is_strict_json(tmp_path: Path) -> None:
    with Log(tmp_path, 0, as_json=True) as file:
        file.event("discriminator", name="2", loss=math.nan, seconds=math.inf, path=Path("a"))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = (tmp_path / "logs" / "rank-0.jsonl").read_text()
    event = json.loads(line, parse_constant=refuse)
    assert values_of(event) == {"name": "2", "loss": None, "seconds": None, "path": "a"}


@pytest.mark.parametrize("as_json", [False, True])
def test_broken_lines_are_left_out_and_the_next_line_begins_anew(tmp_path: Path, as_json: bool) -> None:
    with Log(tmp_path, 0, as_json) as file:
        file.event("start", total=1)
        path = file.path
    whole = path.read_bytes()
    path.write_bytes(
        b"\xff\n[]\n{}\nnull\n"
        + b'2026-11-25T10:00:00Z rank 0 batch images= since=1\n{"time": 1, "rank": 0}\n'
        + b"2026-11-25T10:00:00Z rank 0 batch images=1\n2026-11-25T10:00:00Z rank 0 batch since=x\n"
        + whole
        + whole[:-9]
    )
    with Log(tmp_path, 0, as_json) as file:
        file.event("end")
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "end"]
    assert not path.read_bytes().endswith(b"\n\n")
    with open(path, "ab") as tail:  # one that is being written
        tail.write(whole[:-1])
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "end"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    with Log(tmp_path, 0) as file:

        def write(number: int) -> None:
            for count in range(300):
                file.event("batch", thread=number, count=count, text="x" * 100)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = list(read_events(tmp_path))
    assert len(events) == 1200
    assert [e["since"] for e in events] == sorted(e["since"] for e in events)


def test_the_processes_come_one_after_another(tmp_path: Path) -> None:
    for rank in (10, 2, 0):
        with Log(tmp_path, rank, as_json=rank == 2) as file:
            file.event("start")
    (tmp_path / "logs" / "rank-1.log.gz").write_bytes(b"\x1f")
    (tmp_path / "logs" / "rank-x.log").write_text("2026-11-25T10:00:00Z rank 0 start since=1\n")
    assert [event["rank"] for event in read_events(tmp_path)] == [0, 2, 10]
    assert list(read_events(tmp_path / "none")) == []


FULL = """
    import resource, sys
    from pathlib import Path
    from acs_fast.log import Log
    with Log(Path(sys.argv[1]), 0) as log:
        log.event("start")
        resource.setrlimit(resource.RLIMIT_FSIZE, (130, resource.RLIM_INFINITY))
        for _ in range(5):
            log.event("batch", images=66)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        log.event("end")
    print("went on")
"""


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "rank-0.log: File too large; the run goes on" in done.stderr
    events = [event["event"] for event in read_events(tmp_path)]
    assert events == ["start", "batch", "end"]  # nothing is glued to the batch that was cut


def test_a_folder_in_the_way_is_said_once(tmp_path: Path, capsys) -> None:
    (tmp_path / "logs").write_text("a file")
    with Log(tmp_path, 0) as file:
        file.event("start")
        file.event("end")
    assert capsys.readouterr().err.count("\n") == 1
    assert list(read_events(tmp_path)) == []


def test_a_line_is_one_write(tmp_path: Path, monkeypatch) -> None:
    lines: list[bytes] = []
    real = os.write
    monkeypatch.setattr(log.os, "write", lambda file, data: lines.append(data) or real(file, data))
    with Log(tmp_path, 0) as file:
        file.event("batch", text="x" * 10_000)
        assert [len(list(read_events(tmp_path))), len(lines)] == [1, 1]  # and at once in the file


def test_a_rate_is_of_all_processes_and_of_their_batches_alone(tmp_path: Path, clocks: Clocks) -> None:
    sample(tmp_path, clocks, 0, [(10, 30), (10, 10)], num_ranks=2)
    sample(tmp_path, clocks, 1, [(10, 60)], num_ranks=2)
    assert Pace(tmp_path).rate == pytest.approx(40 / 20 + 60 / 10)


def test_a_wall_clock_that_jumps_changes_no_rate(tmp_path: Path, clocks: Clocks) -> None:
    batches = [(3.0, 5), (2.0, 7), (400.0, 90), (1.0, 1), (500.0, 66)]
    sample(tmp_path / "jumps", clocks, 0, batches)
    times = [event["time"] for event in read_events(tmp_path / "jumps")]
    assert times != sorted(times)
    clocks.jumps = False
    sample(tmp_path / "even", clocks, 0, batches)
    rate = Pace(tmp_path / "jumps").rate
    assert rate is not None and rate == Pace(tmp_path / "even").rate
    assert rate == pytest.approx((66 + 1 + 90) / (500 + 1 + 400))  # what ended within ten minutes of the last


def test_a_start_anew_counts_from_its_own_batches(tmp_path: Path, clocks: Clocks) -> None:
    sample(tmp_path, clocks, 0, [(1, 1000)] * 20)
    sample(tmp_path, clocks, 0, [])
    assert Pace(tmp_path).rate == pytest.approx(1000)  # the best that is known
    sample(tmp_path, clocks, 0, [(1, 10)] * 30)  # runs past the first one's last `since`
    assert Pace(tmp_path).rate == pytest.approx(10)


def test_a_start_whose_line_is_lost_counts_too(tmp_path: Path, clocks: Clocks) -> None:
    for images in (1000, 10):
        clocks.seconds = 0
        with Log(tmp_path, 0) as file:
            for _ in range(4):
                clocks.seconds += 1
                file.event("batch", images=images, seconds=1.0)
    assert Pace(tmp_path).rate == pytest.approx(10)


def test_processes_that_are_no_more_do_not_count(tmp_path: Path, clocks: Clocks) -> None:
    for rank in range(4):
        sample(tmp_path, clocks, rank, [(1, 5)], num_ranks=4)
    for rank in range(2):
        sample(tmp_path, clocks, rank, [(1, 7)], num_ranks=2)
    assert Pace(tmp_path).rate == pytest.approx(14)


def test_waits_are_summed(tmp_path: Path) -> None:
    for rank in range(2):
        with Log(tmp_path, rank) as file:
            file.event("wait", writer_seconds=1.5, real_seconds=9.0)
            file.event("wait", writer_seconds=0.25)
            file.event("wait", writer_seconds="x")
    assert Pace(tmp_path).waited == 3.5


def test_no_batch_no_rate(tmp_path: Path) -> None:
    assert (Pace(tmp_path).rate, Pace(tmp_path).last_event, Pace(tmp_path).waited) == (None, None, 0)
    with Log(tmp_path, 0) as file:
        file.event("start", num_ranks=1)
    pace = Pace(tmp_path)
    assert pace.rate is None and pace.last_event == next(read_events(tmp_path))["time"]
