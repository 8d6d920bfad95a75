"""The Triton kernels beyond the common rule: bits of the noise, places in memory, the push, and refusals."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from acs_fast import ops  # noqa: E402
from acs_fast.kernels import reference  # noqa: E402
from acs_fast.kernels import triton as backend  # noqa: E402
from acs_fast.kernels.reference.noise import philox_4x32 as reference_words  # noqa: E402
from acs_fast.kernels.triton.device import noise_key, normal_at, philox_4x32  # noqa: E402
from acs_fast.testing import Case, make, poisoned_out, tensors  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if reason := backend.why_not(DEVICE):
    pytest.skip(reason, allow_module_level=True)

MASK = 0xFFFFFFFF
IMAGE = {"B": 3, "C": 4, "H": 16, "W": 16}
SMALL = {
    "adaln": Case("adaln", {"B": 2, "T": 4, "D": 32}),
    "gated_residual_adaln": Case("gated_residual_adaln", {"B": 2, "T": 4, "D": 32}),
    "philox_normal": Case("philox_normal", {"B": 2, "C": 1, "H": 4, "W": 4}),
    "pred_xstart": Case("pred_xstart", {"B": 2, "C": 2, "H": 4, "W": 4}),
    "guided_step": Case("guided_step", {"B": 2, "C": 2, "H": 4, "W": 4}),
    "group_norm_silu": Case("group_norm_silu", {"B": 2, "C": 4, "H": 4, "W": 4, "G": 2}),
    "to_uint8": Case("to_uint8", {"B": 2, "C": 3, "H": 4, "W": 4}),
}


@triton.jit
def words_kernel(counter, key, out, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < N
    c0, c1, c2, c3 = (
        tl.load(counter + i, mask=mask, other=0).to(tl.uint32),
        tl.load(counter + N + i, mask=mask, other=0).to(tl.uint32),
        tl.load(counter + 2 * N + i, mask=mask, other=0).to(tl.uint32),
        tl.load(counter + 3 * N + i, mask=mask, other=0).to(tl.uint32),
    )
    k0 = tl.load(key + i, mask=mask, other=0).to(tl.uint32)
    k1 = tl.load(key + N + i, mask=mask, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out + 4 * i, w0.to(tl.int64), mask=mask)
    tl.store(out + 4 * i + 1, w1.to(tl.int64), mask=mask)
    tl.store(out + 4 * i + 2, w2.to(tl.int64), mask=mask)
    tl.store(out + 4 * i + 3, w3.to(tl.int64), mask=mask)


@triton.jit
def normal_at_kernel(class_labels, indices, seed, step, offsets, out, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.load(offsets + i, mask=i < N, other=0)
    z = normal_at(at, noise_key(class_labels, indices, seed, step, tl.program_id(0)))
    tl.store(out + tl.program_id(0) * N + i, z, mask=i < N)


def guided(**options: object) -> tuple[list[Tensor], dict]:
    """Arguments of a guided step of three samples in fp32."""
    call = make(Case("guided_step", IMAGE, options), torch.float32, DEVICE)
    return list(call.args), call.kwargs


def module_of(op: str):
    return importlib.import_module(f"acs_fast.kernels.triton.{op}")


def test_philox_words_are_the_reference_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(1 << 32, (6, 100), generator=generator)
    values[:, 0], values[:, 1] = 0, MASK
    values = values.to(DEVICE)
    out = torch.empty((100, 4), dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](values[:4].contiguous(), values[4:].contiguous(), out, 100, BLOCK=128)
    expected = reference_words(tuple(values[:4]), tuple(values[4:]))
    assert torch.equal(out, expected)
    assert [f"{word:08x}" for word in out[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 5, (1 << 63) - 1, -3])
def test_normals_are_within_a_few_ulp_of_float64(seed: int) -> None:
    key = [torch.tensor(t, device=DEVICE) for t in ([3, 999], [0, (1 << 31) + 11], [seed], [49])]
    got = backend.philox_normal(*key, shape=(4, 32, 32))
    true = reference.philox_normal(*key, shape=(4, 32, 32), out=torch.empty_like(got, dtype=torch.float64))
    ulp = torch.finfo(torch.float32).eps * true.abs()
    assert ((got.double() - true).abs() <= 6.0 * ulp).all()


def test_normals_of_scattered_elements_are_those_of_the_image() -> None:
    key = [torch.tensor(t, device=DEVICE) for t in ([3, 9], [5, 6], [11], [2])]
    whole = backend.philox_normal(*key, shape=(5, 7, 9)).flatten(1)
    offsets = torch.randperm(315, generator=torch.Generator().manual_seed(0))[:50].to(DEVICE)
    out = torch.empty((2, 50), device=DEVICE)
    normal_at_kernel[(2,)](*key, offsets, out, 50, BLOCK=64)
    torch.testing.assert_close(out, whole[:, offsets], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("radius", ["sigma", "eps"])
def test_a_guided_step_in_place_is_the_step(radius: str) -> None:
    args, keywords = guided(radius=radius)
    expected = backend.guided_step(*args, **keywords)
    assert backend.guided_step(*args, **keywords, out=args[0]) is args[0]
    assert torch.equal(args[0], expected)


@pytest.mark.parametrize("radius", ["sigma", "eps"])
def test_a_sample_does_not_depend_on_its_batch(radius: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, keywords = guided(radius=radius)
    x, denoised, labels, indices, seed, step, table, g = args
    batch = backend.guided_step(*args, **keywords)
    one = denoised[[1, 4]]
    monkeypatch.setattr(module_of("guided_step"), "MANY_PROGRAMS", 1)  # the large block of large batches
    alone = backend.guided_step(x[1:2], one, labels[1:2], indices[1:2], seed, step, table, g[1:2], **keywords)
    assert torch.equal(batch[1:2], alone)


def test_a_gradient_of_zeros_pushes_nothing() -> None:
    args, keywords = guided()
    without = backend.guided_step(*args[:-1], None, **keywords)
    args[-1][1:].zero_()
    pushed = backend.guided_step(*args, **keywords)
    torch.testing.assert_close(pushed[1:], without[1:], rtol=1e-6, atol=1e-6)
    assert (pushed[0] - without[0]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_of_any_size_push_alike(scale: float) -> None:
    args, keywords = guided(radius="eps")
    expected = backend.guided_step(*args, **keywords)
    args[-1].div_(args[-1].abs().max()).mul_(scale)
    torch.testing.assert_close(backend.guided_step(*args, **keywords), expected, rtol=1e-5, atol=1e-5)


def test_the_step_counter_on_the_device_chooses_row_and_noise() -> None:
    args, keywords = guided()
    step = args[5]
    rows = {}
    for value in (9, 3):
        step.fill_(value)
        rows[value] = backend.guided_step(*args, **keywords)
        torch.testing.assert_close(
            rows[value], reference.guided_step(*args, **keywords), rtol=1e-5, atol=1e-5
        )
    assert (rows[9] - rows[3]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["adaln", "gated_residual_adaln"])
def test_rows_do_not_depend_on_the_tokens_of_a_program(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(Case(op, {"B": 3, "T": 5, "D": 40}), dtype, DEVICE)
    results = []
    for count in (1, 4):
        monkeypatch.setattr(module_of(op), "tokens_per_program", lambda batch, tokens, count=count: count)
        out = poisoned_out(getattr(reference, op), call)
        results.append(tensors(getattr(backend, op)(*call.args, **call.kwargs, out=out)))
    for one, four in zip(*results, strict=True):
        assert torch.equal(one, four)


def test_a_gated_residual_in_place_is_the_residual() -> None:
    call = make(Case("gated_residual_adaln", {"B": 3, "T": 5, "D": 40}), torch.bfloat16, DEVICE)
    residual, normed = backend.gated_residual_adaln(*call.args)
    x, second = call.args[0], torch.empty_like(normed)
    backend.gated_residual_adaln(*call.args, out=(x, second))
    assert torch.equal(x, residual) and torch.equal(second, normed)
    alone = backend.adaln(residual, *call.args[3:])  # the norm sees the residual as it was stored
    torch.testing.assert_close(normed, alone, rtol=2**-8, atol=0.0)


@pytest.mark.parametrize(("channels", "size", "groups"), [(4, 96, 2), (2, 128, 1), (3, 5, 1)])
def test_group_norm_holds_far_from_zero(channels: int, size: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = 1000.0 + torch.randn((1, channels, size, size), generator=generator).to(DEVICE)
    weight, bias = torch.rand(2, channels, generator=generator).to(DEVICE)
    got = backend.group_norm_silu(x, weight, bias, groups=groups, out=torch.full_like(x, float("nan")))
    true = reference.group_norm_silu(x.double(), weight.double(), bias.double(), groups=groups)
    assert (got.double() - true).abs().max() < 5e-4  # x's own rounding, 6e-5, times a few


def test_bytes_are_the_reference_at_every_level_and_tie() -> None:
    level = (
        torch.arange(-20.0, 531.0, device=DEVICE) / 2.0
    )  # every byte, every half between, beyond both ends
    x = (level / 127.5 - 1.0).repeat(3)[: 3 * 550].view(1, 3, 22, 25)
    assert torch.equal(backend.to_uint8(x), reference.to_uint8(x))
    halves = torch.tensor([0.5 / 127.5 - 1.0, 1.5 / 127.5 - 1.0, 1.0, -1.0, 3.0], device=DEVICE)
    assert torch.equal(backend.to_uint8(halves.view(1, 1, 1, 5)), reference.to_uint8(halves.view(1, 1, 1, 5)))


ARGUMENTS = {
    "adaln": ("x", "rows", "out"),
    "gated_residual_adaln": ("x", "y", "rows"),
    "philox_normal": ("class_labels", "indices", "out"),
    "pred_xstart": ("x", "denoised", "table", "out"),
    "guided_step": ("x", "denoised", "class_labels", "indices", "table", "gradient", "out"),
    "group_norm_silu": ("x", "weight", "bias", "out"),
    "to_uint8": ("x", "out"),
}


def named(op: str) -> tuple[Callable[..., object], dict[str, object]]:
    """An op and its arguments by name, `out` included."""
    call = make(SMALL[op], torch.float32, DEVICE)
    function = getattr(backend, op)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    out = poisoned_out(getattr(reference, op), call)
    return function, {**dict(zip(names, call.args, strict=True)), **call.kwargs, "out": out}


def strided(t: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack((t, t), dim=-1)[..., 0]


@pytest.mark.parametrize(
    ("op", "argument"), [(op, argument) for op, arguments in ARGUMENTS.items() for argument in arguments]
)
def test_a_strided_tensor_is_refused_by_name(op: str, argument: str) -> None:
    function, arguments = named(op)
    arguments[argument] = strided(arguments[argument])
    with pytest.raises(ValueError, match=rf"^{op}: {argument} must be contiguous"):
        function(**arguments)


@pytest.mark.parametrize("argument", ["shift", "scale"])
def test_a_modulation_row_with_gaps_is_refused(argument: str) -> None:
    function, arguments = named("adaln")
    arguments[argument] = strided(arguments[argument])
    with pytest.raises(ValueError, match=rf"^adaln: {argument} must be contiguous"):
        function(**arguments)


@pytest.mark.parametrize(
    ("op", "argument"),
    [("guided_step", "denoised"), ("guided_step", "gradient"), ("pred_xstart", "denoised")],
)
def test_a_wrong_shape_is_refused_by_name(op: str, argument: str) -> None:
    function, arguments = named(op)
    arguments[argument] = arguments[argument][:-1]
    with pytest.raises(ValueError, match=rf"^{op}: {argument} must have shape"):
        function(**arguments)


def test_float64_is_refused() -> None:
    function, arguments = named("to_uint8")
    arguments["x"] = arguments["x"].double()
    with pytest.raises(ValueError, match=r"^to_uint8: x must be float32, bfloat16 or float16"):
        function(**arguments)


def test_other_devices_are_refused_with_a_reason() -> None:
    assert "NVIDIA GPU" in backend.why_not(torch.device("meta"))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("place", ["x", "denoised", "gradient"])
def test_a_nan_is_passed_on(place: str, clip: bool) -> None:
    case = Case("guided_step", {"B": 3, "C": 4, "H": 8, "W": 8}, {"clip": clip})
    call = make(case, torch.float32, DEVICE)
    {"x": call.args[0], "denoised": call.args[1], "gradient": call.args[7]}[place][1, 2, 3, 4] = float("nan")
    got = ops.select({"guided_step": "triton"}, DEVICE).guided_step(*call.args, **call.kwargs)
    assert got[1, 2, 3, 4].isnan() and got[[0, 2]].isfinite().all()
