"""What stops a batch: full disks, kills, interrupts, values that are not finite; what is written is whole."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest
from torch import Tensor

from acs_fast import InputError, output, writer
from acs_fast.manifest import read_rows
from acs_fast.writer import write_atomic
from tests.output_runs import Gate, bad, decode, holds, make, put, samples_of, whole_files
from tests.runs import contents


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    return whole_files(tmp_path)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_exception_keeps_its_kind_and_what_is_in_flight_is_finished(
    tmp_path, monkeypatch, whole, kind: type[BaseException]
) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(kind, match="the main thread"), make(tmp_path / "run", depth=4) as o:
        for number in range(4):
            put(o, number)
        gate.open_later()
        raise kind("the main thread")
    assert contents(tmp_path / "run") == whole
    assert not any(thread.name.startswith(("write", "encode", "file")) for thread in threading.enumerate())


def test_an_exception_is_kept_where_the_writer_fails_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "run") as o:
        put(o, 0)
        raise KeyboardInterrupt
    assert not read_rows(tmp_path / "run")


def test_interrupted_while_it_finishes_it_ends_with_the_batch_at_hand(tmp_path, monkeypatch, whole) -> None:
    gate = Gate(monkeypatch)

    def interrupted(futures: object) -> None:
        gate.open_later()
        raise KeyboardInterrupt("again")

    monkeypatch.setattr(output, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt, match="again"), make(tmp_path / "run", depth=4) as o:
        for number in range(4):
            put(o, number)
        assert gate.reached.wait(20)
        raise KeyboardInterrupt("once")
    kept = contents(tmp_path / "run")
    assert whole["manifest.0.jsonl"].startswith(kept.pop("manifest.0.jsonl"))
    assert len(kept) == 4 and kept.items() <= whole.items()
    assert len(read_rows(o.manifest.out)) == 3


class Killed(BaseException):
    """Stands for the end of the process."""


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def fail_at(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Fail in the middle of the write with this number: of a file, or of the manifest."""
    calls, real = iter(range(1, 1000)), writer.os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == number:
            raise error
        real(descriptor)

    patch.setattr(writer.os, "fsync", fsync)


@pytest.mark.parametrize("number", range(1, 16))  # 5 writes a batch: samples, three images, the manifest
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()], ids=["full", "killed"])
def test_a_failed_write_stops_the_run_which_goes_on_later(
    tmp_path, monkeypatch, whole, number: int, error
) -> None:
    out, submitted = tmp_path / "run", 0
    with monkeypatch.context() as patch:
        fail_at(patch, number, error)
        with pytest.raises(type(error)) as raised, make(out) as o:
            for i in range(4):
                put(o, i)
                submitted += 1
            o.flush()
    if isinstance(error, OSError) and number % 5:
        assert str(out) in raised.value.filename  # write_atomic names the file
    files, done = contents(out), (number - 1) // 5
    assert submitted > done
    for i in range(4):
        assert holds(out, i) == (i < done or (i == done and number % 5 == 0))  # unsynced, but there
        assert (f"samples/2-{i}.safetensors" in files) == (i < done or (i == done and number % 5 != 1))
    stored = [hashlib.sha256(value).hexdigest() for name, value in files.items() if name.startswith("images")]
    assert {row["sha256"] for row in read_rows(out).values()} <= set(stored)
    for name, value in files.items():  # whole or absent
        assert name.endswith((".tmp", "manifest.0.jsonl")) or value == whole[name]
    with make(out) as o:
        for i in range(4):
            if not holds(out, i):
                put(o, i)
    assert {k: v for k, v in contents(out).items() if not k.endswith(".tmp")} == whole


def test_an_error_is_raised_once_and_nothing_more_is_taken(tmp_path, monkeypatch) -> None:
    with make(tmp_path / "run") as o:
        put(o, 0)
        o.flush()
        kept = contents(tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(writer.os, "fsync", full)
            put(o, 1)
            with pytest.raises(OSError, match="No space left"):
                o.flush()
        o.flush()
        with pytest.raises(RuntimeError, match="an earlier batch failed"):
            put(o, 2)
    assert contents(tmp_path / "run") == kept


def test_a_batch_behind_a_failed_one_is_not_written(tmp_path, monkeypatch) -> None:
    reached, opened = threading.Event(), threading.Event()

    def failing(path: Path, data: bytes) -> None:
        reached.set()
        assert opened.wait(20)
        monkeypatch.setattr(writer, "write_atomic", write_atomic)  # room again: the next would succeed
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_atomic", failing)
    with make(tmp_path / "run", depth=3) as o:
        for number in range(3):
            put(o, number)
        opened.set()
        with pytest.raises(OSError, match="No space left"):
            o.flush()
    assert contents(tmp_path / "run") == {}


def test_an_error_found_while_submit_looks_is_the_one_raised(tmp_path, monkeypatch) -> None:
    o = make(tmp_path / "run", depth=2)
    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), o:
        put(o, 0)
        while not o._failed:
            time.sleep(0.01)
        monkeypatch.setattr(o, "_raise_error", lambda: monkeypatch.undo())  # looked just before it failed
        put(o, 1)
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("when", ["submit", "flush", "exit"])
def test_a_sample_that_is_not_finite_names_class_index_and_step(tmp_path, whole, when: str) -> None:
    threads: list[threading.Thread] = []

    def locate() -> tuple[int, int]:
        threads.append(threading.current_thread())
        return 2, 31  # the last row was the first to go wrong

    sentence = (
        "class c2 index 1 of curriculum 2 is not finite at step 31; "
        "check the model's weights or lower --guidance-scale"
    )
    with pytest.raises(InputError, match=f"^{sentence}$"), make(tmp_path / "run") as o:
        put(o, 0)
        put(o, 1, bad(1, 1), locate=locate)
        if when == "submit":
            while not o._failed:
                time.sleep(0.01)
            put(o, 2)
        if when == "flush":
            o.flush()
    assert threads == [threading.main_thread()]
    kept = contents(tmp_path / "run")  # the batch before, whole; of the bad one not even its finite images
    assert set(kept) == {
        "manifest.0.jsonl",
        "samples/2-0.safetensors",
        *(f"images/c{i}/0.png" for i in range(3)),
    }
    rows = kept.pop("manifest.0.jsonl")
    assert whole["manifest.0.jsonl"].startswith(rows) and rows.count(b"\n") == 3
    assert kept.items() <= whole.items()


@pytest.mark.parametrize("locate", [None, lambda: None], ids=["no way", "found nothing"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_a_step_the_sample_is_still_named(tmp_path, locate, value: float) -> None:
    samples = samples_of(3)
    samples[1, 0, 0, 0] = value
    sentence = "class c1 index 3 of curriculum 2 is not finite; check the model's weights or lower --guid"
    with pytest.raises(InputError, match=f"^{sentence}"), make(tmp_path / "run") as o:
        put(o, 3, samples, locate=locate)
    assert contents(tmp_path / "run") == {}


def test_an_image_that_is_not_finite_is_the_vaes(tmp_path) -> None:
    def overflow(latents: Tensor) -> Tensor:
        images = decode(latents)
        images[2, 0, 3, 3] = float("inf")
        return images

    def locate() -> tuple[int, int]:
        raise AssertionError("every step was finite")

    sentence = "class c2 index 0 of curriculum 2 is not finite after the VAE; use --dtype fp32"
    with pytest.raises(InputError, match=f"^{sentence}$"), make(tmp_path / "run", overflow) as o:
        put(o, 0, locate=locate)
    assert contents(tmp_path / "run") == {}
