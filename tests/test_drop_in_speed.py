"""The benchmark of the drop-in compares what it says, and has no figure for images that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import drop_in_speed


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, object]]:
    result = tmp_path / "rows.jsonl"
    command = ["drop_in_speed", "--model", "tiny", "--repeats", "2", "--steps", "2", "--result", str(result)]
    monkeypatch.setattr("sys.argv", [*command, *options])
    monkeypatch.setattr(
        drop_in_speed.Machine, "measured", lambda device: drop_in_speed.Machine(device, 1e9, 1e9)
    )
    try:
        drop_in_speed.main()
    finally:
        rows = [json.loads(line) for line in result.read_text().splitlines()]
    return rows


def test_both_are_timed_in_rounds_and_their_images_compared(tmp_path, monkeypatch) -> None:
    rows = run(tmp_path, monkeypatch, "--batch-sizes", "1", "2", "--dtypes", "fp32", "bf16")
    assert [(row["batch_size"], row["dtype"]) for row in rows] == [
        (1, "fp32"),
        (2, "fp32"),
        (1, "bf16"),
        (2, "bf16"),
    ]
    for row in rows:
        assert 0 <= row["check"] <= 1 and row["with"] > 0 and row["without"] > 0
        low, high = row["interval"]
        assert low <= row["times_as_fast"] <= high and row["versions"]["diffusers"] and row["commit"]


def test_an_output_that_is_broken_has_no_figure_and_fails(tmp_path, monkeypatch) -> None:
    call = drop_in_speed.call

    def broken(pipe: object, *arguments: int) -> np.ndarray:
        images = call(pipe, *arguments)
        return images + 0.01 if type(pipe).__name__ == "ACSPipeline" else images

    monkeypatch.setattr(drop_in_speed, "call", broken)
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--batch-sizes", "1")
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert "with" not in row and row["reason"].startswith("its error is")


def test_the_pipeline_is_diffusers_own() -> None:
    pipe = drop_in_speed.make_pipeline("tiny", torch.float32, torch.device("cpu"))
    assert type(pipe).__module__.startswith("diffusers.")
    assert (
        drop_in_speed.MODELS["dit-xl-2"].depth == 28 and drop_in_speed.MODELS["dit-xl-2"].hidden_size == 1152
    )
