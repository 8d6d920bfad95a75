"""What an evaluation found: its record in the run folder, its table on the screen."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from acs_fast.config import InputError
from acs_fast.evaluation.training import Accuracy
from acs_fast.judge import by_curriculum
from acs_fast.report import write_report
from acs_fast.writer import lock, read_json, write_json

RESULTS = "results.json"
SAME = (
    "protocol",
    "network",
    "image_size",
    "ipc",
    "epochs",
    "real",
)  # a later evaluation of these replaces the earlier one


def keep_results(path: Path, results: dict[str, Any]) -> None:
    """Put results beside a run's earlier ones into results.json and draw report.html, with the run locked.

    A report that cannot be drawn is warned of, and does not lose the results.
    """
    with patient_lock(path):
        file = path / RESULTS
        earlier = read_json(file) if file.is_file() else None
        earlier = earlier if isinstance(earlier, dict) else {}
        kept = earlier.get("evaluations")
        new = [[row[key] for key in SAME] for row in results["evaluations"]]
        kept = (
            [row for row in kept if [row.get(key) for key in SAME] not in new]
            if isinstance(kept, list)
            else []
        )
        record = {**earlier, **results, "evaluations": kept + results["evaluations"]}
        write_json(file, {**record, "curricula": by_curriculum(path)})
        try:
            write_report(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            print(f"warning: no report.html could be drawn ({error})", file=sys.stderr)
            with contextlib.suppress(OSError):
                (path / "report.html").unlink()  # an earlier one shows other results


@contextlib.contextmanager
def patient_lock(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """`writer.lock`, but it waits for a while: the other process may be about to end its own evaluation."""
    until = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path))
                break
            except InputError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield


def summary(values: Sequence[Accuracy]) -> dict[str, Any]:
    """Mean and standard deviation (ddof 0) of best and last over the repeats, with the values."""
    columns = {"best": [v.best for v in values], "last": [v.last for v in values]}
    return {
        key: {"mean": statistics.fmean(column), "std": statistics.pstdev(column), "values": column}
        for key, column in columns.items()
    }


def format_results(results: dict[str, Any]) -> str:
    """The results as the tables that the command prints."""
    parts = [format_table(row) for row in results["evaluations"]]
    if redundancy := results.get("redundancy"):
        parts.append(format_redundancy(redundancy))
    return "\n\n".join(parts)


def format_table(row: dict[str, Any]) -> str:
    """One evaluation: what was done, what is not as the protocol has it, a line a set."""
    lines = [
        f"protocol {row['protocol']}: {row['network']}, {row['epochs']} epochs, ipc {row['ipc']}, "
        f"{row['repeats']} repeats, top-1 % on {row['test_images']} real test images",
    ]
    if row["deviations"]:
        lines += ["not as the protocol:", *(f"  {text}" for text in row["deviations"])]
    lines.append(f"{'set':<18}{'best':>14}{'last':>16}")
    for name, values in row["sets"].items():
        cells = [f"{values[key]['mean']:.1f} +- {values[key]['std']:.1f}" for key in ("best", "last")]
        lines.append(f"{name:<18}{cells[0]:>14}{cells[1]:>16}")
    lines.append(
        "mean +- std over repeats; best is the best of the validations on the test set, which flatters"
    )
    return "\n".join(lines)


def format_redundancy(found: dict[str, Any]) -> str:
    """The redundancy of each set: a line a set."""
    lines = [
        f"redundancy: {found['protocol']}, {found['network']}, {found['repeats']} repeats; "
        f"coverage and so on in the features of {found['features']}, k = {found['k']}",
        f"{'set':<18}{'cross-increment %':>19}{'coverage':>10}{'density':>9}{'precision':>11}{'recall':>8}",
    ]
    for name, values in found["sets"].items():
        cross, shares = values["cross_increment"], values["coverage"]
        cells = "".join(
            f"{shares[key]:>{width}.3f}"
            for key, width in (("coverage", 10), ("density", 9), ("precision", 11), ("recall", 8))
        )
        accuracy = f"{cross['mean']:.1f} +- {cross['std']:.1f}"
        lines.append(f"{name:<18}{accuracy:>19}{cells}")
    lines.append(
        "cross-increment: trained on one curriculum, tested on the images of another; less is less overlap"
    )
    for name, values in found["sets"].items():
        gains = ", ".join(f"{row['last']['mean']:.1f} ({row['ipc']})" for row in values["incremental"])
        lines.append(f"{name}: accuracy, last, after each curriculum (ipc): {gains}")
    return "\n".join(lines)
