"""Does a run whose ranks are killed again and again end with the same bytes? Appends a row.

python -m benchmarks.faults --kills 100 [--ranks 2] [--seed 0]    a row in results/faults.jsonl

Runs of three curricula on the bundled digits, as PNGs and in shards, with and without --keep-latents in turn.
Each is started by torchrun, a random rank is killed by SIGKILL at a random moment, and it is started again,
until it ends by itself. After every kill each image must be whole and each manifest row must have its image;
at the end the folder must be that of a run that nobody killed, byte for byte (but its logs and its lock).
The exit code is 1 where something was not so; then the folders stay.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from acs_fast.environment import describe
from acs_fast.images import IMAGES, Images
from acs_fast.judge import read_curricula
from acs_fast.log import read_events
from acs_fast.manifest import read_rows
from acs_fast.samples import FOLDER
from acs_fast.writer import read_tensors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "faults.jsonl"
CLASSES, IPC, CURRICULA = 4, 9, 3
SETTINGS = (
    f"--classes 3,8,5,1 --ipc {IPC} --num-curricula {CURRICULA} --num-sampling-steps 20 --batch-size 2 "
    "--guidance-window 0 1 --discriminator convnet-1 --discriminator-steps 100 --deterministic --device cpu "
    "--log-json --out run"
).split()
PATIENCE = 60.0  # seconds in which the others must have ended after a kill
EARLY = 0.2  # share of the kills before the run is under way, which takes longer than the rest
PHASES = ("starting", "sampling", "discriminator", "finishing")
POLL = 0.01  # seconds
FORKS = multiprocessing.get_context("forkserver")  # torchrun's imports, which take a second, once for all


@dataclass(frozen=True)
class Case:
    """What is written, and how."""

    format: str
    keep_latents: bool

    @property
    def argv(self) -> list[str]:
        """The command line of the run, in its folder `run`."""
        keep = "--keep-latents" if self.keep_latents else "--no-keep-latents"
        return ["distill", *SETTINGS, "--format", self.format, keep]


CASES = [Case(format, keep) for keep in (False, True) for format in ("png", "wds")]


@dataclass
class Whole:
    """A run that nobody killed: its files, its images, the seconds of its start and of its work."""

    files: dict[str, bytes]
    images: dict[tuple[str, int], bytes]
    startup: float = 0.0
    work: float = 0.0


class Launch:
    """A run under torchrun, from its start to its end.

    place: the folder that it runs in. argv: of acs_fast, with `--out run`.
    """

    def __init__(self, place: Path, argv: list[str], num_ranks: int):
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.out, self.num_ranks = place, place / "run", num_ranks
        self.before = Counter(event["rank"] for event in read_events(self.out) if event["event"] == "start")
        self.began = time.monotonic()
        self.process = FORKS.Process(target=torchrun, args=(place, argv, num_ranks), daemon=True)
        self.process.start()

    def events(self, rank: int) -> list[dict[str, Any]] | None:
        """What a rank has logged since this start; None before it has said that it is under way."""
        starts, own = 0, None
        for event in read_events(self.out):
            if event["rank"] == rank:
                starts += event["event"] == "start"
                if starts > self.before[rank]:
                    own = [] if own is None else own
                    own.append(event)
        return own

    def pids(self) -> dict[int, int]:
        """The processes of the ranks."""
        found = {}
        with contextlib.suppress(OSError):
            agent = self.process.pid
            for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(child)
        return found

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """Wait until it holds; False where the launch has ended before."""
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            time.sleep(POLL)
        return True

    def kill(self, rank: int) -> bool:
        """Kill a rank by SIGKILL, not torchrun, whose agent ends the others; False where it has ended."""
        pid = self.pids().get(rank)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code of torchrun; None where it did not come, and all of it has been killed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            for pid in (*self.pids().values(), self.process.pid):
                assert pid is not None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return None
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it has printed."""
        return (self.place / "output.txt").read_text()


def torchrun(place: Path, argv: list[str], num_ranks: int) -> None:
    """`torchrun --standalone --nproc-per-node N -m acs_fast ...` in this process, in the folder `place`."""
    from torch.distributed.run import main as run

    os.chdir(place)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv[0] = "torchrun"
    run(["--standalone", "--nproc-per-node", str(num_ranks), "-m", "acs_fast", *argv])


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run folder but its lock and its logs."""
    files = (path for path in out.rglob("*") if path.is_file())
    names = {path.relative_to(out): path for path in files}
    return {
        str(name): path.read_bytes()
        for name, path in names.items()
        if name.parts[0] != "logs" and name.name != ".lock"
    }


def make_whole(place: Path, case: Case, num_ranks: int) -> Whole:
    """Let a run end by itself."""
    launch = Launch(place, case.argv, num_ranks)
    assert launch.wait_for(launch.pids), launch.text
    processes = time.monotonic()
    launch.wait_for(lambda: launch.events(num_ranks - 1))
    started = time.monotonic()
    code = launch.wait()
    assert code == 0, launch.text
    whole = read_whole(launch.out, case)
    return replace(whole, startup=started - processes, work=time.monotonic() - started)


def read_whole(out: Path, case: Case) -> Whole:
    """The files and images of a run that has ended."""
    images = Images(out, case.format)
    found = {key: data for key in read_rows(out) if (data := images.read(key)) is not None}
    assert len(found) == CLASSES * IPC
    return Whole(contents(out), found)


def damage(out: Path, case: Case, whole: Whole) -> list[str]:
    """What is not as it must be in a run folder that a kill left behind; nobody writes to it."""
    found, images = [], Images(out, case.format)
    for path in sorted((out / IMAGES).rglob("*")):
        if path.suffix == ".png":
            if path.read_bytes() != whole.images[path.parent.name, int(path.stem)]:
                found.append(f"{path.relative_to(out)} is not the image")
        elif path.suffix == ".tar" and path.read_bytes() != whole.files[str(path.relative_to(out))]:
            found.append(f"{path.relative_to(out)} is not the shard")
    for key, row in read_rows(out).items():
        data = images.read(key)
        if data is None or hashlib.sha256(data).hexdigest() != row["sha256"]:
            found.append(f"the row of {key} has {'no' if data is None else 'another'} image")
    for path in (out / "discriminators").glob("*.safetensors"):
        if path.read_bytes() != whole.files[str(path.relative_to(out))]:
            found.append(f"{path.relative_to(out)} differs")
    for path in (out / FOLDER).glob("*.safetensors"):
        if read_tensors(path) is None:
            found.append(f"{path.relative_to(out)} is not whole")
    return found


def differences(out: Path, whole: Whole) -> list[str]:
    """The files in which an ended run is not the one that nobody killed; a left .tmp is one."""
    files = contents(out)
    return sorted(
        name for name in files.keys() | whole.files.keys() if files.get(name) != whole.files.get(name)
    )


def phase(launch: Launch, rank: int) -> str:
    """Where a rank was when it died, by its log and by what lies in the folder."""
    if launch.events(rank) is None:
        return "starting"
    done = Counter(row["curriculum"] for row in read_rows(launch.out).values())
    size = CLASSES * IPC // CURRICULA
    curriculum = next((i for i in range(1, CURRICULA + 1) if done[i] < size), None)
    if curriculum is None:
        return "finishing"
    trained = curriculum == 1 or str(curriculum) in read_curricula(launch.out)
    return "sampling" if trained else "discriminator"


@dataclass
class Tally:
    """What the chains of runs count together; `lock` guards it."""

    left: int  # kills that are still to be done
    phases: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    resumes: int = 0
    runs: int = 0
    slowest: float = 0.0  # seconds from a kill to the end of the other ranks
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """Whether a kill is left, which is then the caller's."""
        with self.lock:
            self.left -= (taken := self.left > 0)
            return taken

    def note_kill(self, launch: Launch, rank: int, where: str, seconds: float) -> None:
        """Count a kill that has been done."""
        with self.lock:
            self.phases[where] += 1
            self.ranks[rank] += 1
            self.slowest = max(self.slowest, seconds)
            done = sum(self.phases.values())
        print(f"{done:4d} {launch.place.name}: rank {rank}, {where}, {seconds:.1f} s", flush=True)

    def note_wrong(self, what: list[str], place: Path, when: str) -> None:
        """Count and tell what is not as it should be."""
        with self.lock:
            self.wrong += [f"{place}: {when}: {text}" for text in what]
        for text in what:
            print(f"WRONG in {place}, {when}: {text}", flush=True)


def attempt(launch: Launch, rank: int, whole: Whole, rng: random.Random) -> str | None:
    """Kill a rank at a random moment; the phase that it was in, or None where it ended before."""
    launch.wait_for(launch.pids)
    early = rng.random() < EARLY
    if not early:
        launch.wait_for(lambda: launch.events(rank))
    end = time.monotonic() + rng.uniform(0.0, whole.startup if early else whole.work)
    launch.wait_for(lambda: time.monotonic() >= end)
    return phase(launch, rank) if launch.kill(rank) else None


def run_and_kill(
    place: Path, case: Case, whole: Whole, num_ranks: int, tally: Tally, rng: random.Random
) -> None:
    """One run, from its first start to its end, with the kills that come its way."""
    for start in itertools.count():
        launch, rank, taken = Launch(place, case.argv, num_ranks), rng.randrange(num_ranks), tally.take()
        where = attempt(launch, rank, whole, rng) if taken else None
        killed = time.monotonic()
        code = launch.wait()
        where = None if code == 0 else where  # the rank had done its work before
        with tally.lock:
            tally.resumes += start > 0
            tally.left += taken and where is None
        if code is None:
            tally.note_wrong([f"not all ranks ended in {PATIENCE:g} s"], place, f"start {start}")
        if where is not None:
            tally.note_kill(launch, rank, where, time.monotonic() - killed)
            tally.note_wrong(damage(launch.out, case, whole), place, f"start {start}, {where}")
        elif code == 0:
            break
        else:
            tally.note_wrong([f"exit code {code}: {launch.text}"], place, f"start {start}")
            return
    different = differences(place / "run", whole)
    tally.note_wrong([f"{name} differs" for name in different], place, "at its end")
    with tally.lock:
        tally.runs += 1
    if not any(text.startswith(f"{place}:") for text in tally.wrong):
        shutil.rmtree(place)


def measure(kills: int, num_ranks: int, seed: int, chains: int, folder: Path) -> tuple[dict[str, Any], int]:
    """Kill so often; the row, and how many things were wrong."""
    wholes = [make_whole(folder / f"whole-{i}", case, num_ranks) for i, case in enumerate(CASES)]
    tally, began = Tally(kills), time.monotonic()
    numbers = itertools.count()

    def chain(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while tally.left > 0:
            run = next(numbers)
            kind = run % len(CASES)
            place = folder / f"run-{run}-{CASES[kind].format}{'-latents' * CASES[kind].keep_latents}"
            run_and_kill(place, CASES[kind], wholes[kind], num_ranks, tally, rng)

    with ThreadPoolExecutor(chains) as pool:
        for future in [pool.submit(chain, number) for number in range(chains)]:
            future.result()
    row = {
        "kills": tally.phases.total(),
        "by_phase": {name: tally.phases[name] for name in PHASES},
        "by_rank": [tally.ranks[rank] for rank in range(num_ranks)],
        "runs": tally.runs,
        "resumes": tally.resumes,
        "mismatches": len(tally.wrong),
        "slowest_stop_seconds": round(tally.slowest, 1),
        "seconds": round(time.monotonic() - began, 1),
        "whole_seconds": [round(whole.startup + whole.work, 1) for whole in wholes],
        "settings": " ".join(SETTINGS),
        "ranks": num_ranks,
        "seed": seed,
        "chains": chains,
        **describe(torch.device("cpu")),
    }
    return row, len(tally.wrong)


def main() -> int:
    """Parse the command line and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks")
    parser.add_argument("--chains", type=int, default=2, help="runs at a time: one waits while one starts")
    parser.add_argument("--folder", default=None, help="where the runs lie; default: the system's own")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that the row is appended to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    FORKS.set_forkserver_preload(["torch.distributed.run"])
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="faults-"))
    row, wrong = measure(args.kills, args.ranks, args.seed, args.chains, folder)
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
