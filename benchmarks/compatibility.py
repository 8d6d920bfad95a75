"""Does the package work with other releases of PyTorch and diffusers? Appends a row for each pair.

python -m benchmarks.compatibility                       PAIRS and TESTS below
python -m benchmarks.compatibility 2.11.0:0.36.0 --tests tests/test_parity.py

For each TORCH:DIFFUSERS a virtual environment is made, the package is installed into it from the commit at
hand with pytest and what pip finds of the other dependencies, the tests run, and it is deleted.
A row says how many passed, which did not, and the versions that pip chose. PyTorch's wheel for Linux is that
for CUDA where the index has no other: 1.6 GB to fetch and 6 GB of disk while a pair runs. The exit code is 1
where a test fails or a pair cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from acs_fast.environment import commit, device_name
from benchmarks.baselines.timing import append

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "compatibility.jsonl"
PAIRS = ("2.11.0:0.36.0", "2.11.0:0.42.1", "2.12.1:0.39.0", "2.13.0:0.36.0", "2.13.0:0.42.1")
TESTS = (
    "tests/test_pipeline.py",
    "tests/test_parts.py",
    "tests/test_parity.py",
    "tests/test_diffusers_checkpoint.py",
)
PACKAGES = ("torch", "diffusers", "numpy", "safetensors", "huggingface_hub", "pytest")
VERSIONS = f"""
import importlib.metadata, json, platform
versions = {{name: importlib.metadata.version(name) for name in {PACKAGES}}}
import torch  # its own word names the build
print(json.dumps({{**versions, "torch": torch.__version__, "python": platform.python_version()}}))
"""


class Failed(Exception):
    """A step of a pair could not be carried out; the message is its reason in one line."""


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command, OpenMP on one thread, without this process's own paths to packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def check(command: list[str], folder: Path) -> str:
    """What a command prints; raises Failed with the last line of its errors where it fails."""
    done = execute(command, folder)
    if done.returncode != 0:
        raise Failed(reason(done))
    return done.stdout


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a command ended as it did: its line that begins with ERROR, else its last one."""
    lines = [line for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    return next((line for line in lines if line.startswith("ERROR")), last)[:200]


def export(folder: Path) -> None:
    """The files of the commit at hand, without the CUDA sources: their library is not what is tested."""
    archive, at = folder.with_suffix(".tar"), ["git", "-C", str(ROOT)]
    check([*at, "archive", "--output", str(archive), "HEAD"], ROOT)
    folder.mkdir()
    check(["tar", "-xf", str(archive), "-C", str(folder), "--exclude", "*.cu"], ROOT)


def install(torch_release: str, diffusers_release: str, work: Path) -> str:
    """The Python of a new environment that holds both releases and the package; raises Failed."""
    check([sys.executable, "-m", "venv", str(work / "venv")], work)
    python = str(work / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    wanted = [f"torch=={torch_release}", f"diffusers=={diffusers_release}", "pytest"]
    check([*pip, *wanted, "-e", str(work / "tree")], work)
    return python


def run_tests(python: str, tree: Path, tests: list[str]) -> dict[str, Any]:
    """How many passed, failed and were skipped, who failed, seconds; raises Failed where none ran."""
    report = tree / "report.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    started = time.perf_counter()
    done = execute([*command, f"--junitxml={report}", *tests], tree)
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):  # all passed; some failed
        raise Failed(reason(done))
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        bad, left = kinds & {"failure", "error"}, "skipped" in kinds
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes["failed" if bad else "skipped" if left else "passed"].append(name)
    if not outcomes["passed"] and not outcomes["failed"]:
        raise Failed("every test was skipped")
    counts = {outcome: len(names) for outcome, names in outcomes.items()}
    return {**counts, "failures": outcomes["failed"], "seconds": round(seconds, 1)}


def try_pair(pair: str, tests: list[str]) -> dict[str, Any]:
    """The row of a pair `TORCH:DIFFUSERS`."""
    torch_release, _, diffusers_release = pair.partition(":")
    row: dict[str, Any] = {"torch": torch_release, "diffusers": diffusers_release}
    at = commit()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            export(work / "tree")
            python = install(torch_release, diffusers_release, work)
            versions = json.loads(check([python, "-c", VERSIONS], work))
            row |= {"torch": versions["torch"], "python": versions["python"], "versions": versions}
            row |= run_tests(python, work / "tree", tests)
        except Failed as failure:
            row["reason"] = str(failure)
    return {
        **row,
        "tests": tests,
        "device": f"cpu ({device_name(torch.device('cpu'))})",
        "commit": at and at.removesuffix("+"),  # its files were tested, not the changes since
    }


def main() -> None:
    """Parse the command line, append a row for every pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="TORCH:DIFFUSERS")
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    failed = False
    for pair in options.pairs:
        row = try_pair(pair, options.tests)
        append(options.result, row)
        failed |= "reason" in row or bool(row["failed"])
        counts = row.get("reason") or (
            f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped in {row['seconds']} s"
        )
        print(f"torch {row['torch']}, diffusers {row['diffusers']}: {counts}", flush=True)
        for name in row.get("failures", []):
            print(f"  {name}", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
