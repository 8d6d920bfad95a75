"""The lean denoiser against the plain DiT: same numbers by the error rule, with tables, slots and padding."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from acs_fast import attention, environment, ops
from acs_fast.config import InputError
from acs_fast.denoiser import Denoiser, Table
from acs_fast.estimate.flop import denoiser_flops
from acs_fast.linear import Linear, can_pack
from acs_fast.models.dit import DiT, DiTConfig
from tests.test_sampler import randomise

CPU = torch.device("cpu")
SHAPE = DiTConfig(8, 2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=5)
TIMESTEPS, LABELS = [0, 333, 999], [4, 0, 2]


def small(dtype: torch.dtype) -> DiT:
    """A model with random weights everywhere, also where training starts from zeros."""
    return randomise(DiT(SHAPE), 0.15, seed=1).to(dtype)


def lean(model: DiT, backend: str = "reference", kernel: str = "math", **settings: Any) -> Denoiser:
    """The lean denoiser of a copy of the model."""
    defaults = {"batch_size": 3, "slots": 3, "with_variance": True, "pack": True}
    return Denoiser(
        copy.deepcopy(model),
        ops.select(backend, CPU),
        attention.Attention(kernel),
        timesteps=TIMESTEPS,
        **{**defaults, **settings},
    )


def rows(denoiser: Denoiser, labels: list[int]) -> torch.Tensor:
    """The table rows of a batch: its classes', then the null label's."""
    return torch.tensor([*denoiser.table.hold(labels, []), *[denoiser.table.slots] * len(labels)])


def plainly(model: DiT, x: torch.Tensor, step: int, labels: list[int]) -> torch.Tensor:
    """Both branches by the module."""
    both = torch.tensor([*labels, *[model.null_label] * len(labels)])
    timesteps = torch.full_like(both, TIMESTEPS[step])
    return model(torch.cat((x, x)).to(model.pos_embed.dtype), timesteps, both)


def samples(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("kernel", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_it_is_the_plain_model_by_the_error_rule(step, dtype, kernel, pack) -> None:
    model, x = small(dtype), samples()
    truth = plainly(copy.deepcopy(model).double(), x.double(), step, LABELS)
    denoiser = lean(model, kernel=kernel, pack=pack)
    denoiser.denoised.fill_(torch.nan)
    error = (denoiser(x, step, rows(denoiser, LABELS)).double() - truth).abs().max()
    plain = (plainly(model, x, step, LABELS).double() - truth).abs().max()
    assert error <= 2 * plain + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.skipif(ops.why_not("adaln", "triton", CPU) is not None, reason="Triton is not installed")
def test_it_runs_on_tritons_ops() -> None:
    model, x = small(torch.float32), samples()
    by_triton, by_reference = lean(model, "triton"), lean(model)
    got = by_triton(x, 1, rows(by_triton, LABELS))
    torch.testing.assert_close(got, by_reference(x, 1, rows(by_reference, LABELS)), rtol=0, atol=2e-5)


def test_in_float64_it_is_the_plain_model_to_the_last_digits() -> None:
    model, x = small(torch.float64), samples().double()
    denoiser = lean(model)
    got = denoiser(x, 1, rows(denoiser, LABELS))
    torch.testing.assert_close(got, plainly(model, x, 1, LABELS), rtol=0, atol=1e-11)


def test_it_has_the_constants_of_diffusers_where_the_model_has_them() -> None:
    shape = dataclasses.replace(SHAPE, mlp_norm_eps=1e-2, downscale_freq_shift=1)
    model, x = randomise(DiT(shape), 0.15, seed=1).double(), samples().double()
    denoiser = lean(model)
    got = denoiser(x, 1, rows(denoiser, LABELS))
    torch.testing.assert_close(got, plainly(model, x, 1, LABELS), rtol=0, atol=1e-11)
    official = small(torch.float64)
    assert (plainly(official, x, 1, LABELS) - got).abs().max() > 1e-3  # so the constants matter here


def test_without_the_variance_half_the_other_is_the_same() -> None:
    model, x = small(torch.float32), samples()
    whole, half = lean(model), lean(model, with_variance=False)
    assert half.denoised.shape == (6, 4, 8, 8)
    expected = whole(x, 1, rows(whole, LABELS))[:, :4]
    torch.testing.assert_close(half(x, 1, rows(half, LABELS)), expected, rtol=0, atol=1e-6)


def test_a_small_table_is_filled_again_and_with_what_comes_next() -> None:
    model = small(torch.float64)
    table, whole = Table(model, TIMESTEPS, 2), Table(model, TIMESTEPS, 5)
    slots = dict(zip(range(5), whole.hold(range(5), []), strict=True))
    for labels in ([0], [1], [3, 4], [0, 3], [2]):
        for label, slot in zip(labels, table.hold(labels, list(range(labels[0], 5))), strict=True):
            assert torch.equal(table.values[:, slot], whole.values[:, slots[label]])
        assert torch.equal(table.values[:, table.slots], whole.values[:, whole.slots])  # the null label
    table.hold([0], [0, 1, 2])
    assert table.labels == (0, 1)  # the next class is there already
    with pytest.raises(ValueError, match="3 classes do not fit a table of 2"):
        table.hold([0, 1, 2], [])


def test_the_table_is_that_of_the_plain_embedders() -> None:
    model = small(torch.float64)
    table = Table(model, TIMESTEPS, 1)
    (slot,) = table.hold([3], [])
    for step, t in enumerate(TIMESTEPS):
        c = model.t_embedder(torch.tensor([t])) + model.y_embedder(torch.tensor([3]))
        layers = [*(block.adaLN_modulation for block in model.blocks), model.final_layer.adaLN_modulation]
        expected = torch.cat([layer(c)[0] for layer in layers])
        torch.testing.assert_close(table.values[step, slot], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_linear_is_packed_where_it_can_be_and_the_same(dtype, gelu) -> None:
    module = randomise(torch.nn.Linear(24, 40), 0.3, seed=2).to(dtype)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    linear = Linear(module, 7, gelu)
    assert linear.packed == can_pack(module.weight) and linear.packed == (dtype != torch.float64)
    y = torch.nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
    truth = torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
    plain = module(x)
    plain = torch.nn.functional.gelu(plain, approximate="tanh") if gelu else plain
    error = (linear(x).double() - truth).abs().max()
    bound = 2 * (plain.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert error <= bound


def test_packing_moves_the_weights_out_of_the_model() -> None:
    model = small(torch.float32)
    before = sum(p.numel() for p in model.parameters())
    Denoiser(
        model, ops.select("reference", CPU), attention.Attention("math"),
        timesteps=TIMESTEPS, batch_size=1, slots=1, with_variance=True, pack=True,
    )  # fmt: skip
    block = 12 * SHAPE.hidden_size**2 + 9 * SHAPE.hidden_size  # qkv, proj, fc1, fc2 with their biases
    assert before - sum(p.numel() for p in model.parameters()) == SHAPE.depth * block


def test_attention_kernels_agree_with_the_formula() -> None:
    qkv = torch.randn(2, 16, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    expected = (weights @ v).transpose(1, 2).reshape(2, 16, 16)
    for name in ("math", "flash"):
        torch.testing.assert_close(attention.Attention(name)(qkv), expected)


def test_on_a_cpu_attention_needs_no_measurement_and_says_what_refused() -> None:
    chosen = attention.choose("auto", (2, 16, 2, 8), torch.float32, CPU)
    assert (chosen.name, chosen.seconds) == ("flash", {})  # a measured choice could change between runs
    assert set(chosen.refusals) >= {"cudnn", "efficient", "xformers"}
    assert attention.choose("math", (2, 16, 2, 8), torch.float32, CPU).name == "math"


def test_on_a_gpu_the_first_of_the_fastest_is_taken_unless_it_is_wrong(monkeypatch) -> None:
    def call(self: attention.Attention, qkv: torch.Tensor) -> torch.Tensor:
        if self.name == "efficient":
            raise RuntimeError("No available kernel. Aborting execution.")
        return torch.zeros(1) if self.name != "xformers" else torch.ones(1)  # xformers is wrong

    seconds = {"cudnn": 1.2e-3, "flash": 1.05e-3, "math": 1.0e-3}
    monkeypatch.setattr(attention.Attention, "__call__", call)
    monkeypatch.setattr(attention, "_median_seconds", lambda call, device: seconds[call.func.name])
    monkeypatch.setattr(attention, "_is_measured", lambda device: True)
    chosen = attention.choose("auto", (2, 16, 2, 8), torch.float32, CPU)
    assert chosen.name == "flash" and chosen.seconds == seconds
    assert chosen.refusals["efficient"] == "it takes no such device, dtype or head size"
    assert "off by" in chosen.refusals["xformers"]


@pytest.mark.parametrize("name", ["cudnn", "xformers"])
def test_a_named_kernel_that_cannot_run_is_refused_with_the_reason(name) -> None:
    with pytest.raises(InputError, match=f"attention {name} cannot run here: .+; use auto"):
        attention.choose(name, (2, 16, 2, 8), torch.float32, CPU)


BUILT_FOR_ANOTHER = "undefined symbol: _ZN3c104cuda"
NO_OPERATOR = (
    "def memory_efficient_attention(q, k, v): "
    "raise NotImplementedError('No operator found for `memory_efficient_attention_forward` with inputs:')"
)
XFORMERS = {
    "whole": "def memory_efficient_attention(q, k, v): return q",
    "another torch": f"raise ImportError({BUILT_FOR_ANOTHER!r})",
    "no library": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "no operator": NO_OPERATOR,
    "no extension": NO_OPERATOR,  # the wheel 0.0.35 beside torch 2.13 on a CPU: it imports, with a warning
}
EXTENSION = (
    "xFormers can't load C++/CUDA extensions. xFormers was built for:\n  PyTorch 2.10.0 (you have 2.13.0)"
)


@pytest.mark.parametrize("kind", XFORMERS)
def test_what_refuses_xformers_is_told_apart(kind, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "xformers" / "ops").mkdir(parents=True)
    (tmp_path / "xformers" / "__init__.py").touch()
    (tmp_path / "xformers" / "ops" / "__init__.py").write_text(XFORMERS[kind])
    failure = f"ImportError({EXTENSION!r})" if kind == "no extension" else "None"
    (tmp_path / "xformers" / "_cpp_lib.py").write_text(f"_cpp_library_load_exception = {failure}")
    info = tmp_path / "xformers-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 9.8.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    refusals = attention.choose("auto", (2, 16, 2, 8), torch.float32, CPU).refusals
    beside = f"xformers 9.8.7 cannot be loaded beside torch {torch.__version__}"
    expected = {
        "whole": None,
        "another torch": f"{beside} (ImportError: {BUILT_FOR_ANOTHER}); install the release that was built "
        "for this torch",
        "no library": f"{beside} (OSError: libcudart.so.12: cannot open shared object file); install the "
        "release that was built for this torch",
        "no operator": "it takes no such device, dtype or head size",
        "no extension": f"{beside} (ImportError: PyTorch 2.10.0 (you have 2.13.0)); install the release that "
        "was built for this torch",
    }
    assert refusals.get("xformers") == expected[kind]
    for name in [n for n in sys.modules if n.split(".")[0] == "xformers"]:
        del sys.modules[name]


def test_env_lists_the_attention_kernels_with_their_reasons() -> None:
    text = environment.report()
    assert "attention flash: yes" in text and "attention math: yes" in text
    assert "attention xformers: " in text
    assert "attention cudnn: no (it takes no such device, dtype or head size)" in text


def test_without_the_null_branch_half_is_computed_and_its_place_holds_the_other() -> None:
    shape = DiTConfig(8, 2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    found = {}
    for with_null in (True, False):
        model = randomise(DiT(shape), 0.2, seed=3)
        denoiser = Denoiser(
            model, ops.select("reference", CPU), attention.Attention("math"), timesteps=[500], batch_size=2,
            slots=3, with_variance=True, pack=False, with_null=with_null,
        )  # fmt: skip
        rows = torch.tensor([*denoiser.table.hold([1, 2], [0]), 3, 3])
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            found[with_null] = denoiser(x, 0, rows).clone()
        assert counter.get_total_flops() == 2 * denoiser_flops(shape, 4.0 if with_null else 1.0)
    both, one = found[True], found[False]
    torch.testing.assert_close(one, torch.cat((both[:2], both[:2])))
    assert not torch.allclose(both[2:], both[:2], atol=1e-3)
