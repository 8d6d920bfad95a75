"""Evaluation: protocols by their facts, the table, the files, the baselines."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from acs_fast import EvaluateConfig, InputError, distill, evaluate
from acs_fast.cli import main
from acs_fast.data import load_images
from acs_fast.evaluation import judging
from acs_fast.evaluation import results as results_file
from acs_fast.evaluation.judging import choose_recipes
from acs_fast.evaluation.protocols import make_recipe
from acs_fast.evaluation.runs import read_run
from acs_fast.evaluation.training import Accuracy, TestSet, train_and_test
from acs_fast.writer import lock
from tests.runs import contents, stored

CPU = torch.device("cpu")


def test_a_classifier_of_real_digits_learns_and_best_is_not_below_last() -> None:
    train = load_images("digits", "train").random(20, 0)
    test, recipe = TestSet.of(load_images("digits", "val"), CPU), make_recipe("hard-adamw", 20, 10, 40)
    accuracy = train_and_test(train, test, "convnet-3", recipe, 0, CPU)
    assert 65 < accuracy.last <= accuracy.best
    wrong = train.take(torch.arange(len(train)))
    wrong.labels.copy_((wrong.labels + 1) % 10)
    accuracy = train_and_test(wrong, test, "convnet-3", recipe, 0, CPU)
    assert accuracy.last < 10


def test_the_same_seed_gives_the_same_accuracy(tiny) -> None:
    config = EvaluateConfig(path=str(distill(tiny())), epochs=3, repeats=2)
    one, two = evaluate(config), evaluate(config)
    assert one["evaluations"][0]["sets"] == two["evaluations"][0]["sets"]


def test_run_folder_with_baselines(tiny, capsys, tmp_path: Path) -> None:
    out = distill(tiny())
    before = contents(out)
    command = ["evaluate", str(out), "--epochs", "2", "--repeats", "2", "--baselines", "random,plain"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for text in (
        "protocol hard-adamw",
        "convnet-3",
        "2 of the protocol's 2000 epochs",
        "images of 8 px; the protocol resizes to 224",
        "distilled",
        "random real",
        "plain",
        "100 real test",
    ):
        assert text in printed, printed
    results = json.loads((out / "results.json").read_text())
    (row,) = results["evaluations"]
    assert list(row["sets"]) == ["distilled", "random real", "plain"]
    assert len(row["sets"]["plain"]["last"]["values"]) == 2
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "hard-adamw" in page
    after = contents(out)
    assert {name: after[name] for name in before} == before
    # the plain set has the run's noise: without guidance the first curriculum is the same
    plain = stored(out / "baselines" / "plain", 1)
    assert plain.read_bytes() == stored(out, 1).read_bytes()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["evaluations"][0]["protocol"] == "hard-adamw"


def test_image_folder_and_first_ipc_images(tiny, tmp_path: Path, monkeypatch) -> None:
    out = distill(tiny())
    seen = []
    real = judging.train_and_test

    def spy(train, *args):
        seen.append(train)
        return real(train, *args)

    monkeypatch.setattr(judging, "train_and_test", spy)
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
    assert results["evaluations"][0]["test_images"] == 4
    with pytest.raises(InputError, match="missing or holds no images"):
        evaluate(EvaluateConfig(path=str(out / "images"), real=str(real / "val" / "3")))


@pytest.fixture
def untrained(monkeypatch) -> list[tuple[str, int]]:
    """No classifier is trained and no plain set is sampled: what would have been, as (protocol, epochs)."""
    calls: list[tuple[str, int]] = []

    def train_nothing(train, test, network, recipe, *rest):
        calls.append((recipe.protocol, recipe.epochs))
        return Accuracy(50.0, 40.0)

    monkeypatch.setattr(judging, "train_and_test", train_nothing)
    return calls


def real_folder(out: Path, folder: Path) -> Path:
    """A flat folder <class>/* of real images: those of a run serve."""
    for path in (out / "images").glob("*/*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("hard-adamw", 400)),
        ({"protocol": ("hard-sgd",)}, ("hard-sgd", 2000)),
        ({"protocol": ("hard-adamw",)}, ("hard-adamw", 2000)),
        ({"epochs": 7}, ("hard-adamw", 7)),
        ({"protocol": ("hard-sgd",), "epochs": 7}, ("hard-sgd", 7)),
    ],
    ids=str,
)
def test_a_run_on_the_digits_has_their_protocol_unless_one_is_named(tiny, untrained, given, expected) -> None:
    results = evaluate(EvaluateConfig(path=str(distill(tiny())), repeats=1, **given))
    (row,) = results["evaluations"]
    assert untrained == [expected] and (row["protocol"], row["epochs"]) == expected
    assert row["protocol_epochs"] == 2000


def test_the_command_names_a_protocol_and_gets_its_epochs(tiny, untrained, capsys) -> None:
    out = str(distill(tiny()))
    assert main(["evaluate", out, "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "hard-adamw: convnet-3, 400 epochs" in printed and "400 of the protocol's 2000 epochs" in printed
    assert main(["evaluate", out, "--repeats", "1", "--protocol", "hard-sgd"]) == 0
    printed = capsys.readouterr().out
    assert "hard-sgd: convnet-3, 2000 epochs" in printed and "of the protocol's" not in printed
    assert untrained == [("hard-adamw", 400), ("hard-sgd", 2000)]


def test_other_sets_have_hard_sgd() -> None:
    assert choose_recipes(EvaluateConfig(), None, "", 10, 10) == ([make_recipe("hard-sgd", 10, 10)], None)


def test_results_say_how_they_were_made(tiny, untrained) -> None:
    out = distill(tiny())
    results = evaluate(EvaluateConfig(path=str(out), repeats=2, seed=5, baselines=("random",)))
    expected = {"seed": 5, "repeats": 2, "image_size": 8, "mirror": False, "baselines": ["random"]}
    (row,) = results["evaluations"]
    assert {name: row[name] for name in expected} == expected
    assert json.loads((out / "results.json").read_text())["evaluations"] == [row]


def test_a_later_evaluation_replaces_its_own_and_keeps_the_others(tiny, untrained) -> None:
    out = distill(tiny())
    two = {"protocol": ("hard-sgd",), "network": ("convnet-1", "convnet-2")}
    for settings in ({"seed": 1}, two, {"seed": 7}):
        evaluate(EvaluateConfig(path=str(out), repeats=1, **settings))
    rows = json.loads((out / "results.json").read_text())["evaluations"]
    assert [(row["protocol"], row["network"], row["seed"]) for row in rows] == [
        ("hard-sgd", "convnet-1", 0),
        ("hard-sgd", "convnet-2", 0),
        ("hard-adamw", "convnet-3", 7),
    ]


def lose_the_model(out: Path) -> None:
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**record, "model_sha256": "0" * 64}))


def change_the_classes(out: Path) -> None:
    Path(json.loads((out / "config.json").read_text())["config"]["classes"]).write_text("8\n3\n")


REFUSED = {
    "network": ({"network": ("convnet-3", "resnet-18")}, lambda out: None, "resnet-18 needs images of 16 px"),
    "network-name": ({"network": ("vgg",)}, lambda out: None, "there is no network 'vgg'"),
    "ipc": ({"ipc": 5}, lambda out: None, "--ipc 5"),
    "real": ({"real": "nowhere"}, lambda out: None, "there is no image folder nowhere"),
    "model": ({}, lose_the_model, "is not the model of the run any more"),
    "classes": ({}, change_the_classes, "lists other classes than the run has"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_be_refused_is_refused_before_any_work(tiny, untrained, monkeypatch, kind) -> None:
    settings, damage, message = REFUSED[kind]
    out = distill(tiny())
    damage(out)
    monkeypatch.setattr(judging, "sampled_set", lambda *args: pytest.fail("sampled"))
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(path=str(out), baselines=("plain",), **settings))
    assert not untrained


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_plain_is_sampled_on_the_device_of_the_evaluation(tiny, untrained) -> None:
    out = distill(tiny())
    record = json.loads((out / "config.json").read_text())
    record["config"] |= {"device": "cuda", "attention": "cudnn"}  # the run was made on another machine
    record["device"] = "cuda (another)"
    (out / "config.json").write_text(json.dumps(record))
    settings = {"path": str(out), "repeats": 1, "baselines": ("plain",), "device": "cpu"}
    evaluate(EvaluateConfig(**settings))
    plain = out / "baselines" / "plain" / "config.json"
    stored = json.loads(plain.read_text())
    assert stored["config"]["device"] == "cpu"
    plain.write_text(json.dumps({**stored, "device": "cuda (another)"}))  # is sampled anew
    evaluate(EvaluateConfig(**settings))
    assert json.loads(plain.read_text())["device"].startswith("cpu")


@pytest.mark.parametrize("classes", ["3,8", "8,3", "3"])
def test_plain_is_sampled_for_classes_that_are_named_on_the_command_line(tiny, untrained, classes) -> None:
    out = distill(tiny(classes=classes))
    evaluate(EvaluateConfig(path=str(out), repeats=1, baselines=("plain",)))
    assert (out / "baselines" / "plain" / "images" / "3" / "0.png").is_file()


def test_a_run_on_other_images_than_the_digits_is_judged_by_the_fields_protocol(tiny) -> None:
    run = read_run(distill(tiny()))
    assert choose_recipes(EvaluateConfig(), run, "digits", 4, 2) == (
        [make_recipe("hard-adamw", 4, 2, 400)],
        400,
    )
    assert choose_recipes(EvaluateConfig(), run, "elsewhere", 4, 2) == ([make_recipe("hard-sgd", 4, 2)], None)


def test_a_flat_real_folder_is_no_source_of_random_images(tiny, untrained, tmp_path: Path) -> None:
    out = distill(tiny())
    settings = {"path": str(out), "real": str(real_folder(out, tmp_path / "real")), "repeats": 1}
    with pytest.raises(InputError, match="has no train/ and val/"):
        evaluate(EvaluateConfig(baselines=("random",), **settings))
    assert not untrained
    assert evaluate(EvaluateConfig(**settings))["evaluations"][0]["test_images"] == 8


@pytest.mark.parametrize("name", ["images/8/2.png", "contact_sheet.png"])
def test_a_run_without_one_of_its_files_is_unfinished(tiny, name) -> None:
    out = distill(tiny())
    (out / "images" / "3" / "4.png").write_bytes((out / "images" / "3" / "0.png").read_bytes())
    (out / name).unlink()
    with pytest.raises(InputError, match="is unfinished"):
        read_run(out)


@pytest.mark.parametrize(
    "value", [None, 3, "text", [], [1], {}, {"a": 1}, True, [None], {"preset": []}], ids=str
)
@pytest.mark.parametrize("key", [None, "config", "classes", "model_sha256"], ids=str)
def test_any_json_for_a_configuration_is_read_or_refused(tiny, key, value) -> None:
    out = distill(tiny())
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(value if key is None else {**record, key: value}))
    if (key, value) == ("model_sha256", "text"):
        assert read_run(out).model_sha256 == "text"
        return
    # {} for the settings are the defaults: ten images a class, which are not there
    with pytest.raises(
        InputError, match="is unfinished" if (key, value) == ("config", {}) else "cannot be read"
    ):
        read_run(out)


def test_results_outlive_a_report_that_cannot_be_drawn(tiny, untrained, capsys, monkeypatch) -> None:
    out = distill(tiny())
    (out / "report.html").write_text("of earlier results")

    def fail(path: Path) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(results_file, "write_report", fail)
    results = evaluate(EvaluateConfig(path=str(out), repeats=1))
    assert json.loads((out / "results.json").read_text())["evaluations"] == results["evaluations"]
    assert "no report.html could be drawn" in capsys.readouterr().err
    assert not (out / "report.html").exists()


def test_results_are_written_with_the_run_locked(tiny, untrained, monkeypatch) -> None:
    out = distill(tiny())
    held = lock(out)
    held.__enter__()
    with pytest.raises(InputError, match="another process is writing"):
        evaluate(EvaluateConfig(path=str(out), repeats=1))
    assert not untrained
    held.__exit__(None, None, None)

    def train_while_another_takes_the_lock(*args):
        other = lock(out)
        other.__enter__()
        threading.Timer(0.3, other.__exit__, (None, None, None)).start()
        return Accuracy(50.0, 40.0)

    def write_while_no_other_can(path, value):
        waited.append(time.monotonic() - started)
        with pytest.raises(InputError, match="another process is writing"), lock(out):
            pass
        real(path, value)

    waited: list[float] = []
    real, started = results_file.write_json, time.monotonic()
    monkeypatch.setattr(judging, "train_and_test", train_while_another_takes_the_lock)
    monkeypatch.setattr(results_file, "write_json", write_while_no_other_can)
    evaluate(EvaluateConfig(path=str(out), repeats=1))
    assert waited[0] > 0.3 and (out / "results.json").exists()


@pytest.mark.parametrize(("scale", "shown"), [(0.0, False), (0.3, True)])
def test_the_report_shows_curves_of_a_guided_run_only(tiny, untrained, scale, shown) -> None:
    out = distill(tiny(guidance_scale=scale))
    evaluate(EvaluateConfig(path=str(out), repeats=1))
    page = (out / "report.html").read_text()
    assert ("discriminator loss by curriculum" in page) == shown
    assert page.count("data:image/png;base64,") == 1 and "400 of the protocol" in page


def test_what_is_finished_is_kept_when_the_rest_is_interrupted(tiny, monkeypatch) -> None:
    out = distill(tiny())

    def train(train, test, network, *rest):
        if network == "convnet-2":
            raise KeyboardInterrupt
        return Accuracy(50.0, 40.0)

    monkeypatch.setattr(judging, "train_and_test", train)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluateConfig(path=str(out), repeats=1, network=("convnet-1", "convnet-2")))
    (row,) = json.loads((out / "results.json").read_text())["evaluations"]
    assert row["network"] == "convnet-1"


def test_a_teacher_is_not_trained_on_the_test_images(tiny, untrained, tmp_path: Path) -> None:
    out = distill(tiny())
    settings = {"real": str(real_folder(out, tmp_path / "flat")), "protocol": ("soft",), "repeats": 1}
    with pytest.raises(InputError, match="has no train/ and val/"):
        evaluate(EvaluateConfig(path=str(out), **settings))
    assert not untrained
