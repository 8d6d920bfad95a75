"""Signals: the first one is noted and finishes the batch, the second ends the process, as exit codes tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from acs_fast import cli
from acs_fast.stopping import SAME, Stopped, Stopping

# a batch is long; `check` comes between batches
WORK = """
    import signal, sys, time
    from acs_fast import cli
    from acs_fast.stopping import Stopped, Stopping

    def work(args):
        done, sampling = 0, time.monotonic
        try:
            with Stopping() as stopping:
                while True:
                    stopping.check()
                    print("batch", flush=True)
                    end = sampling() + {seconds}
                    while sampling() < end:
                        time.sleep(0.01)
                    done += 1
                    print("done", flush=True)
        except Stopped as error:
            raise Stopped(error.signum, f"{{done}} of 9 images are written") from None

    signal.signal(signal.SIGINT, {before})
    cli.run_distill = work
    sys.exit(cli.main(["distill"]))
"""


def start(seconds: float, before: str = "signal.default_int_handler") -> subprocess.Popen[str]:
    """A process in its first batch."""
    code = textwrap.dedent(WORK).format(seconds=seconds, before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "batch\n"
    return process


def first(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send the first signal; the line that answers it."""
    process.send_signal(number)
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_finishes_the_batch(number: signal.Signals, code: int) -> None:
    process = start(1.0)
    assert first(process, number) == (
        f"acs-fast: {number.name}: finishing the batches in flight, then stopping; "
        "a second signal ends it at once\n"
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "done\n")
    assert err == (
        f"acs-fast: stopped by {number.name}: 1 of 9 images are written; "
        "run the same command again to continue\n"
    )


@pytest.mark.parametrize("earlier", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_second_signal_ends_it_at_once(
    earlier: signal.Signals, number: signal.Signals, code: int
) -> None:
    process = start(60.0)
    first(process, earlier)
    time.sleep(SAME + 0.2)
    sent = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert (process.returncode, out) == (code, "")
    assert ("interrupted" in err) == (number == signal.SIGINT)


def test_what_a_launcher_passes_on_is_no_second_signal() -> None:
    process = start(0.5)
    first(process, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "done\n") and err.count("\n") == 1


def test_an_ignored_signal_stays_ignored() -> None:
    process = start(0.3, before="signal.SIG_IGN")
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1].startswith("acs-fast: SIGTERM")
    assert process.returncode == 143


def test_the_old_handlers_come_back() -> None:
    def mine(*args: object) -> None:
        pass

    old = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, mine)
    try:
        with pytest.raises(ZeroDivisionError), Stopping():
            assert signal.getsignal(signal.SIGTERM) is not mine is not signal.getsignal(signal.SIGINT)
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is mine is signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, old[0]), signal.signal(signal.SIGINT, old[1])


def test_check_raises_the_signal_that_came(capfd) -> None:
    with Stopping() as stopping:
        stopping.check()
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(Stopped, match=r"^stopped by SIGTERM$") as stopped:
                stopping.check()
    assert (stopping.signum, stopped.value.signum, stopped.value.code) == (15, 15, 143)
    assert capfd.readouterr().err.count("\n") == 1


def test_another_thread_changes_no_handler() -> None:
    found: list[object] = []

    def run() -> None:
        with Stopping() as stopping:
            stopping.check()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_stderr_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom acs_fast.stopping import Stopping\nos.close(2)\n"
        "with Stopping() as stopping: os.kill(os.getpid(), signal.SIGTERM)\nprint(stopping.signum)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "15\n")


@pytest.mark.parametrize("command", ["distill", "train"])
def test_only_what_can_be_continued_says_so(command: str, monkeypatch, capsys) -> None:
    def stopped(args: object) -> None:
        raise Stopped(signal.SIGTERM, "3 of 9 images are written")

    monkeypatch.setattr(cli, f"run_{command}", stopped)
    assert cli.main([command]) == 143
    again = "; run the same command again to continue" if command == "distill" else ""
    assert capsys.readouterr().err == f"acs-fast: stopped by SIGTERM: 3 of 9 images are written{again}\n"
