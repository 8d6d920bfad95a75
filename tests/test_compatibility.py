"""The matrix of releases counts what pytest did, tests the commit at hand and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compatibility
from benchmarks.compatibility import Failed, check, export, run_tests

OUTCOMES = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError("in its fixture")

@pytest.mark.parametrize("n", [1, 2, 3])
def test_passes(n): pass
def test_fails(): assert False
def test_errs(broken): pass
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


def tree_with(folder: Path, **files: str) -> Path:
    (folder / "tests").mkdir(parents=True)
    for name, text in files.items():
        (folder / "tests" / f"{name}.py").write_text(text)
    return folder


def test_what_pytest_did_is_counted_and_who_failed_is_named(tmp_path) -> None:
    tree = tree_with(tmp_path, test_all=OUTCOMES)
    found = run_tests(sys.executable, tree, ["tests/test_all.py"])
    assert (found["passed"], found["failed"], found["skipped"]) == (3, 2, 1)
    assert sorted(name.split("::")[1] for name in found["failures"]) == ["test_errs", "test_fails"]
    assert found["seconds"] > 0


SKIPPING = "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass"


@pytest.mark.parametrize(
    ("text", "tests", "reason"),
    [
        ("def test_passes(): pass", ["tests/test_all.py", "tests/test_no.py"], "not found: .*test_no.py"),
        ("", ["tests/test_all.py"], "no tests ran"),
        (SKIPPING, ["tests/test_all.py"], "every test was skipped"),
        ("import os\nos.abort()", ["tests/test_all.py"], "."),
    ],
)
def test_where_no_test_ran_there_is_no_count(text, tests, reason, tmp_path) -> None:
    with pytest.raises(Failed, match=reason):
        run_tests(sys.executable, tree_with(tmp_path, test_all=text), tests)


def test_a_file_that_cannot_be_imported_counts_as_failed_and_the_others_run(tmp_path) -> None:
    tree = tree_with(tmp_path, test_all="import no_such_release", test_other="def test_passes(): pass")
    found = run_tests(sys.executable, tree, ["tests/test_all.py", "tests/test_other.py"])
    assert (found["passed"], found["failed"]) == (1, 1) and "test_all" in found["failures"][0]


def test_a_command_that_fails_gives_its_error_in_one_line(tmp_path) -> None:
    program = "import sys; sys.exit('ERROR: No matching distribution\\nsome advice')"
    with pytest.raises(Failed, match=r"^ERROR: No matching distribution$"):
        check([sys.executable, "-c", program], tmp_path)


def test_this_processs_own_packages_do_not_leak_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    program = "import os; print(os.environ.get('PYTHONPATH'), os.environ['OMP_NUM_THREADS'])"
    assert check([sys.executable, "-c", program], tmp_path).split() == ["None", "1"]


def test_the_commit_is_tested_and_not_the_changes_since(tmp_path, monkeypatch) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    (root / "a.py").write_text("committed")
    (root / "kernel.cu").touch()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    (root / "a.py").write_text("changed since")
    monkeypatch.setattr(compatibility, "ROOT", root)
    export(tmp_path / "tree")
    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["a.py"]
    assert (tmp_path / "tree" / "a.py").read_text() == "committed"


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[str], text: str) -> tuple[int, list]:
    """The exit code and the rows of pairs with tests of this text; torch 1.0 cannot be installed."""
    folders = []

    def install(torch_release: str, diffusers_release: str, work: Path) -> str:
        folders.append(work)
        if torch_release == "1.0":
            raise Failed("ERROR: No matching distribution found for torch==1.0")
        return sys.executable

    monkeypatch.setattr(compatibility, "export", lambda folder: tree_with(folder, test_all=text))
    monkeypatch.setattr(compatibility, "install", install)
    monkeypatch.setattr(compatibility, "commit", lambda: "0123456789ab+")
    result, code = tmp_path / "rows.jsonl", 0
    options = ["--tests", "tests/test_all.py", "--result", str(result)]
    monkeypatch.setattr("sys.argv", ["compatibility", *pairs, *options])
    try:
        compatibility.main()
    except SystemExit as end:
        code = end.code
    assert len(folders) == len(pairs) and not any(folder.exists() for folder in folders)
    return code, [json.loads(line) for line in result.read_text().splitlines()]


def test_a_pair_that_cannot_be_installed_has_a_row_with_the_reason(tmp_path, monkeypatch) -> None:
    code, (refused, ran) = run(tmp_path, monkeypatch, ["1.0:0.1", "9.9:0.2"], "def test_passes(): pass")
    assert code == 1 and ran["passed"] == 1
    assert (refused["torch"], refused["diffusers"]) == ("1.0", "0.1")
    assert refused["reason"].startswith("ERROR: No matching") and "passed" not in refused


def test_a_row_says_what_was_installed_and_who_failed(tmp_path, monkeypatch, capsys) -> None:
    code, (row,) = run(tmp_path, monkeypatch, ["9.9:0.2"], OUTCOMES)
    assert code == 1 and "test_fails" in capsys.readouterr().out
    assert row["torch"] == torch.__version__ and row["versions"]["diffusers"]  # there, not asked for
    assert (row["passed"], row["failed"], row["commit"]) == (3, 2, "0123456789ab")


def test_a_matrix_without_a_failure_ends_well(tmp_path, monkeypatch) -> None:
    code, (row,) = run(tmp_path, monkeypatch, ["9.9:0.2"], "def test_passes(): pass")
    assert (code, row["passed"], row["failed"], row["failures"]) == (0, 1, 0, [])


def test_the_matrix_spans_what_the_package_asks_for() -> None:
    pairs = [pair.split(":") for pair in compatibility.PAIRS]
    requirements = (compatibility.ROOT / "pyproject.toml").read_text()
    oldest = min(pairs)
    assert f'"torch>={oldest[0].removesuffix(".0")}"' in requirements
    assert f'"diffusers>={oldest[1].removesuffix(".0")}"' in requirements
    pins = (compatibility.ROOT / "constraints.txt").read_text().splitlines()
    assert f"torch=={max(pairs)[0]}" in pins and f"diffusers=={max(pairs)[1]}" in pins
    for path in compatibility.TESTS:
        assert (compatibility.ROOT / path).exists()
