"""Runs of every format as `evaluate` reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from acs_fast import DistillConfig, EvaluateConfig, InputError, distill, evaluate
from acs_fast.data import load_images
from acs_fast.evaluation.judging import Evaluation
from acs_fast.evaluation.runs import read_run
from acs_fast.images import Images
from acs_fast.manifest import read_rows
from tests.image_runs import keys_of, picture

CLASSES = ("3", "8")
LOSSLESS = ["png", "webp", "wds"]


def finished_run(out: Path, format: str) -> Images:
    """A run folder of 12 grey images a class in two curricula, as distill leaves it."""
    out.mkdir()
    config = dataclasses.asdict(DistillConfig(ipc=12, num_curricula=2, format=format))
    record = {"config": config, "classes": CLASSES, "class_labels": [3, 8], "model_sha256": ""}
    (out / "config.json").write_text(json.dumps(record))
    images = Images(out, format)
    for number, key in enumerate(keys_of(CLASSES, range(12))):
        images.write(key, images.encode(picture(number, (8, 8, 1))))
    if format == "wds":
        for curriculum in (1, 2):
            images.pack(curriculum, 0, keys_of(CLASSES, range(6 * curriculum - 6, 6 * curriculum)))
        images.sweep()
    (out / "contact_sheet.png").write_bytes(b"")
    return images


@pytest.mark.parametrize("format", [*LOSSLESS, "jpeg"])
def test_a_run_of_any_format_is_read(tmp_path: Path, format: str) -> None:
    finished_run(tmp_path / "run", format)
    run = read_run(tmp_path / "run")
    assert run is not None and run.classes == CLASSES
    found = Evaluation(EvaluateConfig(path=str(tmp_path / "run")))
    distilled, test = found.distilled, found.real.test(False)
    assert found.ipc == 12 and test.images.shape[1:] == distilled.images.shape[1:] == (1, 8, 8)
    first = distilled.first(3)
    assert first.labels.tolist() == [0, 0, 0, 1, 1, 1]
    if format in LOSSLESS:
        expected = [picture(number, (8, 8, 1))[..., 0] for number in (0, 1, 10, 12, 13, 22)]
        assert torch.equal(first.images[:, 0], torch.stack(expected))


@pytest.mark.parametrize(
    ("format", "lost"), [("jpeg", "8/3.jpg"), ("webp", "8/3.webp"), ("wds", "02-00000.tar")]
)
def test_a_run_without_one_of_its_files_is_unfinished(tmp_path: Path, format: str, lost: str) -> None:
    (finished_run(tmp_path / "run", format).folder / lost).unlink()
    found = 12 if format == "wds" else 23
    with pytest.raises(InputError, match=f"is unfinished: {found} of 24 images"):
        read_run(tmp_path / "run")


def test_the_format_changes_no_pixel(tiny, tmp_path: Path) -> None:
    sets, rows = [], []
    for format in LOSSLESS:
        out = distill(tiny(format=format, out=str(tmp_path / format)))
        sets.append(load_images(str(out / "images"), None, CLASSES).images)
        rows.append({key: row["discriminator_loss"] for key, row in read_rows(out).items()})
    assert torch.equal(sets[0], sets[1]) and torch.equal(sets[0], sets[2]) and rows[0] == rows[1] == rows[2]


def test_a_run_in_shards_is_evaluated_beside_its_plain_set(tiny, tmp_path: Path) -> None:
    out = distill(tiny(format="wds"))
    assert not list((out / "images").glob("*/*"))
    results = evaluate(EvaluateConfig(path=str(out), epochs=1, repeats=1, baselines=("plain",)))
    assert (
        list(results["evaluations"][0]["sets"]) == ["distilled", "plain"] and (out / "report.html").is_file()
    )
    assert list((out / "baselines" / "plain" / "images").glob("*.tar"))
