"""The log files of a run: `logs/rank-<rank>.log`, or `.jsonl` with `--log-json`, an event a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

LOGS = "logs"
LOG = re.compile(r"rank-(\d+)\.(?:log|jsonl)")
WINDOW = 600.0  # seconds of a process's batches that the rate is taken from
VALUE = r'"(?:[^"\\]|\\.)*"|[^\s"]+'
PAIR = re.compile(rf" (\w+)=({VALUE})")
LINE = re.compile(rf"(\S+) rank (\d+) (\w+)((?: \w+=(?:{VALUE}))*)")
# a text that stands bare in a text line; any other one is quoted as in JSON
BARE = re.compile(r"(?!(?:true|false|null|NaN|Infinity)$)[A-Za-z_][\w./:+-]*")


class Log:
    """What one process tells of a run, appended to its own file.

    out: the run folder. rank: the process's number. as_json: an object a line with time, rank, event, since
    and the event's values; else `<time> rank <rank> <event> <name>=<value> ... since=<seconds>`.
    `time` is the wall clock's UTC, which may jump; `since` is seconds of the monotonic clock since this
    object was made. Any thread may write. What cannot be written is said on stderr once, and the run goes on.
    """

    def __init__(self, out: Path, rank: int = 0, as_json: bool = False):
        self.path = out / LOGS / f"rank-{rank}.{'jsonl' if as_json else 'log'}"
        self.rank, self.as_json = rank, as_json
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._file: int | None = None
        self._cut = False  # the file's last line has no end
        self._warned = False

    def event(self, event: str, /, **values: Any) -> None:
        """Append one line, in one write. values: numbers, texts, truth values or None, by name."""
        with self._lock:  # `since` rises from line to line
            head = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))}
            since = round(time.monotonic() - self._begun, 3)
            values = {name: _plain(value) for name, value in values.items()}
            if self.as_json:
                line = json.dumps({**head, "rank": self.rank, "event": event, **values, "since": since})
            else:
                pairs = [f"{name}={_shown(value)}" for name, value in {**values, "since": since}.items()]
                line = " ".join([head["time"], "rank", str(self.rank), event, *pairs])
            try:
                self._write(f"{line}\n".encode())
            except OSError as error:
                self._warn(error)

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._file).st_size
            self._cut = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        line = b"\n" + line if self._cut else line  # after a kill or a full disk the next one begins anew
        written = os.write(self._file, line)
        if written < len(line):
            self._cut = True
            written += os.write(self._file, line[written:])  # says why, or writes the rest
        self._cut = written < len(line)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            reason = error.strerror or error
            print(f"warning: cannot write {self.path}: {reason}; the run goes on", file=sys.stderr)
        self._warned = True

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.close(self._file)
            self._file = None


def read_events(out: Path) -> Iterator[dict[str, Any]]:
    """The events of all processes, a process after the other, each in the order of its writing.

    Each has time, rank, event, since and the event's values; a line that is no event is left out. Of a
    process's two files, where it has both kinds, the one written last comes last.
    """
    files = []
    for path in (out / LOGS).glob("rank-*"):
        if match := LOG.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                files.append((int(match[1]), path.stat().st_mtime_ns, path))
    for _, _, path in sorted(files):
        parse = _from_json if path.suffix == ".jsonl" else _from_text
        with contextlib.suppress(FileNotFoundError), open(path, errors="replace", newline="\n") as file:
            for line in file:
                event = parse(line) if line.endswith("\n") else None
                if event is not None and _is_event(event):
                    yield event


class Pace:
    """What the log files tell of a run's progress, counted by each log's own `since` and no other clock.

    rate: images/s, None before any batch. waited: seconds that sampling stood still for the writer, of all
    processes. last_event: the wall clock's time of the last one, for people.
    A process's rate is that of its last start that has batches, over the WINDOW before the last of them; the
    run's is the sum over the processes of the last start.
    """

    def __init__(self, out: Path):
        self.waited, num_ranks = 0.0, None
        recent: dict[int, Recent] = {}
        for event in read_events(out):
            recent.setdefault(event["rank"], Recent()).add(event)
            if event["event"] == "wait":
                self.waited += amount(event, "writer_seconds")
            if event["event"] == "start" and event["rank"] == 0:
                num_ranks = event.get("num_ranks")
        self.last_event = max((r.time for r in recent.values()), default=None)
        used = [r for rank, r in recent.items() if type(num_ranks) is not int or rank < num_ranks]
        self.rate = sum(rates) if (rates := [rate for r in used if (rate := r.rate())]) else None


@dataclass
class Recent:
    """One process's batches: when each began and ended, by `since`, and its images."""

    batches: deque[tuple[float, float, float]] = field(default_factory=deque)
    since: float = 0.0
    time: str = ""
    anew: bool = False  # the process has started again, without a batch so far

    def add(self, event: dict[str, Any]) -> None:
        """Take an event, in order."""
        end = event["since"]
        self.anew = self.anew or event["event"] == "start" or end < self.since
        self.since, self.time = end, event["time"]
        if event["event"] == "batch":
            if self.anew:
                self.batches.clear()
            self.anew = False
            self.batches.append((end - amount(event, "seconds"), end, amount(event, "images")))
            while self.batches[0][1] <= end - WINDOW:
                self.batches.popleft()

    def rate(self) -> float | None:
        """Images per second, or None before any batch that took time."""
        span = self.batches[-1][1] - self.batches[0][0] if self.batches else 0.0
        return sum(images for _, _, images in self.batches) / span if span > 0 else None


def amount(event: dict[str, Any], name: str) -> float:
    """A number of an event that cannot be below zero; 0 where there is none."""
    value = event.get(name)
    return max(0.0, value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _plain(value: Any) -> Any:
    """A value as JSON has it: no infinity, six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)


def _shown(value: Any) -> str:
    """A value in a text line."""
    if isinstance(value, str) and BARE.fullmatch(value):
        return value
    return json.dumps(value)


def _from_json(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _from_text(line: str) -> dict[str, Any] | None:
    match = LINE.fullmatch(line.removesuffix("\n"))
    if match is None:
        return None
    event: dict[str, Any] = {"time": match[1], "rank": int(match[2]), "event": match[3]}
    for name, text in PAIR.findall(match[4]):
        try:
            event[name] = text if BARE.fullmatch(text) else json.loads(text)
        except (ValueError, RecursionError):
            return None
    return event


def _is_event(event: dict[str, Any]) -> bool:
    kinds = {"time": str, "rank": int, "event": str}
    return (
        all(type(event.get(name)) is kind for name, kind in kinds.items())
        and type(event.get("since")) in (int, float)
        and math.isfinite(event["since"])
    )
