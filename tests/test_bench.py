"""`acs-fast bench` on tiny models: its figures follow from what is timed, and a wrong result has none."""

from __future__ import annotations

import builtins
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acs_fast import graph, ops
from acs_fast.attention import Attention
from acs_fast.bench import measure, subject, timing
from acs_fast.bench.subject import random_dit
from acs_fast.bench.timing import Run, gemm_runs, interleaved, memory_mb, operator_calls
from acs_fast.cli import main
from acs_fast.config import BenchConfig, DistillConfig
from acs_fast.denoiser import Denoiser
from acs_fast.engine import StepEngine
from acs_fast.estimate.flop import denoiser_flops
from acs_fast.models import classifier
from acs_fast.models.checkpoint import save_checkpoint
from acs_fast.models.dit import DiTConfig, official_config

CPU = torch.device("cpu")
SHAPE = DiTConfig(8, 2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=5)
TINY = ["--model", "dit-tiny-2", "--batch-size", "2", "--num-sampling-steps", "4", "--repeats", "3"]


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model by its size, a VAE and a discriminator of milliseconds."""
    monkeypatch.setitem(subject.MODELS, "dit-tiny-2", SHAPE)
    kl = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.5}
    monkeypatch.setattr(subject, "KL", kl)
    widths = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    blocks = {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    monkeypatch.setattr(subject, "TINY", {**widths, **blocks})
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)


def bench(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    """The row that `--json` prints."""
    assert main(["bench", *argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


# --- the figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["latent", "pixel", "pixel-tiny"])
def test_a_step_has_its_parts_and_the_rates_that_follow(space: str, capsys) -> None:
    row = bench(capsys, "step", *TINY, "--guidance-space", space)
    assert row["weights"] == "random" and row["dtype"] == "fp32" and row["tier"] == "high"
    assert row["shape"]["depth"] == 3 and row["guidance_space"] == space and not row["compiled"]
    assert row["device"] and "commit" in row and row["versions"]["torch"] == torch.__version__
    figures, totals = row["figures"], row["totals"]
    assert list(figures) == ["guided step", "  denoiser", "  guidance", "  update", "decode"]
    assert all(f["p20"] <= f["median"] <= f["p80"] for f in figures.values())
    step, decode = (figures[name]["median"] / 1e3 for name in ("guided step", "decode"))
    assert min(step, figures["  denoiser"]["median"], decode) > 0
    assert totals["images_per_s"] == pytest.approx(2 / (4 * step + decode), rel=1e-3)
    assert totals["gflop_per_step"] == 2 * denoiser_flops(SHAPE) / 1e9
    assert totals["gflop_per_s"] == pytest.approx(totals["gflop_per_step"] / step, rel=1e-3)
    share = 100 * totals["gflop_per_s"] / totals["gemm_gflop_per_s"]
    assert totals["percent_of_gemm"] == pytest.approx(share) and share > 0
    assert totals["peak_mb"] > 50 and totals["operator_calls_per_step"] > 100


def test_parts_are_differences_round_by_round() -> None:
    config = BenchConfig(model="dit-tiny-2", batch_size=2, num_sampling_steps=4, compile="off")
    made = subject.make_subject(DistillConfig(model=config.model, batch_size=2), CPU)
    seconds = {"guided step": [7.0, 9.0, 8.0], "unguided step": [4.0, 4.5, 5.0], "denoiser": [3.0, 3.0, 4.5]}
    measured = measure._split(measure.Scene(config, made), seconds, 0.5, True)
    medians = {name.strip(): f["median"] for name, f in measured.figures.items()}
    assert medians == {"guided step": 8000.0, "denoiser": 3000.0, "guidance": 3000.0, "update": 1000.0}
    assert measured.totals["images_per_s"] == 2 / (4 * 8.0)  # nothing is decoded
    assert measured.totals["gemm_gflop_per_s"] == 2 * (2 * 2 * 16) * 12 * 32**2 / 0.5 / 1e9


def test_trajectories(capsys) -> None:
    row = bench(capsys, "trajectory", *TINY)
    figures, totals = row["figures"], row["totals"]
    for kind, images in (("guided", "images_per_s"), ("unguided", "unguided_images_per_s")):
        batch, step = figures[f"{kind} batch"], figures[f"{kind} step"]
        assert batch["unit"] == "s" and step["unit"] == "ms"
        assert step["median"] == pytest.approx(1e3 * batch["median"] / 4, rel=1e-2)
        assert totals[images] == pytest.approx(2 / batch["median"], rel=1e-2)
    assert totals["captured_graphs"] == 0  # on a CPU
    assert 0 < totals["memory_before_mb"] <= totals["memory_after_mb"] + 50


def test_the_training_of_a_discriminator(capsys) -> None:
    row = bench(capsys, "discriminator", "--model", "dit-tiny-2", "--batch-size", "8", "--repeats", "2")
    assert set(row["figures"]) == {"load", "training step"} and row["batch_size"] == 8
    assert row["totals"]["images_per_s"] == pytest.approx(
        8e3 / row["figures"]["training step"]["median"], rel=1e-3
    )
    assert row["check"]["errors"] == {"losses": 0.0}  # the same operations in the same order


def test_a_checkpoint_as_distill_takes_it(tmp_path: Path, capsys) -> None:
    shape = dataclasses.replace(SHAPE, in_channels=3)
    save_checkpoint(random_dit(shape, torch.float32, CPU), tmp_path / "dit.safetensors")
    row = bench(capsys, "step", *TINY, "--model", str(tmp_path / "dit.safetensors"))
    assert row["weights"] == "checkpoint" and row["shape"]["in_channels"] == 3
    assert "decode" not in row["figures"]  # it samples pixels
    assert row["num_sampling_steps"] == 4 and row["repeats"] == 3


def test_bf16_is_checked_against_bf16(capsys) -> None:
    row = bench(capsys, "step", *TINY, "--dtype", "bf16")
    assert row["dtype"] == "bf16" and 1e-4 < row["check"]["errors"]["denoiser"] < 5e-2


def test_the_table_shows_figures_check_and_provenance(capsys) -> None:
    assert main(["bench", "step", *TINY]) == 0
    text = capsys.readouterr().out
    words = ["dit-tiny-2 (random weights)", "check: ok", "guided step, ms", "decode, ms", "images/s"]
    words += ["four GEMMs", "peak memory, MB", f"torch {torch.__version__}", "tier high", "3 rounds"]
    for word in words:
        assert word in text, word
    assert max(map(len, text.splitlines()[:3])) < 120


# --- no figure without a green check -----------------------------------------------------------------------


def wrong_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Denoiser.__call__
    monkeypatch.setattr(Denoiser, "__call__", lambda *args: call(*args).mul_(1.001))


def no_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    load = StepEngine.load
    monkeypatch.setattr(StepEngine, "load", lambda self, guidance: load(self, None))


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """From some call on, as in what is timed."""
    call, calls = Denoiser.__call__, []

    def spoilt(*args: Any) -> Tensor:
        calls.append(1)
        return call(*args).mul_(torch.nan if len(calls) > 8 else 1.0)

    monkeypatch.setattr(Denoiser, "__call__", spoilt)


def no_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "set_rate", lambda *args: None)


@pytest.mark.parametrize(
    ("what", "mistake", "found"),
    [
        ("step", wrong_denoiser, "denoiser 1.0e-03 of 1e-04"),
        ("trajectory", wrong_denoiser, "denoiser 1.0e-03 of 1e-04"),
        ("step", no_guidance, "of 2e-03"),
        ("step", not_a_number, "a result is not finite"),
        ("trajectory", not_a_number, "a result is not finite"),
        ("discriminator", no_learning_rate, "of 1e-02"),
    ],
)
def test_a_wrong_result_has_no_figure(what, mistake, found, capsys, monkeypatch) -> None:
    mistake(monkeypatch)
    assert main(["bench", what, *TINY]) == 1
    text = capsys.readouterr().out
    assert "check: FAILED" in text and found in text
    assert "median" not in text and "images/s" not in text
    row = bench(capsys, what, *TINY, code=1)
    assert not row["check"]["passed"] and not {"figures", "totals"} & set(row)


# --- what is counted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, learn_sigma=False, patch_size=4)])
def test_flop_are_those_of_the_lean_denoiser(shape: DiTConfig) -> None:
    lean = Denoiser(
        random_dit(shape, torch.float32, CPU), ops.select("reference", CPU), Attention("math"),
        timesteps=[1, 2], batch_size=2, slots=2, with_variance=True, pack=False,
    )  # fmt: skip
    rows = torch.tensor([0, 0, 1, 1])
    with FlopCounterMode(display=False) as counter:
        lean(torch.zeros(2, 4, 8, 8), 0, rows)
    assert counter.get_total_flops() == 2 * denoiser_flops(shape)


def test_flop_of_the_plain_model_are_more_by_the_modulations() -> None:
    model, both = random_dit(SHAPE, torch.float32, CPU), torch.tensor([0, 5])
    # the counter does not know the CPU's flash attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 4, 8, 8), both, both)
    d, embedding = 32, 2 * 16 * 16 * 32  # of the other branch's patches
    tabulated = 2 * (2 * d * (256 + d) + (6 * 3 + 2) * 2 * d * d)
    assert counter.get_total_flops() == denoiser_flops(SHAPE) + tabulated + embedding


def test_flop_of_the_largest_model_are_those_of_diffusers_less_its_table() -> None:
    d, depth = 1152, 28
    modulations = (6 * depth + 2) * 2 * d * d
    embedders = depth * 2 * d * (256 + d)  # diffusers has one a block
    patches = 2 * 256 * 16 * d  # embedded for each branch
    total = denoiser_flops(official_config("DiT-XL/2")) + 2 * (modulations + embedders) + patches
    assert round(total / 1e9, 1) == 474.7  # by PyTorch's counter


def test_the_gemms_are_a_blocks_four_linears_at_the_rows_of_a_batch() -> None:
    runs = gemm_runs(SHAPE, 3, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        runs["gemm"].call()
    assert counter.get_total_flops() == runs["gemm"].parts * 2 * (2 * 3 * 16) * 12 * 32**2
    assert all(run.parts == timing.GEMM_COPIES for run in runs.values())


def test_operators_inside_another_count_once() -> None:
    x, weight = torch.ones(4, 4), torch.ones(4, 4)
    assert operator_calls(lambda: torch.nn.functional.linear(x, weight).add_(1).relu()) == 3


def test_rounds_are_interleaved_and_what_comes_before_is_not_timed(monkeypatch) -> None:
    now, order = [0.0], []

    def spend(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    runs = {
        "a": Run(lambda: spend("a", 6.0), parts=2, before=lambda: spend("before a", 100.0)),
        "b": Run(lambda: spend("b", 1.0)),
    }
    assert interleaved(runs, 2, CPU) == {"a": [3.0, 3.0], "b": [1.0, 1.0]}
    assert order == ["before a", "a", "b"] * 2


def test_the_peak_stays_when_memory_is_given_back() -> None:
    taken = torch.ones(75_000_000)  # 300 MB
    held = memory_mb(CPU, peak=False)
    del taken
    now, peak = memory_mb(CPU, peak=False), memory_mb(CPU, peak=True)
    assert held is not None and now is not None and peak is not None
    assert now < held - 200 and peak >= held - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_drawn_in_their_dtype_and_none_is_zero(dtype: torch.dtype) -> None:
    model = random_dit(SHAPE, dtype, CPU)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all((p != 0).float().mean() > 0.98 for name, p in model.named_parameters() if name != "pos_embed")
    again = random_dit(SHAPE, dtype, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "dit-xxl-2"], ["dit-xxl-2", "dit-xl-2, dit-xl-4", "dit-s-8"]),
        (["--model", "absent/dit.pt"], ["there is no checkpoint absent/dit.pt"]),
        ([*TINY, "--backend", "reference"], ["plain sampler", "use auto"]),
        ([*TINY, "--num-classes", "1"], ["--num-classes is 1"]),
        ([*TINY, "--num-sampling-steps", "1"], ["--num-sampling-steps is 1"]),
        ([*TINY, "--repeats", "0"], ["--repeats is 0"]),
        ([*TINY, "--discriminator", "convnet-9"], ["convnet-9", "smaller depth"]),
        (["--model", "digits", "--guidance-space", "pixel"], ["--guidance-space pixel", "latent"]),
    ],
)
def test_unusable_input_is_one_sentence(argv: list[str], words: list[str], capsys) -> None:
    assert main(["bench", "step", *argv]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(word in text for word in words), text


def test_without_diffusers_there_is_no_decode_and_no_pixel_guidance(capsys, monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["bench", "step", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "there is no decode: diffusers is not installed" in lines
    assert next(line.split()[2:] for line in lines if line.startswith("decode")) == ["-", "-", "-"]
    for space in ("pixel", "pixel-tiny"):
        assert main(["bench", "step", *TINY, "--guidance-space", space]) == 2
        assert "acs-fast[diffusers]" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom acs_fast.cli import main\n"
        "try: main(['bench', '--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "dit-xl-2" in done.stdout and "{step,trajectory,discriminator}" in done.stdout
