"""Stop when asked to: SIGTERM and SIGINT, from a scheduler or by Ctrl-C, end a run between two batches."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# seconds: a scheduler signals every process of a job, and torchrun passes its own on to those it started,
# so what comes this soon after the first signal is the same request
SAME = 1.0


class Stopped(Exception):
    """A run that was asked to stop, and did. message: what it leaves behind."""

    def __init__(self, signum: int, message: str = ""):
        self.signum = signum
        self.code = 128 + signum  # the process's exit code, as shells have it
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (message and f": {message}"))


class RankLost(RuntimeError):
    """Another process of the run has ended. dead: the sentence that names it, if it died."""

    def __init__(self, dead: str = ""):
        self.died = bool(dead)
        super().__init__(
            dead or "another rank has ended, so this one stops; run the same command again to continue"
        )


class Stopping:
    """Within it, the first SIGTERM or SIGINT is only noted: `check` raises it where the run can stop.

    signum: the signal that was noted, or None. A second one, more than SAME seconds later, does what it does
    elsewhere: SIGINT raises KeyboardInterrupt, SIGTERM ends the process. A signal that was ignored before
    stays so (shells do this to SIGINT of what they run in the background). In a thread other than the main
    one, where Python sets no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            say(
                f"{signal.Signals(signum).name}: finishing the batches in flight, then stopping; "
                "a second signal ends it at once"
            )
        elif time.monotonic() - self._since > SAME:
            if signum == signal.SIGINT:
                signal.default_int_handler(signum, frame)
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def say(text: str) -> None:
    """One line on stderr, from a handler: the main thread may be in the middle of a write to sys.stderr."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"acs-fast: {text}\n".encode())
