"""The sets of an evaluation: sizes, colours, classes, baselines; a sentence for each that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from acs_fast import EvaluateConfig, InputError, distill, evaluate
from acs_fast.cli import main
from acs_fast.data import load_images
from acs_fast.evaluation import baselines
from acs_fast.evaluation.coresets import herding
from acs_fast.evaluation.judging import Evaluation
from acs_fast.evaluation.refusals import check_source
from acs_fast.evaluation.runs import read_run
from acs_fast.evaluation.sets import Real, resized


def picture(seed: int, size: tuple[int, int], grey: bool) -> Image.Image:
    shape = size if grey else (*size, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def image_folder(
    root: Path, classes: str = "ab", count: int = 4, size: tuple[int, int] = (16, 16), grey: bool = False
) -> Path:
    """<class>/<k>.png of noise."""
    for y, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            picture(100 * y + k, size, grey).save(root / name / f"{k}.png")
    return root


def real_folder(root: Path, **settings) -> Path:
    image_folder(root / "train", **{"count": 6, **settings})
    image_folder(root / "val", **settings)
    return root


SHORT = {"epochs": 1, "repeats": 1, "network": ("convnet-1",)}


def found(path: Path, real: Path | str, **settings):
    return evaluate(EvaluateConfig(path=str(path), real=str(real), **{**SHORT, **settings}))["evaluations"]


def test_a_folder_from_anywhere_is_evaluated(tmp_path: Path, capsys) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real")
    (row,) = found(folder, real, baselines=("random", "herding", "k-centre"), features="convnet-1")
    assert (row["image_size"], row["ipc"], row["test_images"], row["mirror"]) == (16, 4, 8, True)
    assert list(row["sets"]) == ["distilled", "random real", "herding", "k-centre"]
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]  # nothing is written there
    assert main(["evaluate", str(folder), "--real", str(real), "--epochs", "1", "--repeats", "1"]) == 0
    assert "images of 16 px; the protocol resizes to 224" in capsys.readouterr().out


def test_networks_and_protocols_in_one_call(tmp_path: Path) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real")
    rows = found(
        folder, real, protocol=("hard-sgd", "hard-adamw"), network=("convnet-1", "convnet-2", "resnet-18")
    )
    assert [(row["protocol"], row["network"]) for row in rows] == [
        (protocol, network)
        for protocol in ("hard-sgd", "hard-adamw")
        for network in ("convnet-1", "convnet-2", "resnet-18")
    ]


REFUSED = {
    "class": ({"classes": "abc"}, {}, {}, r"class folder .*c is missing or holds no images; known: a b"),
    "grey": ({"grey": True}, {}, {}, r"the distilled images are grey and those of .* are in colour"),
    "ipc": ({}, {}, {"ipc": 5}, r"--ipc 5: a class of the distilled images has only 4"),
    "train": ({"count": 9}, {}, {"baselines": ("random",)}, r"class of the real training images has only 6"),
    "network": ({}, {}, {"network": ("resnetap-10",)}, r"resnetap-10 needs images of 64 px, these are 16"),
    "twice": (
        {},
        {},
        {"network": ("convnet-1", "convnet-1")},
        r"--network .* names one twice",
    ),
    "protocol": ({}, {}, {"protocol": ("soft-sgd",)}, r"there is no protocol 'soft-sgd'; use hard-sgd, "),
    "baseline": ({}, {}, {"baselines": ("best",)}, r"there is no baseline 'best'; use random, herding"),
    "plain": (
        {},
        {},
        {"baselines": ("plain",)},
        r"is not a run folder, so --baselines plain cannot",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    mine, theirs, settings, message = REFUSED[case]
    folder, real = image_folder(tmp_path / "set", **mine), real_folder(tmp_path / "real", **theirs)
    with pytest.raises(InputError, match=message) as refusal:
        found(folder, real, **settings)
    assert "\n" not in str(refusal.value)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real")
    (folder / "c").mkdir()
    with pytest.raises(InputError, match=r"class folder .*c is missing or holds no images"):
        found(folder, real)


def test_grey_real_images_are_read_as_the_set_is_and_that_is_said(tmp_path: Path, capsys) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real", grey=True)
    assert len(found(folder, real)) == 1
    assert "grey images, read as RGB, which the distilled ones are" in capsys.readouterr().err


def test_classes_that_the_set_lacks_are_named(tmp_path: Path, capsys) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real", classes="abcd")
    found(folder, real)
    printed = capsys.readouterr().err
    assert "has 2 of the 4 classes of" in printed and "without c, d the task is easier" in printed
    found(folder, real, classes="b,a")
    assert "the task is easier" not in capsys.readouterr().err


def test_labels_are_in_the_order_of_the_class_list(tmp_path: Path) -> None:
    folder, real = image_folder(tmp_path / "set"), real_folder(tmp_path / "real")
    seen = Evaluation(EvaluateConfig(path=str(folder), real=str(real), classes="b,a"))
    assert seen.distilled.classes == ("b", "a") == seen.real.test(False).classes
    first = np.asarray(Image.open(folder / "b" / "0.png"))
    assert np.array_equal(seen.distilled.images[0].permute(1, 2, 0).numpy(), first)


def test_images_are_resized_to_the_setting_and_to_224_at_most(tmp_path: Path) -> None:
    folder, real = image_folder(tmp_path / "set", size=(240, 256), count=1), tmp_path / "real"
    real_folder(real, size=(230, 300), count=1)
    seen = Evaluation(EvaluateConfig(path=str(folder), real=str(real)))
    assert seen.real.native == 240 and seen.real.size == 224
    assert seen.distilled.images.shape[-2:] == seen.real.test(False).images.shape[-2:] == (224, 224)
    own = load_images(str(folder), None).images
    assert torch.equal(seen.distilled.images, F.interpolate(own, (224, 224), mode="bilinear", antialias=True))
    small = Evaluation(EvaluateConfig(path=str(folder), real=str(real), image_size=32))
    assert small.distilled.images.shape[-1] == 32 == small.real.load("train").images.shape[-1]


def test_soft_test_images_are_the_centre_of_larger_ones(tmp_path: Path) -> None:
    real = real_folder(tmp_path / "real", size=(40, 50), count=1)
    images = Real(str(real), ("a", "b"), 3, 28, 28)
    got, whole = images.test(True), images.load("val", 32)  # 256 to 224 as 32 to 28
    assert torch.equal(got.images, whole.images[:, :, 2:30, 2:30])


def test_the_digits_are_enlarged_where_a_network_needs_it(tiny) -> None:
    (row,) = evaluate(
        EvaluateConfig(path=str(distill(tiny())), epochs=1, repeats=1, image_size=16, network=("resnet-18",))
    )["evaluations"]
    assert row["image_size"] == 16 and row["network"] == "resnet-18" and row["mirror"] is False


def test_random_images_are_those_of_the_seed_and_coresets_are_the_same(tiny) -> None:
    real = Real("digits", ("3", "8"), 1, 8, 8)
    train = load_images("digits", "train", ("3", "8"))
    assert torch.equal(real.random(4, 7).images, train.random(4, 7).images)
    assert torch.equal(resized(train, 16).images[0], real.__class__("digits", ("3", "8"), 1, 8, 16).take(
        torch.tensor([0])
    ).images[0])  # fmt: skip

    class Flat:
        def of(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).float()

    chosen = baselines.choose_coresets(("herding",), real, 4, Flat)["herding"]
    rows = herding(train.images.flatten(1).float(), train.labels, 4)
    assert torch.equal(chosen.images, train.images[rows]) and chosen.labels.tolist() == [0] * 4 + [1] * 4


def test_repulsion_is_sampled_without_the_discriminators_say(tiny) -> None:
    out = distill(tiny())
    (row,) = evaluate(EvaluateConfig(path=str(out), epochs=1, repeats=1, baselines=("plain", "repulsion")))[
        "evaluations"
    ]
    assert list(row["sets"]) == ["distilled", "plain", "plain, repulsion"]
    config = json.loads((out / "baselines" / "repulsion" / "config.json").read_text())["config"]
    assert config["repulsion"] == 1e6 and config["guidance_scale"] > 0
    read = [
        load_images(str(folder / "images"), None).images
        for folder in (out, out / "baselines" / "plain", out / "baselines" / "repulsion")
    ]
    first = [images[[0, 4]] for images in read]  # of the first curriculum
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(read[1], read[2]) and not torch.equal(read[0], read[2])
    with pytest.raises(InputError, match="no earlier samples to repel"):
        one = read_run(distill(tiny(num_curricula=1, out=str(out.parent / "one"))))
        check_source(EvaluateConfig(baselines=("repulsion",)), one, "digits")
