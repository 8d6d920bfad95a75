"""Evaluation: protocols by their facts, the table, the files, the baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from acs_fast import EvaluateConfig, InputError, distill, evaluate, evaluation
from acs_fast.cli import main
from acs_fast.data import load_images
from acs_fast.evaluation import make_optimizer, protocol_epochs, train_and_test
from tests.runs import contents


@pytest.mark.parametrize(
    ("ipc", "classes", "epochs"),
    [
        (1, 10, 3000),
        (10, 10, 2000),
        (11, 10, 1500),
        (100, 10, 1000),
        (500, 10, 500),
        (501, 10, 300),
        (10, 100, 1300),
    ],
)
def test_epochs_follow_the_ipc(ipc: int, classes: int, epochs: int) -> None:
    assert protocol_epochs(ipc, classes) == epochs


@pytest.mark.parametrize(
    ("protocol", "classes", "kind", "lr", "decay"),
    [
        ("hard-sgd", 10, torch.optim.SGD, 0.01, 5e-4),
        ("hard-sgd", 1000, torch.optim.SGD, 0.1, 1e-4),
        ("hard-adamw", 10, torch.optim.AdamW, 1e-3, 0.01),
    ],
)
def test_optimizers(protocol: str, classes: int, kind: type, lr: float, decay: float) -> None:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), protocol, classes)
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (lr, decay)


def test_the_rate_falls_at_two_thirds_and_five_sixths(monkeypatch) -> None:
    rates = []
    real = torch.optim.SGD.step

    def step(self, *args):
        rates.append(round(self.param_groups[0]["lr"], 6))
        return real(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    train = load_images("digits", "train").random(2, 0)
    test = load_images("digits", "val").first(1)
    train_and_test(train, test, "convnet-2", "hard-sgd", 12, 0, torch.device("cpu"))
    assert rates == [0.01] * 8 + [0.002] * 2 + [0.0004] * 2


def test_a_classifier_of_real_digits_learns_and_best_is_not_below_last() -> None:
    train = load_images("digits", "train").random(20, 0)
    accuracy = train_and_test(
        train, load_images("digits", "val"), "convnet-3", "hard-adamw", 40, 0, torch.device("cpu")
    )
    assert 65 < accuracy.last <= accuracy.best
    wrong = train.take(torch.arange(len(train)))
    wrong.labels.copy_((wrong.labels + 1) % 10)
    accuracy = train_and_test(
        wrong, load_images("digits", "val"), "convnet-3", "hard-adamw", 40, 0, torch.device("cpu")
    )
    assert accuracy.last < 10


def test_the_same_seed_gives_the_same_accuracy(tiny) -> None:
    config = EvaluateConfig(path=str(distill(tiny())), epochs=3, repeats=2)
    one, two = evaluate(config), evaluate(config)
    assert one["sets"] == two["sets"]


def test_run_folder_with_baselines(tiny, capsys, tmp_path: Path) -> None:
    out = distill(tiny())
    before = contents(out)
    command = ["evaluate", str(out), "--epochs", "2", "--repeats", "2", "--baselines", "random,plain"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for text in (
        "protocol hard-adamw",
        "convnet-3",
        "2 epochs",
        "distilled",
        "random real",
        "plain",
        "100 real test",
    ):
        assert text in printed, printed
    results = json.loads((out / "results.json").read_text())
    assert list(results["sets"]) == ["distilled", "random real", "plain"]
    assert len(results["sets"]["plain"]["last"]["values"]) == 2
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "hard-adamw" in page
    after = contents(out)
    assert {name: after[name] for name in before} == before
    # the plain set has the run's noise: without guidance the first curriculum is the same
    plain = out / "baselines" / "plain" / "samples" / "1-0.safetensors"
    assert plain.read_bytes() == (out / "samples" / "1-0.safetensors").read_bytes()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == "hard-adamw"


def test_image_folder_and_first_ipc_images(tiny, tmp_path: Path, monkeypatch) -> None:
    out = distill(tiny())
    seen = []
    real = evaluation.train_and_test

    def spy(train, *args):
        seen.append(train)
        return real(train, *args)

    monkeypatch.setattr(evaluation, "train_and_test", spy)
    settings = {"real": "digits", "epochs": 1, "repeats": 1, "ipc": 3}
    evaluate(EvaluateConfig(path=str(out / "images"), **settings))
    assert len(seen[0]) == 6 and seen[0].classes == ("3", "8") and not seen[0].mirror
    expected = load_images(str(out / "images"), "train").images
    assert torch.equal(seen[0].images, torch.cat((expected[:3], expected[4:7])))
    assert not (out / "results.json").exists()


def test_real_folder_is_tested_on_its_val_images(tiny, tmp_path: Path) -> None:
    out = distill(tiny())
    real = tmp_path / "real"
    for split, count in (("train", 4), ("val", 2)):
        for name in "38":
            (real / split / name).mkdir(parents=True)
            for k in range(count):
                source = out / "images" / name / f"{k}.png"
                (real / split / name / f"{k}.png").write_bytes(source.read_bytes())
    settings = {"real": str(real), "epochs": 1, "repeats": 1, "baselines": ("random",)}
    results = evaluate(EvaluateConfig(path=str(out / "images"), **settings))
    assert results["test_images"] == 4
    with pytest.raises(InputError, match="missing or holds no images"):
        evaluate(EvaluateConfig(path=str(out / "images"), real=str(real / "val" / "3")))
