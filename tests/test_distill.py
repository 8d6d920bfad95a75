"""The main job end to end on a tiny run: files, identity of bytes, curricula, every option of the sampler."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from acs_fast import DistillConfig, InputError, curriculum, distill, networks, real
from acs_fast.config import resolve
from acs_fast.data import load_images
from acs_fast.manifest import read_rows
from acs_fast.models.dit import DiTConfig
from acs_fast.plan import Item, Layout, curriculum_ranges, cut
from tests.runs import contents, stored


@pytest.mark.parametrize(
    ("ipc", "curricula", "sizes"),
    [(10, 5, [2, 2, 2, 2, 2]), (10, 4, [2, 2, 3, 3]), (5, 5, [1] * 5), (7, 2, [3, 4]), (3, 1, [3])],
)
def test_curricula_are_contiguous_and_the_remainder_goes_last(
    ipc: int, curricula: int, sizes: list[int]
) -> None:
    ranges = curriculum_ranges(ipc, curricula)
    assert [len(part) for part in ranges] == sizes
    assert [index for part in ranges for index in part] == list(range(ipc))


def test_the_images_are_numbered_curriculum_by_curriculum_class_by_class() -> None:
    layout = Layout(3, tuple(curriculum_ranges(5, 2)))
    items = [layout.item(2, number) for number in range(layout.size(2))]
    assert items == [Item(position, index) for position in range(3) for index in (2, 3, 4)]
    every = [layout.item(i, n) for i in (1, 2) for n in range(layout.size(i))]
    assert [layout.number(item) for item in every] == list(range(15)) == list(range(layout.total))
    assert layout.start(2) == 6


def test_batches_are_few_and_as_equal_as_they_can_be() -> None:
    assert [len(part) for part in cut(100, 66)] == [50, 50]
    assert cut(7, 3) == [range(0, 2), range(2, 4), range(4, 7)] and cut(0, 3) == []


def test_files_of_a_run(tiny) -> None:
    out = distill(tiny())
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted((row["class"], row["index"]) for row in rows) == [(c, k) for c in "38" for k in range(4)]
    assert [row["curriculum"] for row in rows] == [1] * 2 + [2] * 2 + [3] * 4
    for row in rows:
        path = out / "images" / row["class"] / f"{row['index']}.png"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
        guided = row["curriculum"] > 1
        assert (row["discriminator_loss"] is not None) == guided
        assert (row["discriminator_correct"] is not None) == guided
    record = json.loads((out / "config.json").read_text())
    assert (
        record["config"]["ipc"] == 4 and record["classes"] == ["3", "8"] and record["class_labels"] == [3, 8]
    )
    assert record["versions"]["torch"] == torch.__version__
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height == 16 + 2 * 34 and sheet.width > 4 * 34


def test_samples_are_the_images(tiny) -> None:
    out = distill(tiny())
    samples = load_file(stored(out, 1))["samples"]  # curriculum 1: index 0 of both classes
    for row, name in enumerate("38"):
        with Image.open(out / "images" / name / "0.png") as image:
            pixels = torch.from_numpy(np.array(image)).long()[None]
        assert torch.equal(pixels, ((samples[row].clamp(-1, 1) + 1) * 127.5).round().long())


def test_the_same_configuration_writes_the_same_bytes(tiny, tmp_path: Path) -> None:
    first, second = (distill(tiny(out=str(tmp_path / name), objective="learnability")) for name in ("a", "b"))
    one, two = contents(first), contents(second)
    one.pop("config.json"), two.pop("config.json")  # they differ in `out` alone
    assert one == two


def test_a_finished_run_is_left_as_it_is(tiny, capsys) -> None:
    out = distill(tiny())
    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    bytes_before = contents(out)
    distill(tiny())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(out) == bytes_before
    assert "0 of them sampled" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"cfg_scale": 2.0},
        {"num_sampling_steps": 5},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"variance": "fixed_small"},
        {"clip_denoised": False},
    ],
    ids=str,
)
def test_settings_of_the_sampler_change_the_first_curriculum(tiny, tmp_path: Path, change: dict) -> None:
    plain = distill(tiny(out=str(tmp_path / "plain"), cfg_scale=4.0))
    changed = distill(tiny(out=str(tmp_path / "changed"), **{"cfg_scale": 4.0, **change}))
    assert stored(plain, 1).read_bytes() != stored(changed, 1).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "learnability"},
        {"objective": "density_ratio"},
        {"objective": "learnability", "omega": 2.0},
        {"guidance_scale": 0.7},
        {"guidance_window": [0.0, 0.5]},
        {"trust_radius": "eps"},
        {"discriminator": "convnet-2"},
        {"discriminator_steps": 5},
        {"discriminator_lr": 0.01},
    ],
    ids=str,
)
def test_settings_of_the_guidance_change_later_curricula_alone(tiny, tmp_path: Path, change: dict) -> None:
    plain = distill(tiny(out=str(tmp_path / "plain")))
    changed = distill(tiny(out=str(tmp_path / "changed"), **change))
    assert stored(plain, 1).read_bytes() == (stored(changed, 1)).read_bytes()
    assert stored(plain, 2).read_bytes() != (stored(changed, 2)).read_bytes()


def test_the_full_jacobian_changes_later_curricula_alone_up_to_rounding(tiny, tmp_path: Path) -> None:
    # its denoiser keeps the weights unpacked, since autograd needs them
    runs = [distill(tiny(out=str(tmp_path / name), jacobian=name)) for name in ("identity", "full")]
    first, second = ([load_file(stored(run, curriculum))["samples"] for run in runs] for curriculum in (1, 2))
    torch.testing.assert_close(*first, rtol=0, atol=1e-4)
    assert (second[0] - second[1]).abs().max() > 1e-3


def test_warm_start_changes_the_third_curriculum_first(tiny, tmp_path: Path) -> None:
    scratch = distill(tiny(out=str(tmp_path / "scratch")))
    warm = distill(tiny(out=str(tmp_path / "warm"), discriminator_init="warm"))
    assert stored(scratch, 2).read_bytes() == (stored(warm, 2)).read_bytes()
    assert stored(scratch, 3).read_bytes() != (stored(warm, 3)).read_bytes()


def test_without_guidance_the_curricula_do_not_matter_but_for_rounding(tiny, tmp_path: Path) -> None:
    one = distill(tiny(out=str(tmp_path / "one"), guidance_scale=0.0, num_curricula=1, batch_size=8))
    many = distill(tiny(out=str(tmp_path / "many"), guidance_scale=0.0, batch_size=1))
    assert not (many / "discriminators").exists()
    for path in (one / "images").rglob("*.png"):
        with Image.open(path) as a, Image.open(many / path.relative_to(one)) as b:
            assert np.abs(np.array(a).astype(int) - np.array(b)).max() <= 1


def test_the_discriminator_learns_from_everything_sampled_so_far(tiny) -> None:
    out = distill(tiny(num_curricula=4, discriminator_steps=60, guidance_scale=0.0))
    assert not (out / "discriminators").exists()
    out = distill(tiny(num_curricula=4, discriminator_steps=60, guidance_scale=0.01), overwrite=True)
    assert sorted(path.name for path in (out / "discriminators").iterdir()) == [
        f"{i}.safetensors" for i in (2, 3, 4)
    ]
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    late = [row["discriminator_correct"] for row in rows if row["curriculum"] == 4]
    assert sum(late) >= len(late) / 2


def test_overwrite_replaces_a_run_and_nothing_else(tiny, tmp_path: Path) -> None:
    out = distill(tiny())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="seed 0 there, 5 here"):
        distill(tiny(seed=5))
    distill(tiny(seed=5, ipc=3), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "config.json").read_text())["config"]["seed"] == 5
    assert sorted(path.name for path in (out / "images" / "3").iterdir()) == ["0.png", "1.png", "2.png"]


def test_a_foreign_folder_is_refused(tiny, tmp_path: Path) -> None:
    (tmp_path / "run" / "images").mkdir(parents=True)
    (tmp_path / "run" / "images" / "holiday.png").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="something else"):
            distill(tiny(), overwrite=overwrite)
    assert list(contents(tmp_path / "run").values()) == [b"x"] and not (tmp_path / "run" / ".lock").exists()


OURS = '{"config": {}, "model_sha256": [], "class_labels": 3}'
FOREIGN = [
    "{",
    '{"model_type": "vit"}',
    "[]",
    "null",
    "3",
    '"x"',
    "[" * 100_000,
    '{"config": {}}',
    '{"config": 1}',
]
FOREIGN += ['{"config": [], "model_sha256": "", "class_labels": []}']


@pytest.mark.parametrize("text", FOREIGN, ids=lambda text: text[:30])
def test_a_config_json_of_another_program_is_refused_also_with_overwrite(tiny, tmp_path: Path, text) -> None:
    (tmp_path / "run" / "images").mkdir(parents=True)
    (tmp_path / "run" / "images" / "holiday.png").write_text("x")
    (tmp_path / "run" / "config.json").write_text(text)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds files of something else"):
            distill(tiny(), overwrite=overwrite)
    assert list(contents(tmp_path / "run").values()) == [text.encode(), b"x"]
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("text", ["{", OURS], ids=["damaged", "strange"])
def test_a_damaged_run_can_be_overwritten(tiny, text: str) -> None:
    out = distill(tiny())
    whole = contents(out)
    (out / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"another configuration .* --overwrite"):
        distill(tiny())
    assert contents(out) == {**whole, "config.json": text.encode()}
    assert contents(distill(tiny(), overwrite=True)) == whole


def test_an_output_folder_that_is_a_file_is_refused(tiny, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="run is a file; give a folder"):
        distill(tiny(), overwrite=True)
    assert (tmp_path / "run").read_text() == "mine"


def test_real_images_are_loaded_once_and_before_anything_is_written(
    tiny, tmp_path: Path, monkeypatch
) -> None:
    sources = []

    def load(source, *args):
        sources.append(source)
        return load_images(source, *args)

    monkeypatch.setattr(real, "load_images", load)
    listed = real.list_images
    monkeypatch.setattr(
        real, "list_images", lambda source, *rest: sources.append(source) or listed(source, *rest)
    )
    settings = {"objective": "learnability", "num_curricula": 4}
    with pytest.raises(InputError, match="absent"):
        distill(tiny(**settings, real=str(tmp_path / "absent")))
    assert not (tmp_path / "run").exists()
    distill(tiny(**settings))
    distill(tiny(**settings))  # a finished run needs none
    distill(tiny(**settings, guidance_scale=0.0), overwrite=True)
    assert sources == [str(tmp_path / "absent"), "digits"]


def test_clipping_is_for_pixel_models_unless_it_is_given(tiny, tmp_path: Path) -> None:
    for given, used in ((None, True), (False, False), (True, True)):
        run = curriculum.Run(tiny(clip_denoised=given))
        assert run.config.clip_denoised is used
    assert not networks.samples_pixels(DiTConfig(8, 2, 4, 16, 1, 2, 2))


def test_paths_are_recorded_for_use_from_another_folder(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = distill(tiny(classes="classes.txt"))
    settings = json.loads((out / "config.json").read_text())["config"]
    assert settings["classes"] == str(tmp_path / "classes.txt")
    assert settings["model"] == settings["real"] == "digits"
    whole = contents(out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert contents(distill(resolve(DistillConfig, settings))) == whole


def test_not_a_number_stops_with_the_image_named_and_keeps_what_is_written(tiny, monkeypatch) -> None:
    from acs_fast import guidance

    monkeypatch.setattr(guidance.Guidance, "radius", lambda self, eps, c: eps[:, :1, :1, :1] * float("nan"))
    config = tiny(backend="reference")  # whose guidance takes the radius from there
    with pytest.raises(InputError, match="class 3 index 1 of curriculum 2 is not finite at step 3"):
        distill(config)
    assert len(read_rows(Path(config.out))) == 2
    monkeypatch.undo()
    distill(dataclasses.replace(config))
