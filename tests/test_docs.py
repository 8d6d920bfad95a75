"""What the documents state: the README's table is that of benchmarks/results and holds, names exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from acs_fast.config import PRESETS
from benchmarks import evaluation_table
from benchmarks.digits import RESULTS, table
from benchmarks.step_speed import table as step_table

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The rows of the README's table."""
    return [json.loads(line) for line in (RESULTS / "digits.jsonl").read_text().splitlines()]


def mean(rows: list[dict[str, Any]], ipc: int, method: str, key: str) -> float:
    """The mean over the seeds, of the best setting where a method has several."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if (row["ipc"], row["method"]) == (ipc, method):
            groups.setdefault(json.dumps(row["settings"]), []).append(row[key])
    assert all(len(values) == 5 for values in groups.values())
    return max(statistics.fmean(values) for values in groups.values())


def test_the_readme_shows_the_measured_table() -> None:
    assert table(RESULTS / "digits.jsonl") in (ROOT / "README.md").read_text()


def test_every_row_says_where_it_comes_from(rows) -> None:
    preset = PRESETS["EvaluateConfig"]["digits"]
    for row in rows:
        assert row["commit"] and row["device"] and row["versions"]["torch"]
        assert ((row["protocol"],), row["epochs"]) == (preset["protocol"], preset["epochs"])


@pytest.mark.parametrize("key", ["last", "best"])
@pytest.mark.parametrize("ipc", [5, 10])
def test_acs_beats_the_best_plain_sampling(rows, ipc: int, key: str) -> None:
    assert mean(rows, ipc, "ACS", key) >= mean(rows, ipc, "plain", key) + 1.8


@pytest.mark.parametrize("key", ["last", "best"])
def test_acs_beats_random_real_images(rows, key: str) -> None:
    assert mean(rows, 5, "ACS", key) >= mean(rows, 5, "random real", key) + 3.0
    assert mean(rows, 10, "ACS", key) >= mean(rows, 10, "random real", key) + 1.0


def test_a_source_distribution_holds_what_the_tests_read() -> None:
    manifest = ROOT / "MANIFEST.in"
    words = [line.split() for line in manifest.read_text().splitlines() if not line.startswith("#")]
    named = {name for command, *names in words if command in ("graft", "include") for name in names}
    folders = {"benchmarks", "docs", "examples", "kernels", "tests"}
    assert folders | {"README.md", "CONTRIBUTING.md", "MANIFEST.in", "mkdocs.yml"} <= named


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.search(r"Names as in the code: (.*?)\. A flag", text, re.S)
    code = "\n".join(path.read_text() for path in (ROOT / "acs_fast").rglob("*.py"))
    assert names is not None
    for name in re.findall(r"`([^`]+)`", names[1]):
        assert re.search(rf"\b{name}\b", code), name
    for path in re.findall(r"`((?:acs_fast|kernels)/[^`]+|models/)`", text):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "acs_fast")), path


def test_the_engine_page_shows_the_measured_steps() -> None:
    rows = [json.loads(line) for line in (RESULTS / "step.jsonl").read_text().splitlines()]
    cpu = [row for row in rows if row["device"].startswith("cpu")]
    assert step_table(cpu) in (ROOT / "docs" / "engine.md").read_text()
    assert all(row["commit"] and "+" not in row["commit"] and row["check"] <= 1 for row in cpu)


def test_the_engine_beats_the_baselines_on_the_cpu_that_was_measured() -> None:
    rows = [json.loads(line) for line in (RESULTS / "step.jsonl").read_text().splitlines()]
    ours = {(r["dtype"], r["batch_size"]): r for r in rows if r["name"] == "ours" and "Xeon" in r["device"]}
    chosen = ours["fp32", 1]  # by `--dtype auto` there
    assert chosen["times_as_fast_as_bf16_E"] >= 1.5 and chosen["times_as_fast_as_bf16_C"] >= 1.3
    assert chosen["percent_of_bf16_gemm"] >= 65 and ours["bf16", 1]["percent_of_gemm"] >= 65
    assert ours["bf16", 4]["peak_mb"] <= 3000


def test_the_benchmarks_page_shows_the_measured_evaluations() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert evaluation_table.table() in page


def test_the_coverage_to_expect_is_that_of_the_rows() -> None:
    rows = [json.loads(line) for line in (RESULTS / "evaluation.jsonl").read_text().splitlines()]
    found = {
        round(values["coverage"]["expected"], 2)
        for row in rows
        if row["data"] == "digits" and "redundancy" in row
        for values in row["redundancy"]["sets"].values()
    }
    (expected,) = found
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert f"where {expected:.2f} is to be expected" in page


def test_the_evaluation_is_as_fast_and_as_true_as_the_page_says() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    speed = json.loads((RESULTS / "evaluate_speed.jsonl").read_text().splitlines()[-1])
    seconds = speed["seconds_per_epoch"]
    for name in ("ours", "ours, fp32", "DataLoader, workers kept", "DataLoader, workers started"):
        assert f"{seconds[name]:.1f} s" in page, name
    assert min(v for name, v in speed["speedup"].items() if name.startswith("DataLoader")) >= 3
    accuracy = json.loads((RESULTS / "evaluate_accuracy.jsonl").read_text().splitlines()[-1])
    for difference in accuracy["differences"].values():
        assert abs(difference["mean"]) <= difference["half"]
    for value in accuracy["mean"].values():
        assert f"{value:.1f} %" in page


def test_the_drop_in_is_as_fast_as_its_page_says() -> None:
    page = (ROOT / "docs" / "drop_in.md").read_text()
    for line in (RESULTS / "drop_in.jsonl").read_text().splitlines():
        row = json.loads(line)
        low, high = row["interval"]
        ratio = f"{row['times_as_fast']} ({low} to {high})"
        cells = [row["batch_size"], row["steps"], f"{row['without']} s", f"{row['with']} s", ratio]
        assert f"| {' | '.join(map(str, cells))} | {row['first_call_s']} s |" in page
        assert row["check"] <= 1.0


def test_every_pair_of_releases_passed() -> None:
    rows = [json.loads(line) for line in (RESULTS / "compatibility.jsonl").read_text().splitlines()]
    assert rows and all(row["failed"] == 0 and row["passed"] > 200 for row in rows)
    assert {"0.36.0", "0.39.0"} <= {row["diffusers"] for row in rows}
    assert {"2.11", "2.12", "2.13"} == {row["torch"][:4] for row in rows}


def test_what_the_page_says_of_cifar10_is_in_the_rows() -> None:
    """The differences by protocol, which the table does not have."""
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    rows = [r for r in evaluation_table.read() if (r["data"], r["part"]) == ("cifar10", "hard")]
    for protocol in evaluation_table.HARD:
        sets = [f["sets"] for r in rows for f in r["evaluations"] if f["protocol"] == protocol]
        less = [s["plain"]["last"]["mean"] - s["distilled"]["last"]["mean"] for s in sets]
        shown = evaluation_table.interval(less)
        assert f"{shown} (`{protocol}`)" in page or f"{shown} points (`{protocol}`)" in page
    table = evaluation_table.table()
    for name, protocol in (("plain", "hard-adamw"), ("random real", "hard-adamw")):
        line = next(t for t in table.splitlines() if f"| cifar10 | {protocol} |" in t and f"| {name} |" in t)
        assert f"teach {line.split('|')[7].split('±')[0].strip()} %" in page
    for name in ("distilled", "plain"):
        line = next(t for t in table.splitlines() if t.startswith(f"| cifar10 | {name} |"))
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[3].split(" ±")[0] in page and (name == "plain" or f"{cells[4]} points less" in page)
