"""Ranks: two and three processes by torchrun do together what one does, and name the one that dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from acs_fast import distill
from acs_fast.distributed import Ranks
from acs_fast.feeds import Examples, shared
from acs_fast.plan import Layout, curriculum_ranges
from acs_fast.resume import add_samples, own_batches
from acs_fast.samples import Samples
from tests.runs import ROOT, contents, torchrun, torchrun_command

TOGETHER = """
    import sys
    import torch
    from acs_fast.config import InputError
    from acs_fast.discriminator import Trainer
    from acs_fast.distributed import Ranks, join
    from acs_fast.feeds import Examples, shared
    from acs_fast.models.classifier import build_classifier

    def weights(ranks, real):
        torch.manual_seed(0)
        network = build_classifier("convnet-2", 1, 4, 8)
        images, labels = torch.randn(7, 1, 8, 8), torch.arange(7) % 4
        mark = (torch.arange(7) % 2).float() if real else None

        def batches():
            while True:
                own = ranks.share(7)
                rows = slice(own.start, own.stop)
                yield Examples(images[rows], labels[rows], mark[rows] if real else None, 7)

        initial = {k: v.clone() for k, v in network.state_dict().items()}
        trainer = Trainer(network, ranks=ranks)
        losses = list(trainer.learn(initial, batches(), steps=5, lr=1e-3))
        return torch.cat([p.detach().flatten() for p in network.parameters()]), torch.stack(losses)

    with join("cpu") as ranks:
        n = ranks.num_ranks
        assert ranks.collect(ranks.rank * "x") == [k * "x" for k in range(n)]
        assert ranks.lead(lambda: f"from {ranks.rank}") == "from 0"
        try:
            ranks.lead(lambda: int("no") if False else (_ for _ in ()).throw(InputError("wrong")))
        except InputError as error:
            assert str(error) == "wrong" and getattr(error, "told", False) == (ranks.rank > 0)
        else:
            raise AssertionError
        for count in (0, 1, 5, 8):
            counts = [len(part) for part in ranks.shares(count)]
            own = torch.arange(count)[ranks.share(count).start : ranks.share(count).stop].float()[:, None]
            assert ranks.gather(own, counts)[:, 0].tolist() == list(range(count)), count
        parts = [torch.full((2, 3), float(ranks.rank)), torch.tensor(1.0)]
        ranks.add(parts)
        assert (parts[0] == sum(range(n))).all() and parts[1] == n
        for real in (False, True):
            together, alone = weights(ranks, real), weights(Ranks(), real)
            torch.testing.assert_close(together[1], alone[1], rtol=1e-4, atol=1e-6)
            # AdamW makes a step of the rate out of a gradient that is rounding alone: biases before a norm
            apart = (together[0] - alone[0]).abs() > 1e-5
            assert apart.float().mean() < 0.005
    print("agreed")
"""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_collect_sum_and_train_as_one(num_ranks: int, tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(textwrap.dedent(TOGETHER))
    assert torchrun(num_ranks, str(script)).stdout.count("agreed") == num_ranks


def test_any_number_of_ranks_writes_the_same_bytes(tiny, tmp_path: Path) -> None:
    """With `deterministic`; without it the first curriculum, which no discriminator steers."""
    whole = contents(distill(tiny(deterministic=True, discriminator_steps=20)))
    whole.pop("config.json")
    settings = tmp_path / "settings.json"
    for deterministic, num_ranks in ((True, 2), (True, 3), (False, 2)):
        out = tmp_path / f"{deterministic}-{num_ranks}"
        config = tiny(out=str(out), deterministic=deterministic, discriminator_steps=20)
        settings.write_text(json.dumps(dataclasses.asdict(config)))
        torchrun(num_ranks, "-m", "acs_fast", "distill", "--config", str(settings))
        found = contents(out)
        found.pop("config.json")
        assert found.keys() == whole.keys()
        same = {name for name in whole if found[name] == whole[name]}
        if deterministic:
            assert same == whole.keys()
        else:
            assert {"images/3/0.png", "images/8/0.png"} <= same
            one, two = (json.loads(c["curricula.json"])["3"]["sampled"] for c in (found, whole))
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-2)  # sums in another order
    assert (tmp_path / "True-2" / "logs" / "rank-1.log").is_file()


def test_a_dead_rank_is_named_and_the_others_stop(tiny, tmp_path: Path) -> None:
    settings, out = tmp_path / "settings.json", tmp_path / "run"
    config = tiny(ipc=60, num_sampling_steps=50, batch_size=2)
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = torchrun_command(2, "-m", "acs_fast", "distill", "--config", str(settings))
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 90
        while not (out / "logs" / "rank-1.log").is_file() and time.monotonic() < until:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = children[-1]
        os.kill(int(victim), signal.SIGKILL)
        killed = time.monotonic()
        text = process.communicate(timeout=90)[1]
    assert time.monotonic() - killed < 60 and process.returncode == 1
    assert "exitcode" in text and f"pid: {victim}" in text, text
    assert f"(process {victim} on " in text and "has died" in text, text


LEFT = """
    import os
    from torch.distributed import TCPStore
    from acs_fast.distributed import join

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    os.environ |= dict(zip(names, ("0", "0", "1", str(store.port), "127.0.0.1")))
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def threads():
        numbers = os.listdir("/proc/self/task")
        return {open(f"/proc/self/task/{number}/comm").read().strip() for number in numbers}

    with join("cpu") as ranks:
        import torch._dynamo  # optimizers do

        assert "pt_gloo_runloop" in threads()
    print(*threads())
"""


def test_no_thread_of_gloo_outlives_the_ranks() -> None:
    """One that did aborted a process whose run had ended well, now and then."""
    command = [sys.executable, "-c", textwrap.dedent(LEFT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout and "python" in done.stdout


def test_work_is_equal_for_any_number_of_ranks() -> None:
    for classes, ipc, curricula, num_ranks in ((10, 7, 3, 4), (3, 5, 5, 8), (1000, 2, 2, 3), (7, 9, 2, 5)):
        layout = Layout(classes, tuple(curriculum_ranges(ipc, curricula)))
        for curriculum in range(1, curricula + 1):
            numbers = np.arange(layout.size(curriculum))
            parts = [own_batches(numbers, Ranks(rank, num_ranks), 4) for rank in range(num_ranks)]
            counts = [sum(map(len, part)) for part in parts]
            assert max(counts) - min(counts) <= 1
            assert [n for part in parts for batch in part for n in batch] == numbers.tolist()
            assert all(len(batch) <= 4 for part in parts for batch in part)


def test_batches_skip_what_is_there() -> None:
    numbers = np.array([0, 1, 2, 5, 6, 9])
    assert own_batches(numbers, Ranks(), 2) == [range(0, 1), range(1, 3), range(5, 7), range(9, 10)]


def test_the_parts_of_a_batch_are_the_batch() -> None:
    images, labels = torch.randn(7, 1, 2, 2), torch.arange(7)

    def batches():
        yield Examples(images, labels)

    parts = [next(shared(batches(), Ranks(rank, 3))) for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    assert {part.total for part in parts} == {7}


def test_samples_lie_in_any_cut_and_are_kept_in_one(tmp_path: Path) -> None:
    from acs_fast.writer import write_tensors

    layout = Layout(2, (range(0, 3), range(3, 5)))
    values = torch.arange(6.0).view(6, 1, 1, 1)
    samples = Samples(tmp_path, layout, (1, 1, 1))
    for part in (range(0, 2), range(1, 5), range(4, 6)):
        write_tensors(samples.path(1, part), {"samples": values[part.start : part.stop]})
    write_tensors(samples.path(1, range(0, 6)), {"samples": values[:5]})  # not what its name says
    (samples.folder / "1-2-4.safetensors").write_bytes(b"cut")
    write_tensors(samples.path(2, range(0, 4)), {"samples": values[:4]})
    assert samples.scan().held(1).all() and samples.held(2).all()
    assert torch.equal(samples.read(1, range(0, 6)), values)
    assert torch.equal(samples.read(1, range(3, 5)), values[3:5])
    samples.keep(Ranks())
    assert sorted(path.name for path in samples.folder.iterdir()) == [
        "1-0-6.safetensors",
        "2-0-4.safetensors",
    ]
    assert torch.equal(Samples(tmp_path, layout, (1, 1, 1)).scan().read(1, range(0, 6)), values)


@pytest.mark.parametrize(
    ("ready", "repulsion", "keep", "needed"),
    [
        ((2, 3), False, False, {1: False, 2: False, 3: False}),
        ((2,), False, False, {1: True, 2: True, 3: False}),
        ((2, 3), True, False, {1: True, 2: True, 3: False}),
        ((2, 3), False, True, {1: True, 2: True, 3: True}),
    ],
)
def test_samples_are_needed_for_what_is_still_to_be_done(
    tmp_path: Path, ready: tuple[int, ...], repulsion: bool, keep: bool, needed: dict[int, bool]
) -> None:
    """The third curriculum's images are missing, and nobody has kept a sample."""
    layout = Layout(2, (range(0, 1), range(1, 2), range(2, 3)))
    missing = {1: np.array([], int), 2: np.array([], int), 3: np.array([1])}
    found = add_samples(
        missing, Samples(tmp_path, layout, (1, 1, 1)), guided=True, keep=keep, repulsion=repulsion,
        is_ready=lambda curriculum: curriculum in ready,
    )  # fmt: skip
    assert found == needed
    assert {number: len(values) for number, values in missing.items()} == {
        number: 2 if wanted else (1 if number == 3 else 0) for number, wanted in needed.items()
    }
