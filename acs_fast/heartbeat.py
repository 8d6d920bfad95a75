"""Heartbeats: how ranks learn that another one is dead, or the machine that torchrun's store lies on.

A rank that is killed breaks its connections; one whose machine is gone, or that hangs, breaks nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

BEAT = 1.0  # seconds between a rank's beats, each of which looks at the others
# beats of its own in which a rank sees no beat of another: so no clock counts, and no job that was suspended
NOTICED, SILENCE, START = 3, 30, 600  # after a broken connection; otherwise; before the other's first beat
ENDED = "ended"
AGAIN = "; run the same command again to continue"


class Watch:
    """The heart of a rank: a key in torchrun's store, which it counts up; it looks at the others'.

    store: its own connection. It ends the process when another rank has died, or the store: the main thread
    may wait for ever for what does not come, and what is written is whole.
    """

    def __init__(self, rank: int, num_ranks: int, store: Any, beat: float = BEAT):
        self.rank, self.store, self.beat = rank, store, beat
        self._name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._keys = [f"heart/{number}" for number in range(num_ranks)]
        self._states = [""] * num_ranks  # `<count> <name>`, or ENDED
        self._still = [0] * num_ranks  # looks since each has changed
        self._count, self._stuck, self._last = 0, 0, ""
        self._stopped = threading.Event()
        threads = [
            threading.Thread(target=call, name="heart", daemon=True) for call in (self._live, self._guard)
        ]
        self._thread = threads[0]
        for thread in threads:
            thread.start()

    def close(self, ended_well: bool) -> None:
        """This rank ends; the others do not miss one that ended well."""
        self._last = ENDED if ended_well else self._last
        self._stopped.set()
        self._thread.join(5 * self.beat)  # not for ever: the store may be gone

    def dead(self, looks: int) -> list[str]:
        """The names of ranks without a beat in so many looks."""
        found = []
        for rank, (state, still) in enumerate(zip(self._states, self._still, strict=True)):
            count, _, name = state.partition(" ")
            if rank != self.rank and state != ENDED and still >= (looks if count != "0" else START):
                found.append(name)
        return found

    def lost(self) -> str:
        """The sentence that names the dead, when a connection broke; empty if all others live or ended well.

        It takes some beats to see whose heart has stopped.
        """
        for _ in range(NOTICED + 2):
            self._stopped.wait(self.beat)
            others = [state for rank, state in enumerate(self._states) if rank != self.rank]
            if (names := self.dead(NOTICED)) or all(state == ENDED for state in others):
                return sentence(names) if names else ""
        return ""

    def leaving(self) -> str:
        """`lost` for a rank that was asked to stop, which the others do not miss from now on.

        torchrun asks ranks to stop when one has died, as schedulers do at other times.
        """
        self._last = ENDED
        return self.lost()

    def _live(self) -> None:
        """Beat and look, until the end; the last beat may say that this was one."""
        with contextlib.suppress(RuntimeError):
            for rank, key in enumerate(self._keys):  # so that all keys can be read
                self.store.compare_set(key, "", f"0 rank {rank}, which has never answered,")
        ended = False
        while not ended:
            ended = self._stopped.is_set()
            with contextlib.suppress(RuntimeError):  # the guard counts what fails, and what does not return
                self._look()
                self._stuck = 0
            if names := self.dead(SILENCE):
                self._end(sentence(names))
            self._stopped.wait(self.beat)

    def _look(self) -> None:
        self._count += 1
        self.store.set(self._keys[self.rank], self._last or f"{self._count} {self._name}")
        states = [state.decode() for state in self.store.multi_get(self._keys)]
        pairs = zip(states, self._states, self._still, strict=True)
        self._still = [still + 1 if new == old else 0 for new, old, still in pairs]
        self._states = states

    def _guard(self) -> None:
        while not self._stopped.wait(self.beat):
            self._stuck += 1
            if self._stuck >= SILENCE:
                self._end(
                    "torchrun's store, or the machine that it lies on, is gone, so this rank stops" + AGAIN
                )

    def _end(self, text: str) -> None:
        if not self._stopped.is_set() and not self._last:
            print(f"acs-fast: {text}", file=sys.stderr, flush=True)
            os._exit(1)


def sentence(names: Sequence[str]) -> str:
    """What is said of dead ranks."""
    return f"{' and '.join(names)} has died, so this one stops" + AGAIN
