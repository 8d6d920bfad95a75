"""The examples: each runs as its head says, in an empty folder, and what comes out is what the head names."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.pages import ROOT, check_arguments

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SECONDS = 180  # a busy machine's; on an idle one each takes less than a minute
COMES_OUT = {  # files, and what the last lines are
    "acs_loop.py": (["acs-loop/3/000.png"], r"^30 images in acs-loop; "),
    "distil_your_own_folder.py": (
        ["runs/own/model/model.safetensors", "runs/own/set/images/digit-7/3.png", "runs/own/set/report.html"],
        r"distilled: [\d.]+ % of the test images, 4 images a class\nrandom real: [\d.]+ %.*\n$",
    ),
    "three_lines.py": ([], r"8 images in three-lines\n$"),
    "use_with_imagefolder.py": (
        ["runs/for-imagefolder/images/7/3.png"],
        r"plain: 12 images of 3 classes\nplain: a linear classifier .*\ntorchvision: .*\ntimm: .*\n$",
    ),
}


def run(command: list[str], folder: Path) -> str:
    """What it prints, run in this folder with this Python."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs_and_gives_what_its_head_says(name: str, tmp_path: Path) -> None:
    said = run([sys.executable, str(EXAMPLES / name)], tmp_path)
    files, pattern = COMES_OUT[name]
    assert [file for file in files if not (tmp_path / file).is_file()] == []
    assert re.search(pattern, said), said
    if name == "distil_your_own_folder.py":
        accuracy = re.search(r"distilled: ([\d.]+)", said)
        assert accuracy and float(accuracy[1]) > 34, "no better than chance"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_head_says_how_to_run_it(name: str) -> None:
    head = ast.get_docstring(ast.parse((EXAMPLES / name).read_text())) or ""
    assert f"python examples/{name}" in head


def test_the_list_names_every_example() -> None:
    linked = re.findall(r"^\| \[(.*?)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.M)
    there = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert sorted(linked) == sorted(there)


def test_the_script_for_many_gpus_runs_on_two_ranks_of_the_cpu(tmp_path: Path) -> None:
    small = "--classes 0,1 --ipc 2 --num-curricula 2 --num-sampling-steps 4 --discriminator-steps 3 --out two"
    run(["bash", str(EXAMPLES / "multi_gpu.sh"), "2", *small.split()], tmp_path)
    assert len(list((tmp_path / "two/images").glob("*/*.png"))) == 4
    assert (tmp_path / "two/logs/rank-1.log").read_text()


def test_the_script_for_many_gpus_names_settings_that_there_are() -> None:
    text = (EXAMPLES / "multi_gpu.sh").read_text()
    lines = re.findall(r"^#     bash examples/multi_gpu\.sh(?: \d+)?(?: (--[^#\n]*))?", text, re.M)
    assert len(lines) == 3 and "docs/cluster.md" in text
    for line in lines:
        check_arguments(["distill", *line.split()])


@pytest.fixture
def imagefolder() -> types.ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("imagefolder", EXAMPLES / "use_with_imagefolder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's images, of two classes in another order than they were made in."""
    for number, name in enumerate(["wasp", "ant"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            image = Image.new("L", (8, 8), 100 * number + index)
            image.save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path


def test_the_plain_loader_gives_what_imagefolder_does(imagefolder, folder: Path) -> None:
    images = imagefolder.Folder(folder / "images")
    assert images.classes == ["ant", "wasp"] and len(images) == 4
    pixels, label = images[1]
    assert label == 0 and pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.full((3, 8, 8), 101 / 255))


def test_timm_is_asked_for_the_classes_that_there_are(imagefolder, folder, monkeypatch, capsys) -> None:
    asked = []

    def create_model(name: str, *, in_chans: int, num_classes: int) -> nn.Module:
        asked.append((name, in_chans, num_classes))
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, num_classes))

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    imagefolder.main(folder)
    assert asked == [("resnet18", 3, 2)]
    assert re.search(r"^timm: resnet18, loss [\d.]+ to [\d.]+$", capsys.readouterr().out, re.M)


def test_a_library_that_cannot_be_imported_is_left_out_with_its_reason(
    imagefolder, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    broken = folder / "path" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(broken.parent))
    imagefolder.main(folder)
    said = capsys.readouterr().out
    assert "torchvision: left out, it cannot be imported: operator torchvision::nms does not exist\n" in said
    assert "timm: left out, it cannot be imported: " in said
