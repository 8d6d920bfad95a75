"""Heartbeats: the dead are named, who ended well or was suspended is not, a lost store ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from acs_fast import heartbeat
from acs_fast.heartbeat import NOTICED, SILENCE, Watch
from tests.rank_runs import FORKS

BEAT, SLOW = 0.02, 0.05  # seconds: of threads, of processes


class Heart(Watch):
    """A heart that says why it would end its process, and can stop as that of a killed process does."""

    def __init__(self, rank: int, num_ranks: int, store: object):
        self.said: list[str] = []
        self.killed = False
        super().__init__(rank, num_ranks, store, BEAT)

    def _look(self) -> None:
        if not self.killed:
            super()._look()

    def _end(self, text: str) -> None:
        if not self._last:
            self.said.append(text)


class Broken:
    """A store that answers no more: it raises, or does not return."""

    def __init__(self, store: object, returns: bool):
        self.store, self.returns, self.gone = store, returns, threading.Event()
        self.ended = threading.Event()

    def __getattr__(self, name: str) -> object:
        if self.gone.is_set():
            if not self.returns:
                self.ended.wait(30)
            raise RuntimeError("Broken pipe")
        return getattr(self.store, name)


@pytest.fixture
def hearts() -> Iterator[list[Heart]]:
    """Three hearts that beat; closed at the end."""
    store = dist.HashStore()
    found = [Heart(rank, 3, store) for rank in range(3)]
    until(lambda: all(state.partition(" ")[0] > "1" for heart in found for state in heart._states))
    yield found
    for heart in found:
        heart.close(True)


def until(call: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not call():
        assert time.monotonic() < end, "it did not come"
        time.sleep(BEAT / 4)


def beats(heart: Heart, number: int) -> None:
    """Let a heart look so often."""
    start = heart._count
    until(lambda: heart._count >= start + number)


def test_living_ranks_are_not_missed(hearts: list[Heart]) -> None:
    beats(hearts[0], 2 * SILENCE)
    assert hearts[0].dead(NOTICED + 5) == [] and not any(heart.said for heart in hearts)


def test_a_dead_rank_is_named_by_the_others(hearts: list[Heart]) -> None:
    hearts[1].killed = True
    until(lambda: hearts[0].said and hearts[2].said)
    for heart in (hearts[0], hearts[2]):
        assert heart.said[0].startswith("rank 1 (process ") and "has died" in heart.said[0]
        assert "run the same command again" in heart.said[0] and heart.dead(SILENCE)
    assert not hearts[1].said


def test_where_a_connection_broke_it_is_named_within_some_beats(hearts: list[Heart]) -> None:
    hearts[2].killed = True
    before = hearts[0]._count
    assert hearts[0].lost().startswith("rank 2 (process ")
    assert hearts[0]._count - before < SILENCE / 2


def test_a_rank_that_ended_well_is_not_missed(hearts: list[Heart]) -> None:
    hearts[1].close(True)
    assert hearts[0].lost() == "" and hearts[0].leaving() == ""  # 2 lives
    beats(hearts[2], SILENCE + 5)
    assert not hearts[2].said


def test_one_that_failed_is_missed(hearts: list[Heart]) -> None:
    """Its connections may not break: on a GPU the others can wait for its part of a sum."""
    hearts[1].close(False)
    until(lambda: hearts[0].said)
    assert "rank 1 (process " in hearts[0].said[0]


def test_one_that_leaves_is_not_missed_and_misses_nobody(hearts: list[Heart]) -> None:
    hearts[1].killed = True
    assert "rank 1 (process " in hearts[0].leaving()
    beats(hearts[0], SILENCE + 5)
    assert not hearts[0].said and all("rank 0" not in text for text in hearts[2].said)


def test_the_last_one_to_leave_does_not_wait(hearts: list[Heart]) -> None:
    for heart in hearts[1:]:
        heart.close(True)
    beats(hearts[0], 2)
    before = hearts[0]._count
    assert hearts[0].leaving() == "" and hearts[0]._count - before <= 2


def test_a_rank_is_waited_for_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "START", 3 * SILENCE)
    heart = Heart(0, 2, dist.HashStore())
    beats(heart, 2 * SILENCE)
    assert not heart.said
    until(lambda: heart.said)
    assert heart.said[0].startswith("rank 1, which has never answered, has died")
    heart.close(True)


def live(path: Path, rank: int) -> None:
    """A process that beats."""
    Watch(rank, 2, dist.FileStore(str(path), 2), SLOW)
    time.sleep(120)


def test_a_job_that_was_suspended_goes_on_and_one_whose_half_died_does_not(tmp_path: Path) -> None:
    """Both processes stand still for longer than one may be silent: no clock counts."""
    path, store = tmp_path / "store", dist.FileStore(str(tmp_path / "store"), 2)
    jobs = [FORKS.Process(target=live, args=(path, rank), daemon=True) for rank in range(2)]
    for job in jobs:
        job.start()

    def count(rank: int) -> int:
        key = f"heart/{rank}"
        return int(store.get(key).decode().partition(" ")[0]) if store.check([key]) else 0

    until(lambda: count(0) > 2 and count(1) > 2, 60)
    for job in jobs:
        os.kill(job.pid, signal.SIGSTOP)
    time.sleep(1.3 * SILENCE * SLOW)
    for job in jobs:
        os.kill(job.pid, signal.SIGCONT)
    after = count(0)
    until(lambda: count(0) > after + 10)
    assert all(job.is_alive() for job in jobs)
    jobs[1].kill()
    jobs[0].join(60)
    assert jobs[0].exitcode == 1


@pytest.mark.parametrize("returns", [True, False])
def test_a_store_that_is_gone_ends_the_process_after_a_while(returns: bool) -> None:
    store = Broken(dist.HashStore(), returns)
    heart = Heart(0, 1, store)
    beats(heart, 3)
    store.gone.set()
    time.sleep(SILENCE / 3 * BEAT)
    assert not heart.said  # a batch in flight may come to its end
    until(lambda: heart.said)
    assert "torchrun's store" in heart.said[0]
    started = time.monotonic()
    heart.close(True)
    assert time.monotonic() - started < 5
    store.ended.set()
