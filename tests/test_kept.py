"""What an evaluation keeps: a stopped one goes on with the trainings that it lacks, none stale is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from acs_fast import EvaluateConfig, distill, evaluate
from acs_fast.evaluation import judging
from acs_fast.evaluation.kept import Kept
from acs_fast.evaluation.training import Accuracy


def test_values_are_kept_by_what_they_hang_on(tmp_path: Path) -> None:
    path, calls = tmp_path / "deep" / "kept.jsonl", []

    def make() -> tuple[int, int]:
        calls.append(1)
        return len(calls), 7

    for _ in range(2):
        kept = Kept(path, {"device": "cpu"})
        assert kept.get({"seed": 1}, make) == [1, 7]
        assert kept.get({"seed": 2}, make) == [2, 7]
    assert Kept(path, {"device": "cuda"}).get({"seed": 1}, make) == [3, 7]
    assert Kept(None, {"device": "cpu"}).get({"seed": 1}, make) == [4, 7]
    assert len(path.read_text().splitlines()) == 3


DAMAGES = {
    "newline": lambda data: data[:-1],
    "end": lambda data: data[:-9],
    "begun": lambda data: data + b'{"ke',
    "others": lambda data: data + b"[]\n7\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_line_that_a_kill_cut_is_made_again(tmp_path: Path, damage: str) -> None:
    path, made = tmp_path / "kept.jsonl", []

    def value(seed: int) -> int:
        return Kept(path, {}).get({"seed": seed}, lambda: made.append(seed) or seed)

    assert [value(seed) for seed in range(3)] == [0, 1, 2]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for _ in range(2):
        assert [value(seed) for seed in range(4)] == [0, 1, 2, 3]
    assert made == ([0, 1, 2, 2, 3] if damage == "end" else [0, 1, 2, 3])


commit = ["abc"]  # that the evaluation thinks it runs from


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is trained: nothing but a number; the third raises."""
    done: list[tuple] = []

    def train(train, test, network, recipe, seed, *rest):
        if len(done) == 2 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        done.append((network, recipe.epochs, seed))
        return Accuracy(50.0 + len(done), 40.0 + len(done))

    stopped: list[int] = []
    monkeypatch.setattr(judging, "train_and_test", train)
    monkeypatch.setattr(judging, "describe", lambda device: {"commit": commit[0]})
    commit[0] = "abc"
    return done


def test_a_stopped_evaluation_goes_on(tiny, trainings) -> None:
    out = str(distill(tiny()))
    config = EvaluateConfig(path=out, epochs=3, repeats=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    (row,) = evaluate(config)["evaluations"]
    assert [seed for _, _, seed in trainings] == [0, 1, 2, 3]
    assert row["sets"]["distilled"]["best"]["values"] == [51, 52, 53, 54]
    evaluate(config)
    assert len(trainings) == 4
    evaluate(EvaluateConfig(path=out, epochs=3, repeats=5))
    assert len(trainings) == 5
    for other in ({"epochs": 4}, {"network": ("convnet-1",)}, {"ipc": 2}, {"protocol": ("hard-sgd",)}):
        before = len(trainings)
        evaluate(EvaluateConfig(**{"path": out, "epochs": 3, "repeats": 1, **other}))
        assert len(trainings) == before + 1, other


def test_changed_code_keeps_and_uses_nothing(tiny, trainings) -> None:
    out = distill(tiny())
    config = EvaluateConfig(path=str(out), epochs=3, repeats=1)
    evaluate(config)
    commit[0] = "abc+"  # with uncommitted changes
    before = (out / "baselines" / "trainings.jsonl").read_text()
    evaluate(config)
    assert len(trainings) == 2 and (out / "baselines" / "trainings.jsonl").read_text() == before
