"""Edits that break a kernel, its specification or the engine, each of which must turn a few tests red.

python -m tests.mutations            all of them; exit 1 and name the survivors
python -m tests.mutations WORD ...   those whose name holds one of the words

Each edit is made in a copy of the tree. Its tests are a `pytest -k` expression over one file, which must pass
without the edit and fail by an assertion with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.edits import EMULATION, Mutation
from tests.edits_drop_in import DROP_IN_EDITS
from tests.edits_engine import ENGINE
from tests.edits_evaluation import EVALUATION
from tests.edits_features import FEATURE_EDITS
from tests.edits_kernels import KERNELS
from tests.edits_networks import NETWORKS
from tests.edits_pages import PAGE_EDITS
from tests.edits_parts import PART_EDITS
from tests.edits_ranks import RANKS
from tests.edits_real import REAL
from tests.edits_report import REPORT

ROOT = Path(__file__).resolve().parent.parent
TREE = ("acs_fast", "kernels", "tests", "docs", "examples", "pyproject.toml", "mkdocs.yml", "CMakeLists.txt")
MUTATIONS = (
    KERNELS
    + ENGINE
    + REAL
    + RANKS
    + REPORT
    + NETWORKS
    + FEATURE_EDITS
    + EVALUATION
    + PART_EDITS
    + PAGE_EDITS
    + DROP_IN_EDITS
)
WORKERS = 2


def broken_edits(mutations: Iterable[Mutation], root: Path) -> list[str]:
    """Edits that do not fit the sources any more."""
    found = []
    for m in mutations:
        times = (root / m.file).read_text().count(m.old) if (root / m.file).exists() else 0
        if times != 1:
            found.append(f"{m.name}: {m.file} holds its old text {times} times, not once")
    return found


def copy_tree(target: Path) -> None:
    """What the op tests need, without data and caches."""
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, target / name)


def run_tests(tree: Path, path: str, expression: str) -> tuple[int, str]:
    """pytest's exit status and output for a -k expression, stopped at the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", path, "-k", expression]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdict(path: str, expression: str, mutation: Mutation | None) -> tuple[str, float]:
    """`noticed`, or what went wrong, of one edit (None: no edit, must pass), and the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if mutation:
            file = tree / mutation.file
            file.write_text(file.read_text().replace(mutation.old, mutation.new))
        status, output = run_tests(tree, path, expression)
    if mutation is None:
        result = "pass" if status == 0 else f"FAILED (pytest exit {status}):\n{output[-2000:]}"
    elif status == 0:
        result = "SURVIVED"
    elif status == 1 and "AssertionError" in output and " error: " not in output:  # a compiler's
        result = "noticed"
    else:
        result = f"NOT TESTED (pytest exit {status}):\n{output[-2000:]}"
    return result, time.perf_counter() - started


def main(words: list[str]) -> int:
    """Run the edits whose name or file holds one of the words, or all; 0 if every one was noticed."""
    chosen = [m for m in MUTATIONS if not words or any(w in m.name or w in m.file for w in words)]
    if not (shutil.which("cmake") and shutil.which("c++")):
        print("the edits of the CUDA sources are left out: they need cmake and a C++ compiler")
        chosen = [m for m in chosen if m.path != EMULATION]
    wrong = broken_edits(chosen, ROOT)
    if wrong or not chosen:
        print("\n".join(wrong) or "no such mutation")
        return 1
    paths: dict[str, dict[str, None]] = {}
    for m in chosen:
        paths.setdefault(m.path, {})[f"({m.tests})"] = None
    with ThreadPoolExecutor(WORKERS) as pool:
        unedited = {p: pool.submit(verdict, p, " or ".join(tests), None) for p, tests in paths.items()}
        jobs = {m: pool.submit(verdict, m.path, m.tests, m) for m in chosen}
        for path, job in unedited.items():
            result, seconds = job.result()
            print(f"{path} without an edit: {result} ({seconds:.1f} s)", flush=True)
            wrong += [path] if result != "pass" else []
        for m, job in jobs.items():
            result, seconds = job.result()
            print(f"{m.file}: {m.name}: {result} ({seconds:.1f} s)", flush=True)
            wrong += [m.name] if result != "noticed" else []
    print(f"{len(chosen)} edits; " + (f"not as they must be: {'; '.join(wrong)}" if wrong else "all noticed"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
