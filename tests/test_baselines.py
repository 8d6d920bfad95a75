"""The baselines are what they claim: diffusers' operators and weights, the equations' samples; the FLOP."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from acs_fast import sampler
from acs_fast.kernels.reference import philox_normal
from acs_fast.models.dit import DiT, DiTConfig
from benchmarks import gpu_first_run, ops_bench, step_speed
from benchmarks.baselines import methods, sampling, setting, timing, transformer
from benchmarks.roofline import LaunchCounter

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

CPU = torch.device("cpu")
SMALL = DiTConfig(8, 2, hidden_size=48, depth=3, num_heads=3, num_classes=5)


@pytest.fixture(params=["official", "diffusers"])
def model(request: pytest.FixtureRequest) -> DiT:
    """A random DiT with either's epsilon and frequencies."""
    constants = {} if request.param == "official" else setting.DIFFUSERS
    return setting.random_dit(dataclasses.replace(SMALL, **constants), torch.float64, CPU)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, torch.tensor([999, 3, 500, 0]), torch.tensor([0, 4, 5, 5])


@torch.no_grad()
def launches(transformer_: torch.nn.Module) -> list[str]:
    with LaunchCounter() as counter:
        transformer.denoiser(transformer_)(*inputs(torch.float64))
    return counter.calls


def test_random_weights_open_every_gate(model: DiT) -> None:
    assert min(p.abs().max().item() for p in model.parameters()) > 0
    out = model(*inputs(torch.float64))
    assert 0.1 < out.std().item() < 10
    shallow = setting.random_dit(dataclasses.replace(SMALL, depth=1), torch.float64, CPU)
    assert not torch.allclose(out, shallow(*inputs(torch.float64)), rtol=0.1)
    rounded = setting.random_dit(SMALL, torch.bfloat16, CPU).state_dict()
    wide = setting.random_dit(SMALL, torch.float32, CPU).state_dict()
    assert all(torch.equal(rounded[name], wide[name].bfloat16()) for name in wide)


def test_diffusers_transformer_has_our_weights(model: DiT) -> None:
    pytest.importorskip("diffusers")
    theirs = transformer.denoiser(transformer.diffusers_transformer(model, torch.float64, CPU))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(*inputs(torch.float64)), model(*inputs(torch.float64)), rtol=1e-10, atol=1e-10
        )


def test_plain_transformer_is_that_of_diffusers(model: DiT) -> None:
    pytest.importorskip("diffusers")
    theirs = transformer.diffusers_transformer(model, torch.float64, CPU)
    plain = transformer.plain_transformer(model, torch.float64, CPU)
    with torch.no_grad():
        torch.testing.assert_close(
            transformer.denoiser(plain)(*inputs(torch.float64)),
            transformer.denoiser(theirs)(*inputs(torch.float64)),
            rtol=1e-10,
            atol=1e-10,
        )
    expected = launches(theirs)
    assert len(expected) > 100  # 40 or so a block, or the counter counts nothing
    assert len(launches(plain)) == pytest.approx(len(expected), rel=0.02)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("kind", ["plain", "diffusers"])
def test_guided_steps_follow_the_plain_sampler(
    model: DiT, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    make = transformer.diffusers_transformer if kind == "diffusers" else transformer.plain_transformer
    denoiser = transformer.denoiser(make(model, torch.float64, CPU))
    config = setting.run_config(4, 3, CPU, seed=5)
    guidance = setting.guidance(config, 4, 8, CPU)
    guidance.discriminator.double()
    batch = setting.batch(SMALL, 3, CPU)
    keyed = sampling.keyed_noise(batch, config.seed)
    monkeypatch.setattr(sampler, "philox_normal", lambda *args, **key: philox_normal(*args, **key).double())
    expected = sampler.denoise(model, batch.class_labels, batch.indices, config, guidance, batch.targets)
    got = sampling.guided_steps(
        denoiser, guidance.discriminator, config, batch, (4, 8, 8), model.null_label, torch.float64,
        lambda step, shape: keyed(step, shape).double(),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(list(got)), torch.stack(list(expected)), rtol=1e-9, atol=1e-9)


@needs_compiler
def test_compiled_transformer_equals_the_eager_one() -> None:
    model = setting.random_dit(dataclasses.replace(SMALL, depth=1), torch.float32, CPU)
    plain = transformer.plain_transformer(model, torch.float32, CPU)
    with torch.no_grad():
        got = transformer.compiled(plain, "default")(*inputs(torch.float32))
        torch.testing.assert_close(got, model(*inputs(torch.float32)), rtol=1e-4, atol=1e-5)


def test_guidance_goes_through_the_decode() -> None:
    pytest.importorskip("diffusers")
    factor = setting.VAE_FACTOR
    decode = setting.random_vae(torch.float32, CPU, width=8)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert decode(z).shape == (1, 3, 4 * factor, 4 * factor)
    config = setting.run_config(2, 1, CPU)
    discriminator = setting.guidance(config, 3, 4 * factor, CPU).discriminator
    target = torch.tensor([3])
    g = sampling.ascent(discriminator, z, target, decode)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(discriminator(decode(value)), target)

    step = 1e-2 * g / g.norm()
    expected = (loss(z + step) - loss(z - step)) / 2e-2
    torch.testing.assert_close(g.norm(), expected, rtol=5e-2, atol=0)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_flops_are_those_that_pytorch_counts(learn_sigma: bool) -> None:
    config = dataclasses.replace(SMALL, learn_sigma=learn_sigma)
    model = setting.random_dit(config, torch.float32, CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(torch.float32))
    assert counter.get_total_flops() == 4 * setting.denoiser_flops(config)


def test_flops_of_the_full_size() -> None:
    assert setting.denoiser_flops(setting.MODELS["dit-xl-2"]) / 1e9 == pytest.approx(237.3, abs=0.1)
    assert setting.gemm_rows(setting.MODELS["dit-xl-2"], 66) == 33792


# --- the scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds, a narrow VAE, and no word about Triton's interpreter, which no figure here comes from."""
    monkeypatch.setattr(ops_bench, "ROUNDS", 2)
    monkeypatch.setattr(gpu_first_run, "interpreted", lambda: False)
    monkeypatch.setattr(setting, "random_vae", partial(setting.random_vae, width=8))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_compiler
def test_the_first_run_measures_what_this_machine_can(quick: None, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert gpu_first_run.main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    rows = read(out)
    for row in rows:
        assert "reason" in row or row["median"] > 0, row
        assert not row.get("reason", "").startswith("its error"), row
        assert "reason" in row or row["kind"] in ("copy", "matrix") or row["check"] <= 1, row
        assert row["versions"]["torch"] == torch.__version__ and row["measured_matrix_tflop_s"] > 0
    figures = {
        (row["kind"], row["name"], row["batch_size"]) for row in rows if "check" in row and "median" in row
    }
    gemms = {("gemm", name, batch) for name in ("qkv", "proj", "fc1", "fc2") for batch in (1, 3)}
    steps = {("step", name, 2) for name in ("E-plain", "C (default)")}
    assert figures >= gemms | steps | {("attention", "math", 1), ("attention", "math", 3)}
    assert {row["epilogue"] for row in rows if row["kind"] == "gemm" and "median" in row} == {
        "bias", "bias, gelu", "bias, then gelu",
    }  # fmt: skip
    scaled = [row for row in rows if row["kind"] == "scaled_mm"]
    assert len(scaled) == 2 * 4 * 2 * 2 and {row["scales"] for row in scaled} == {"rowwise", "tensorwise"}
    for row in rows:
        assert gpu_first_run.line(row)


def trial(*results: torch.Tensor | Exception) -> timing.Trial:
    """Calls with these results, of which the first is held against ones."""

    def call(result: torch.Tensor | Exception) -> torch.Tensor:
        if isinstance(result, Exception):
            raise result
        return result

    error = partial(timing.relative_error, expected=torch.ones(3))
    return timing.Trial({"kind": "t"}, [partial(call, r) for r in results], error, 0.01, 10, 10)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (torch.full((3,), 1.02), "its error is 2.0e-02, 1.0e-02 is allowed"),
        (torch.full((3,), float("nan")), "its error is inf, 1.0e-02 is allowed"),
        (NotImplementedError("no\nsuch kernel"), "NotImplementedError: no such kernel"),
    ],
)
def test_no_figure_without_a_right_result(quick: None, result: torch.Tensor | Exception, reason: str) -> None:
    machine = timing.Machine(CPU, 1e9, 1e9)
    row = timing.run_trial(trial(result, torch.ones(3)), machine)
    assert row["reason"] == reason and "median" not in row
    right = timing.run_trial(trial(torch.full((3,), 1.005), torch.ones(3)), machine)
    assert "reason" not in right and right["check"] == pytest.approx(0.5, abs=0.01)
    assert right["median"] > 0 and right["timed"] == "calls of 2"


def test_a_figure_is_of_one_call_and_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda runs, device: {name: [4e-6, 6e-6, 8e-6] for name in runs})
    ones = torch.ones(3)
    row = timing.run_trial(trial(ones, ones), timing.Machine(CPU, copy=1e7, matrix=1e8))
    assert (row["unit"], row["p20"], row["median"], row["p80"]) == ("us", 2.4, 3.0, 3.6)
    assert row["percent_of_roofline"] == pytest.approx(100 * 1e-6 / 3e-6, abs=0.1)  # 10 bytes take longer
    row = step_speed.figures([0.6], methods.Scene(setting.MODELS["small"], 4, 3, CPU))
    assert (row["unit"], row["median"], row["images_per_s"]) == ("ms", 200.0, 0.4)  # 4 images in 50 steps


def step_speed_rows(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = ["--device", "cpu", "--model", "small", "--steps", "2", "--repeats", "2", "--no-memory"]
    code = step_speed.main([*command, "--out", str(out), *arguments])
    return code, read(out)


@needs_compiler
def test_step_speed_puts_the_methods_side_by_side(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    out = tmp_path / "step.jsonl"
    codes = [
        step_speed_rows(out, "--batch-sizes", "1", "--dtypes", "fp32", "--baselines", "e", "c", "p")[0],
        step_speed_rows(out, "--batch-sizes", "3", "--dtypes", "bf16", "fp32")[0],
    ]
    assert codes == [0, 0]
    rows = read(out)
    expected = [(1, "fp32", name) for name in ("E", "ours", "C", "P")]
    expected += [(3, dtype, name) for dtype in ("bf16", "fp32") for name in ("E", "ours")]
    assert [(row["batch_size"], row["dtype"], row["name"]) for row in rows] == expected
    for row in rows:
        assert row["check"] <= 1 and 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["images_per_s"] == pytest.approx(20 * row["batch_size"] / row["median"], rel=0.01)
        assert row["error_x"] < (0.05 if row["dtype"] == "bf16" else 1e-5)
        if row["name"] == "P":
            assert "percent_of_gemm" not in row
            continue
        same = {r["name"]: r for r in rows if all(r[k] == row[k] for k in ("batch_size", "dtype"))}
        assert all(row[f"times_as_fast_as_{name}"] > 0 for name in {"E", "C"} & set(same))
        assert set(row["operator_ms"]) == {"linears", "attention", "gelu", "other"}
        for dtype, key in ((row["dtype"], "percent_of_gemm"), ("bf16", "percent_of_bf16_gemm")):
            share = 100 * row["gflop_s"] / row["gemm_gflop_s"][dtype]
            assert row[key] == pytest.approx(share, abs=0.1, rel=0.01)
        flop = 2 * row["batch_size"] * setting.denoiser_flops(setting.MODELS["small"])
        assert row["gflop_s"] == pytest.approx(flop / row["median"] / 1e6, rel=0.02)
    printed = capsys.readouterr().out
    assert "| 1 | fp32 | C (default) |" in printed and "% of bf16 GEMM" in printed


def test_a_ratio_is_of_the_same_round() -> None:
    rows = [
        {"name": name, "dtype": dtype, "median": 1.0}
        for name, dtype in (("E", "bf16"), ("ours", "bf16"), ("E", "fp32"), ("ours", "fp32"), ("P", "fp32"))
    ]
    times = {"0": [4.0, 8.0, 8.0], "1": [2.0, 4.0, 2.0], "2": [2.0, 2.0, 2.0], "3": [1.0, 2.0, 4.0]}
    for number, row in enumerate(step_speed.with_ratios(rows, {**times, "4": [1.0, 1.0, 1.0]})):
        same = {0: 1.0, 1: 2.0, 2: 1.0, 3: 1.0}.get(number)
        assert row.get("times_as_fast_as_E") == same
        assert row.get("times_as_fast_as_bf16_E") == {0: 1.0, 1: 2.0, 2: 4.0, 3: 4.0}.get(number)
        assert "times_as_fast_as_C" not in row


def test_step_speed_gives_no_figure_to_a_wrong_engine(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = methods.ours

    def wrong(scene: methods.Scene, dtype: str) -> methods.Method:
        method = right(scene, dtype)
        return dataclasses.replace(method, keyed=lambda: 1.001 * method.keyed())

    monkeypatch.setattr(methods, "ours", wrong)
    code, rows = step_speed_rows(tmp_path / "step.jsonl", "--batch-sizes", "2", "--dtypes", "fp32")
    assert code == 1
    ours = next(row for row in rows if row["name"] == "ours")
    assert "median" not in ours and ours["reason"].startswith("its error is ")
    assert "| no figure: its error is " in capsys.readouterr().out


def test_peak_memory_is_of_a_process_of_its_own() -> None:
    scene = methods.Scene(setting.MODELS["small"], 2, 2, CPU)
    peaks = [step_speed.peak_memory(scene, "fp32", name, "small") for name in ("ours", "E")]
    assert all(peak is not None and 100 < peak < 3000 for peak in peaks)


def test_the_profile_of_a_step_finds_each_kind_of_operator() -> None:
    x, weight = torch.randn(64, 32), torch.randn(32, 32)

    def run() -> None:
        y = torch.nn.functional.gelu(torch.addmm(torch.zeros(32), x, weight))
        q = y.view(1, 2, 64, 16)
        torch.nn.functional.scaled_dot_product_attention(q, q, q).exp()

    spent = timing.operator_ms(run, 1)
    assert set(spent) == {"linears", "attention", "gelu", "other"} and all(ms >= 0 for ms in spent.values())
    alone = timing.operator_ms(lambda: [torch.nn.functional.gelu(x.repeat(400, 1)) for _ in range(5)], 1)
    assert alone["gelu"] > 0 and alone["linears"] == alone["attention"] == 0
