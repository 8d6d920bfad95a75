"""Whole runs that ranks share: stopped, continued by another number of them, and what one alone runs into."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from acs_fast import distill
from acs_fast.config import DistillConfig, InputError, resolve
from acs_fast.curriculum import Run
from acs_fast.distributed import Ranks
from acs_fast.manifest import read_rows
from acs_fast.session import Session
from acs_fast.stopping import Stopped
from acs_fast.writer import read_tensors
from tests.rank_runs import agreed, together
from tests.runs import contents


def shared(ranks: Ranks, settings: dict[str, Any], calls: float = float("inf")) -> str:
    """A run, or what it says when its `calls`-th check is asked to stop."""
    events: list[tuple[str, Any]] = []
    left = [calls]

    def check() -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Stopped(signal.SIGTERM)

    session = Session(ranks, check, lambda event, **values: events.append((event, values)))
    try:
        distill(resolve(DistillConfig, settings), session=session)
    except Stopped as stopped:
        assert events[-1] == ("stop", {"signal": signal.SIGTERM})
        return str(stopped)
    except RuntimeError as error:  # another one has stopped before this one was asked to
        assert "closed by peer" in str(error) or "reset by peer" in str(error), error
        return "left alone"
    return "whole"


def files(out: Path) -> dict[str, bytes]:
    """What a run has written but for its record, which names its folder."""
    return {name: data for name, data in contents(out).items() if name != "config.json"}


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "wds", "objective": "learnability", "discriminator_init": "warm"},
        {"keep_latents": False, "repulsion": 0.5},
    ],
    ids=["wds-learnability-warm", "samples-not-kept"],
)
def test_a_run_is_continued_by_another_number_of_ranks(tiny, tmp_path: Path, settings: dict) -> None:
    config = tiny(deterministic=True, batch_size=2, ipc=6, **settings)
    whole = files(distill(dataclasses.replace(config, out=str(tmp_path / "whole"))))
    given, out = dataclasses.asdict(config), Path(config.out)
    said = [agreed(2, shared, given, 2), agreed(3, shared, given, 4)]
    assert all(text != "whole" for own in said for text in own), said
    assert said[0][0].startswith("stopped by SIGTERM") and "of 12 images are written" in said[0][0]
    assert 2 <= len(read_rows(out)) < 12
    assert agreed(3, shared, given) == ["whole"] * 3
    assert files(out) == whole
    distill(config)  # nothing is left to do
    assert files(out) == whole


def test_ranks_that_train_together_agree_with_one_but_for_rounding(tiny, tmp_path: Path) -> None:
    settings = {"discriminator_steps": 10, "discriminator": "convnet-2"}
    alone = distill(tiny(out=str(tmp_path / "alone"), **settings))
    config = tiny(**settings)
    agreed(3, shared, dataclasses.asdict(config))
    one, three = read_rows(alone), read_rows(Path(config.out))
    assert one.keys() == three.keys()
    first = [key for key in one if one[key]["curriculum"] == 1]
    assert len(first) == 2 and all(one[key] == three[key] for key in first)
    stored = [read_tensors(Path(out, "discriminators", "2.safetensors")) for out in (alone, config.out)]
    assert stored[0] is not None and stored[1] is not None
    for name in stored[0]:
        if name.endswith("weight"):  # a bias before a norm is noise
            torch.testing.assert_close(stored[0][name], stored[1][name], rtol=0.01, atol=5e-4)
    for key in one:
        if one[key]["discriminator_loss"] is not None:
            assert one[key]["discriminator_loss"] == pytest.approx(three[key]["discriminator_loss"], abs=0.02)


def refused(ranks: Ranks, settings: dict[str, Any]) -> tuple[str, bool]:
    try:
        distill(resolve(DistillConfig, settings), session=Session(ranks))
    except (InputError, OSError) as error:
        return str(error), getattr(error, "told", False)
    return "", False


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "absent.safetensors"}, "absent.safetensors"),
        ({"classes": "3,cat"}, "cat"),
        ({"seed": 7}, "seed"),
        ({"out": "/proc/run"}, "/proc/run"),
    ],
    ids=["model", "classes", "another-run", "folder"],
)
def test_what_cannot_run_is_said_by_one_rank(tiny, settings: dict, words: str) -> None:
    if "seed" in settings:
        distill(tiny(guidance_scale=0.0))
    given = dataclasses.asdict(tiny(guidance_scale=0.0)) | settings
    first, second = agreed(2, refused, given)
    assert words in first[0] and first[0] == second[0]
    assert [first[1], second[1]] == [False, True]


def full_at_the_end(ranks: Ranks, settings: dict[str, Any]) -> tuple[str, bool]:
    """A run whose last file finds no room; rank 0 alone writes it."""

    def write(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    Run._finish.__globals__["write_atomic"] = write
    return refused(ranks, settings)


def test_a_disk_that_is_full_at_the_end_stops_all(tiny) -> None:
    found = agreed(2, full_at_the_end, dataclasses.asdict(tiny(guidance_scale=0.0)))
    assert all("contact_sheet.png" in text for text, _ in found)
    assert [told for _, told in found] == [False, True]


def late(ranks: Ranks, settings: dict[str, Any]) -> str:
    """A run on a file system that does not list the rows of rank 1; a file opened by its name is there."""
    glob = Path.glob

    def listed(self: Path, pattern: str) -> list[Path]:
        return [path for path in glob(self, pattern) if path.name != "manifest.1.jsonl"]

    Path.glob = listed  # type: ignore[method-assign,assignment]
    return shared(ranks, settings)


def test_rows_are_found_that_the_folder_does_not_list_yet(tiny) -> None:
    config = tiny(guidance_scale=0.0, keep_latents=False)
    assert agreed(2, late, dataclasses.asdict(config)) == ["whole"] * 2
    assert len(read_rows(Path(config.out))) == 8


def killed(ranks: Ranks, settings: dict[str, Any]) -> str:
    """A run of which rank 1 ends, as by a kill, before its second batch."""
    calls = []

    def check() -> None:
        calls.append(0)
        if ranks.rank == 1 and len(calls) == 2:
            os._exit(9)

    distill(resolve(DistillConfig, settings), session=Session(ranks, check))
    return "whole"


def test_a_rank_that_ends_breaks_the_waiting_of_the_others(tiny) -> None:
    given = dataclasses.asdict(tiny(batch_size=1, guidance_scale=0.0))
    with pytest.raises(AssertionError, match="did not answer"):
        together(2, killed, given)
    assert agreed(1, shared, given) == ["whole"]
