"""`acs-fast status` of folders made by hand, written to, killed, damaged; and that it writes nothing."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from acs_fast import log, manifest, status, writer
from acs_fast.cli import main
from acs_fast.config import DistillConfig, resolve
from acs_fast.log import Log
from acs_fast.manifest import Manifest, Rows
from acs_fast.status import Status
from acs_fast.writer import lock
from tests.runs import contents, refused
from tests.test_log import Clocks

CLASSES = ("3", "8")
Key = tuple[str, int]


def record(out: Path, **settings: object) -> dict:
    """Write a run's record: two classes, four images each in two curricula."""
    config = resolve(DistillConfig, {"ipc": 4, "num_curricula": 2, "out": str(out), **settings})
    made = {
        "config": dataclasses.asdict(config),
        "classes": list(CLASSES),
        "class_labels": [3, 8],
        "model_sha256": "0",
        "device": "cpu",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(made))
    return made


def add(out: Path, keys: Iterable[Key], rank: int = 0) -> None:
    """Images and rows as a process writes them."""
    keys = list(keys)
    rows = [{"class": name, "index": index, "curriculum": 1 + index // 2, "seed": 0} for name, index in keys]
    Manifest(out, rank=rank).append([repr(key).encode() for key in keys], rows)


def every(indices: Iterable[int] = range(4)) -> list[Key]:
    """The images of some indices."""
    return [(name, index) for name in CLASSES for index in indices]


def finish(out: Path) -> Path:
    """A whole run."""
    record(out)
    add(out, every())
    (out / "discriminators").mkdir()
    for name in ("2", "real"):
        (out / "discriminators" / f"{name}.safetensors").write_bytes(b"")
    (out / "contact_sheet.png").write_bytes(b"")
    return out


def stamped(out: Path) -> dict[str, tuple[int, int]]:
    """When each file and folder of a run was changed, and its size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in (out, *out.rglob("*"))}


def counts(found: Status) -> list[tuple[int, int, bool | None]]:
    """The curricula, briefly."""
    return [(part.written, part.images, part.discriminator) for part in found.curricula]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run folder to be."""
    return tmp_path / "run"


def test_a_run_that_is_under_way(out: Path, capsys) -> None:
    record(out)
    add(out, every([0, 1]), rank=1)
    add(out, [("8", 3)])
    found = status.status(out)
    assert (found.written, found.images, found.finished, found.writing) == (5, 8, False, False)
    assert counts(found) == [(4, 4, None), (1, 4, False)]
    assert dataclasses.astuple(found.missing) == (3, ("3/2", "3/3", "8/2"))
    assert (found.damaged, found.rate, found.eta, found.waited, found.last_event) == (
        None,
        None,
        None,
        0,
        None,
    )
    assert main(["status", str(out)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 5 of 8 images are written; not finished",
        "  digits, 2 classes x 4 in 2 curricula, adversarial 0.15 x sigma, ddpm with 50 steps, CFG 2, png, "
        "seed 0, cpu",
        "  curriculum 1: 4 of 4",
        "  curriculum 2: 1 of 4  discriminator not trained",
        "  missing: 3 (3/2, 3/3, 8/2)",
        "  run the same command again to make what is missing or damaged",
    ]


def test_a_whole_run(out: Path, capsys) -> None:
    assert counts(status.status(finish(out))) == [(4, 4, None), (4, 4, True)]
    assert main(["status", str(out), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "8 of 8 images are written; finished\n" in text and "damaged: 0" in text
    assert "missing" not in text and "again" not in text


@pytest.mark.parametrize("lost", ["contact_sheet.png", "images/8/2.png", "manifest.0.jsonl"])
def test_a_run_that_lacks_something_is_not_whole(out: Path, lost: str) -> None:
    (finish(out) / lost).unlink()
    found = status.status(out)
    assert main(["status", str(out)]) == 1
    assert found.missing.count == {"contact_sheet.png": 0, "images/8/2.png": 1, "manifest.0.jsonl": 8}[lost]
    if found.missing.count == 1:
        assert found.missing.first == ("8/2",) and counts(found) == [(4, 4, None), (3, 4, True)]


def test_verify_finds_what_a_glance_does_not(out: Path, capsys) -> None:
    path = finish(out) / "images" / "3" / "1.png"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (out / "images" / "8" / "0.png").unlink()
    assert status.status(out).damaged is None
    found = status.status(out, verify=True)
    assert found.damaged is not None
    assert (found.damaged.count, found.damaged.first) == (1, ("3/1",))  # what is gone is missing, no more
    assert (found.missing.first, found.written) == (("8/0",), 7)
    assert main(["status", str(out), "--verify"]) == 1
    assert "  missing: 1 (8/0)\n  damaged: 1 (3/1)\n" in capsys.readouterr().out


def test_damage_alone_makes_the_code_1(out: Path) -> None:
    (finish(out) / "images" / "3" / "1.png").write_bytes(b"")
    assert main(["status", str(out)]) == 0
    assert main(["status", str(out), "--verify"]) == 1


def test_nothing_is_written(out: Path) -> None:
    finish(out)
    (out / "images" / "3" / "0.png.tmp").write_bytes(b"half")
    (out / "images" / "3" / "1.png").write_bytes(b"damaged")
    before, files = stamped(out), contents(out)
    for arguments in ([], ["--verify"], ["--json"]):
        main(["status", str(out), *arguments])
    assert stamped(out) == before and contents(out) == files and not (out / ".lock").exists()


def test_names_are_few(out: Path, capsys) -> None:
    record(out, ipc=40)
    assert status.status(out).missing.first == ("3/0", "3/1", "3/2", "3/3", "3/4")
    main(["status", str(out)])
    assert "missing: 80 (3/0, 3/1, 3/2, 3/3, 3/4, ...)" in capsys.readouterr().out


def test_curricula_that_are_not_equal(out: Path) -> None:
    record(out, ipc=5, num_curricula=2)  # indices 0, 1 and 2, 3, 4
    add(out, [("8", 1), ("3", 4)])
    found = status.status(out)
    assert [(part.written, part.images) for part in found.curricula] == [(1, 4), (1, 6)]
    assert found.missing.first == ("3/0", "3/1", "8/0", "3/2", "3/3")


@pytest.mark.parametrize("settings", [{"guidance_scale": 0.0}, {"num_curricula": 1}], ids=str)
def test_without_guidance_no_discriminator_is_spoken_of(out: Path, settings: dict, capsys) -> None:
    record(out, **settings)
    assert {part.discriminator for part in status.status(out).curricula} == {None}
    main(["status", str(out)])
    assert "discriminator" not in capsys.readouterr().out


def test_json_is_all_that_is_printed(out: Path, capsys) -> None:
    finish(out)
    assert main(["status", str(out), "--verify", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert {"whole", *(field.name for field in dataclasses.fields(Status))} == set(found)
    assert found["curricula"][1] == {"curriculum": 2, "images": 4, "written": 4, "discriminator": True}
    assert found["whole"] is True and found["missing"] == {"count": 0, "first": []} and captured.err == ""


def spoil(out: Path, kind: str) -> Path:
    """What is no run folder."""
    made = record(out)
    path = out / "config.json"
    if kind == "absent":
        return out / "absent"
    if kind == "empty":
        path.unlink()
    elif kind == "file":
        return path
    else:
        broken = {
            "half": json.dumps(made)[:-9],
            "another program's": json.dumps({"model_type": "dit"}),
            "a list": "[]",
            "no classes": json.dumps({**made, "classes": []}),
            "a word": json.dumps({**made, "config": {**made["config"], "ipc": "x"}}),
            "another version's": json.dumps({**made, "config": {**made["config"], "magic": 1}}),
        }
        path.write_text(broken[kind])
    return out


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "empty",
        "file",
        "half",
        "another program's",
        "a list",
        "no classes",
        "a word",
        "another version's",
    ],
)
def test_what_is_no_run_folder_is_refused(out: Path, kind: str, capsys, monkeypatch) -> None:
    path = spoil(out, kind)
    monkeypatch.setattr(status.time, "sleep", lambda seconds: pytest.fail("taken for a folder that changes"))
    assert str(path) in refused(["status", str(path)], capsys)


def test_rows_of_nothing_are_no_images(out: Path) -> None:
    record(out)
    add(out, [("3", 0), ("3", 0)])
    add(out, [("3", 0), ("9", 0), ("3", 99), ("3", -1)], rank=1)
    (out / "images" / "3" / "3.png").write_bytes(b"its row was not written any more")
    with open(out / "manifest.1.jsonl", "a") as file:
        file.write('{"class": "8", "index": 0')
    assert status.status(out).written == 1


def test_the_last_row_of_an_image_counts(out: Path) -> None:
    record(out)
    add(out, [("3", 0)])
    path = out / "manifest.0.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "sha256": "0" * 64}) + "\n" + json.dumps(row) + "\n")
    found = status.status(out, verify=True)
    assert found.damaged is not None and found.damaged.count == 0


def test_the_lock_is_asked_and_left_alone(out: Path, capsys) -> None:
    record(out)
    with lock(out):
        assert status.status(out).writing is True
        assert status.status(out).writing is True
        main(["status", str(out)])
        text = capsys.readouterr().out
        assert "a process is writing to it now" in text and "run the same" not in text
    assert (out / ".lock").exists() and status.status(out).writing is False
    with open(out / ".lock") as another:  # another one who asks
        fcntl.flock(another, fcntl.LOCK_SH)
        assert status.status(out).writing is False
    with lock(out):
        pass


def test_a_lock_that_cannot_be_asked(out: Path, monkeypatch, capsys) -> None:
    finish(out)
    (out / ".lock").touch()

    def flock(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(status.fcntl, "flock", flock)
    assert status.status(out).writing is None
    assert main(["status", str(out)]) == 0
    assert "its lock cannot be asked" in capsys.readouterr().out


def test_an_image_without_a_file_of_its_own_is_asked_for(out: Path, monkeypatch) -> None:
    record(out)
    add(out, every())
    for path in (out / "images" / "3").iterdir():
        path.unlink()
    (out / "images" / "3").rmdir()

    class Packed(status.Images):
        def read(self, key: Key) -> bytes | None:
            return repr(key).encode() if key == ("3", 2) else super().read(key)

        def holds(self, key: Key) -> bool:
            return key == ("3", 2) or super().holds(key)

    monkeypatch.setattr(status, "Images", Packed)
    found = status.status(out, verify=True)
    assert found.missing.first == ("3/0", "3/1", "3/3") and found.damaged is not None
    assert found.damaged.count == 0


def once(action: object) -> Iterator[None]:
    """Do something the first time."""
    action()  # type: ignore[operator]
    while True:
        yield


@pytest.mark.parametrize("moment", ["before", "after", "verifying"])
@pytest.mark.parametrize("verify", [False, True])
def test_a_merge_in_the_middle_does_no_harm(out: Path, monkeypatch, moment: str, verify: bool) -> None:
    record(out)
    add(out, reversed(every([0, 1])), rank=1)
    add(out, reversed(every([2, 3])))
    order = {key: place for place, key in enumerate(every())}

    def merge() -> None:
        Rows(out, lambda name, index: order.get((name, index)), 8).merge()

    steps = once(merge)

    class Read(Rows):
        def __init__(self, *arguments: object):
            files = manifest.row_files(out)
            if moment == "before":  # listed, then merged, then read
                with monkeypatch.context() as patch:
                    next(steps)
                    patch.setattr(manifest, "row_files", lambda *_: [p for p in files if p.exists()] or files)
                    super().__init__(*arguments)  # type: ignore[arg-type]
            else:
                super().__init__(*arguments)  # type: ignore[arg-type]
                if moment == "after":
                    next(steps)

    def settle(*arguments: object) -> status.Found:
        found = settled(*arguments)  # type: ignore[arg-type]
        if moment == "verifying":
            next(steps)
        return found

    settled = status.settled
    monkeypatch.setattr(status, "settled", settle)
    monkeypatch.setattr(status, "Rows", Read)
    found = status.status(out, verify)
    assert found.written == 8 and (found.damaged.count if found.damaged else 0) == 0
    assert (out / "manifest.jsonl").is_file() and not (out / "manifest.0.jsonl").exists()


def test_rows_that_are_gone_before_they_are_read_are_looked_for_again(out: Path, monkeypatch) -> None:
    finish(out)

    def look(*arguments: object) -> Rows:
        if not tried:
            tried.append(True)
            raise FileNotFoundError
        return Rows(*arguments)  # type: ignore[arg-type]

    tried: list[bool] = []
    monkeypatch.setattr(status, "Rows", look)
    assert status.status(out).whole and tried


def test_a_folder_that_never_rests_is_one_sentence(out: Path, monkeypatch, capsys) -> None:
    record(out)
    monkeypatch.setattr(status, "PAUSE", 0)
    numbers = iter(range(1000))
    monkeypatch.setattr(status, "stamps", lambda out: next(numbers))
    assert "changes faster than it can be read" in refused(["status", str(out)], capsys)


WRITER = """
    import sys
    from pathlib import Path
    from acs_fast.manifest import Manifest, Rows
    from acs_fast.writer import lock

    out, number = Path(sys.argv[1]), 0
    with lock(out):
        print("locked", flush=True)
        while True:
            key = ("38"[number % 2], number // 2 % 40)
            row = {"class": key[0], "index": key[1], "curriculum": 1, "seed": 0}
            Manifest(out).append([repr(key).encode()], [row])
            number += 1
            if number % 7 == 0:
                Rows(out, lambda name, index: "38".index(name) * 40 + index, 80).merge()
"""


def test_a_run_is_looked_at_while_it_is_written_and_after_its_kill(out: Path) -> None:
    record(out, ipc=40)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(out)]
    seen = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "locked\n"
            for number in range(60):
                found = status.status(out, verify=number % 2 == 0)
                assert found.writing and (found.damaged is None or found.damaged.count == 0)
                seen.append(found.written)
        finally:
            process.kill()
    assert seen == sorted(seen) and seen[-1] > 0
    found = status.status(out, verify=True)
    assert found.writing is False and found.damaged is not None and found.damaged.count == 0
    assert seen[-1] <= found.written <= len(list((out / "images").rglob("*.png")))


def test_the_time_to_go_hangs_on_no_wall_clock(out: Path, monkeypatch, capsys) -> None:
    clocks = Clocks()
    monkeypatch.setattr(log, "time", clocks)
    record(out)
    add(out, [*every([0, 1]), ("3", 2)])
    with Log(out, 0, as_json=True) as file:
        file.event("start", num_ranks=1, missing=8, total=8)
        for images, seconds in ((4, 30.0), (1, 20.0)):
            clocks.seconds += seconds
            file.event("batch", curriculum=1, images=images, seconds=seconds)
        file.event("wait", writer_seconds=2.5)
    found = status.status(out)
    assert (found.rate, found.eta, found.waited) == (pytest.approx(0.1), pytest.approx(30.0), 2.5)
    main(["status", str(out)])
    text = capsys.readouterr().out
    assert "  0.1 images/s over the last ten minutes of batches, 0:00:30 to go\n" in text
    assert f"  last event {found.last_event}; 2.5 s waited for the writer\n" in text
    (out / "contact_sheet.png").touch()
    assert status.status(out).eta is None


def test_twenty_thousand_images_take_a_second_or_two(out: Path) -> None:
    made = record(out, ipc=200)
    made["classes"] = [str(number) for number in range(100)]
    (out / "config.json").write_text(json.dumps(made))
    with open(out / "manifest.jsonl", "w") as rows:
        for name in made["classes"]:
            (out / "images" / name).mkdir(parents=True)
            for index in range(200):
                os.mknod(out / "images" / name / f"{index}.png")
                row = {"class": name, "index": index, "curriculum": 1, "seed": 0, "sha256": "0" * 64}
                rows.write(json.dumps(row) + "\n")
    started = time.process_time()
    assert status.status(out).written == 20_000
    assert time.process_time() - started < 1.0  # of this process alone: other work must not fail the test


def test_the_names_of_the_run_folder_are_the_writers() -> None:
    assert log.LOGS in writer.CONTENTS
