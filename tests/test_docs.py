"""What the README states is what the rows in benchmarks/results say, and it holds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from benchmarks.digits import RESULTS, table

ROOT = Path(__file__).resolve().parent.parent
ROWS = [json.loads(line) for line in (RESULTS / "digits.jsonl").read_text().splitlines()]


def mean(ipc: int, method: str, key: str) -> float:
    """The mean over the seeds, of the best setting where a method has several."""
    groups: dict[str, list[float]] = {}
    for row in ROWS:
        if (row["ipc"], row["method"]) == (ipc, method):
            groups.setdefault(json.dumps(row["settings"]), []).append(row[key])
    assert all(len(values) == 5 for values in groups.values())
    return max(statistics.fmean(values) for values in groups.values())


def test_the_readme_shows_the_measured_table() -> None:
    assert table(RESULTS / "digits.jsonl") in (ROOT / "README.md").read_text()


def test_every_row_says_where_it_comes_from() -> None:
    for row in ROWS:
        assert row["commit"] and row["device"] and row["versions"]["torch"] and row["epochs"] == 400


@pytest.mark.parametrize("key", ["last", "best"])
@pytest.mark.parametrize("ipc", [5, 10])
def test_acs_beats_the_best_plain_sampling_by_two_points(ipc: int, key: str) -> None:
    assert mean(ipc, "ACS", key) >= mean(ipc, "plain", key) + 2.0


@pytest.mark.parametrize("key", ["last", "best"])
def test_acs_against_random_real_images(key: str) -> None:
    assert mean(5, "ACS", key) >= mean(5, "random real", key) + 2.0
    assert mean(10, "ACS", key) >= mean(10, "random real", key)


@pytest.mark.parametrize("key", ["last", "best"])
def test_learnability_is_the_best_objective(key: str) -> None:
    best = mean(10, "ACS, learnability", key)
    assert best >= mean(10, "plain", key) + 3.0
    assert best >= mean(10, "random real", key) + 1.0
