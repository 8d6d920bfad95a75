"""The CUDA C++ sources on a CPU emulation of the device, and the library's behaviour without a GPU.

The emulation (kernels/cuda/host) runs the kernels' own source thread for thread; CMake builds it with a C++
compiler alone. On a GPU, tests/test_ops.py tests the library itself by the same rule.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acs_fast import ops
from acs_fast.kernels import cuda, reference
from acs_fast.kernels.cuda.binding import Library
from acs_fast.kernels.structures import Column
from acs_fast.testing import Call, Case, excess, make, plain, poisoned_out, tensors, truth

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = (0, -1, 1, 2)  # in order, the last thread first, random

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


@functools.cache
def build() -> Path:
    """The build folder of the emulation and of the arithmetic's test, brought up to date."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    define = ["-DACS_HOST_TESTS=ON", "-DCMAKE_CUDA_COMPILER="]  # no CUDA compiler is looked for
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        for command in (["-S", ROOT, "-B", folder, *define], ["--build", folder, "--parallel", "2"]):
            result = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
    return folder


@functools.cache
def emulated() -> Library:
    return Library(build() / "libacs_fast_cuda_host.so", "cpu")


def schedule(value: int) -> None:
    """The order in which the emulation's threads run."""
    ctypes.CDLL(str(build() / "libacs_fast_cuda_host.so")).acs_emulation_schedule(value)


@pytest.fixture(autouse=True)
def in_order():
    yield
    schedule(0)


def guidance(B: int, C: int, size: int, width: int, depth: int, K: int, **options: Any) -> Case:
    shape = {"B": B, "C": C, "H": size, "W": size, "width": width, "depth": depth, "G": width, "K": K}
    return Case("discriminator_guidance", shape, options)


GUIDANCE = [
    guidance(1, 4, 8, 64, 3, 10),
    guidance(7, 3, 8, 64, 2, 2, objective="nonsaturating", sampler="ddim", radius="eps", learned_range=False),
    guidance(3, 4, 8, 64, 2, 100, objective="learnability"),
    guidance(2, 1, 16, 64, 4, 2, objective="density_ratio", activation="silu", clip=True),
    guidance(1, 32, 8, 64, 2, 1000, activation="silu"),
    guidance(2, 4, 16, 128, 3, 10),
    guidance(1, 9, 16, 64, 3, 10),
    guidance(4, 4, 32, 64, 4, 10),  # three blocks fit: one of them takes two samples
    guidance(1, 4, 32, 128, 3, 10, objective="learnability", activation="silu"),
]
STEPS = [
    *(Case("guided_step", {"B": b, "C": c, "H": h, "W": w}) for b, c, h, w in
      ((1, 1, 8, 8), (7, 3, 5, 7), (3, 4, 32, 32), (2, 32, 8, 8))),
    *(Case("guided_step", {"B": 3, "C": 4, "H": 8, "W": 8},
           {"sampler": sampler, "radius": radius, "learned_range": learned, "clip": clip})
      for sampler in ("ddpm", "ddim") for radius in ("sigma", "eps")
      for learned, clip in ((False, False), (True, True))),
    *(Case("guided_step", {"B": 3, "C": 3, "H": h, "W": 7}, {"gradient": False}) for h in (5, 8)),
]  # fmt: skip
OTHERS = [
    *(Case("philox_normal", {"B": b, "C": c, "H": h, "W": w}) for b, c, h, w in
      ((3, 4, 32, 32), (2, 1, 5, 7))),
    *(Case("to_uint8", {"B": b, "C": c, "H": h, "W": w}) for b, c, h, w in
      ((3, 3, 17, 9), (2, 3, 16, 8), (1, 4, 64, 64), (2, 1, 5, 7))),
]  # fmt: skip


def by_the_rule(case: Case, call: Call) -> float:
    """The excess of the emulated kernel, into NaN-poisoned outputs."""
    out = poisoned_out(getattr(plain, case.op), call)
    got = getattr(emulated(), case.op)(*call.args, **call.kwargs, out=out)
    assert got.data_ptr() == tensors(out)[0].data_ptr(), "the result is not `out`"
    usual = tensors(getattr(plain, case.op)(*call.args, **call.kwargs))
    return max(excess([got], usual, truth(case, call)))


def test_arithmetic() -> None:
    """Philox, rounding, step coefficients, objective gradients and index maps of the headers."""
    result = subprocess.run(
        [build() / "acs_fast_arithmetic_test"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*STEPS, *OTHERS], ids=lambda case: case.id)
def test_error_is_within_the_rule(case: Case, dtype: str) -> None:
    call = make(case, DTYPES[dtype], CPU, seed=len(case.id))
    assert by_the_rule(case, call) <= 1.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", GUIDANCE, ids=lambda case: case.id)
def test_guidance_is_within_the_rule(case: Case, dtype: str) -> None:
    """The whole step; and in fp32 the push alone, of length one, in which nothing hides the gradient.

    There the rule is for SiLU: half precision turns single ReLUs on or off, which is a large error in few
    places, and does so in one implementation or in another.
    """
    call = make(case, DTYPES[dtype], CPU, seed=len(case.id))
    assert by_the_rule(case, call) <= 1.0
    alone = push_alone(call)
    got = emulated().discriminator_guidance(*alone.args, **alone.kwargs).double().flatten(1)
    assert torch.allclose(got.norm(dim=1), torch.ones(len(got), dtype=torch.float64), atol=1e-4)
    assert ((got * truth(case, alone)[0].flatten(1)).sum(dim=1) > 0.9).all()
    assert push_excess(case, alone, DTYPES[dtype]) <= 1.0


def push_excess(case: Case, call: Call, half: torch.dtype) -> float:
    """The excess of unit gradients, with SiLU, beside PyTorch's autograd in half precision."""
    call = Call(call.args, {**call.kwargs, "activation": "silu"})
    got = emulated().discriminator_guidance(*call.args, **call.kwargs)
    x, denoised, *rest = call.args
    usual = plain.discriminator_guidance(x.to(half), denoised.to(half), *rest, **call.kwargs)
    return max(excess([got.to(half)], [usual.float()], truth(case, call)))


def test_second_network_may_weigh_more() -> None:
    """Then the first one's gradient is brought to the larger scale."""
    call = push_alone(make(GUIDANCE[2], torch.float16, CPU))
    call.kwargs["omega"] = 5.0
    assert push_excess(GUIDANCE[2], call, torch.float16) <= 1.0


def push_alone(call: Call) -> Call:
    """The call with fp32 samples and a table whose step is the unit gradient at x0 = x / 2."""
    x, denoised, *middle, table, network = call.args
    table = torch.zeros_like(table)
    table[:, Column.INV_SQRT_ALPHA], table[:, Column.PUSH] = 0.5, 1.0
    return Call((x.float(), denoised.float(), *middle, table, network), call.kwargs)


def test_noise_has_the_bits_of_the_reference() -> None:
    """The words are the same, and Box-Muller differs by ulps only."""
    call = make(Case("philox_normal", {"B": 5, "C": 4, "H": 16, "W": 16}), torch.float32, CPU)
    got, expected = (module.philox_normal(*call.args, **call.kwargs) for module in (emulated(), reference))
    assert (got - expected).abs().max() < 4e-6


@pytest.mark.parametrize("case", [*(GUIDANCE[i] for i in (2, 3, 5, 7)), STEPS[1]], ids=lambda case: case.id)
def test_result_does_not_depend_on_the_order_of_threads(case: Case) -> None:
    """A missing barrier would show here: whole warps run ahead of others, last thread first or at random."""
    call = make(case, torch.bfloat16, CPU)
    results = []
    for value in SCHEDULES:
        schedule(value)
        results.append(getattr(emulated(), case.op)(*call.args, **call.kwargs))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("case", [GUIDANCE[7], STEPS[2]], ids=lambda case: case.id)
def test_sample_does_not_depend_on_the_batch(case: Case) -> None:
    """Also where a block takes several samples, one after the other."""
    call = make(case, torch.bfloat16, CPU)
    op = getattr(emulated(), case.op)
    whole = op(*call.args, **call.kwargs)
    b = len(whole)
    for i in (0, b - 1):
        one = [
            a if not isinstance(a, Tensor) or len(a) not in (b, 2 * b) or a.dtype == torch.float32
            else a[i::b].contiguous()
            for a in call.args
        ]  # fmt: skip
        assert torch.equal(op(*one, **call.kwargs)[0], whole[i])


@pytest.mark.parametrize("case", [GUIDANCE[0], STEPS[2], STEPS[-1]], ids=lambda case: case.id)
def test_out_may_be_x(case: Case) -> None:
    call = make(case, torch.bfloat16, CPU)
    op = getattr(emulated(), case.op)
    expected = op(*call.args, **call.kwargs)
    x = call.args[0]
    assert op(*call.args, **call.kwargs, out=x) is x
    assert torch.equal(x, expected)


def test_no_gradient_no_push() -> None:
    """A discriminator that is blind to its input pushes nothing, and divides nothing by zero."""
    call = make(GUIDANCE[0], torch.bfloat16, CPU)
    network = call.args[-1]
    network.head.weight.zero_()
    call.args[7][:, Column.PUSH] = 100.0  # 100 / the smallest float is infinite
    got = emulated().discriminator_guidance(*call.args, **call.kwargs)
    x, denoised, labels, indices, _, *rest, _ = call.args
    keywords = {name: call.kwargs[name] for name in ("cfg_channels", "clip", "learned_range")}
    assert torch.equal(got, emulated().guided_step(x, denoised, labels, indices, *rest, **keywords))


def test_refusals_name_the_limit() -> None:
    library = emulated()

    def refused(
        case: Case, dtype: torch.dtype = torch.bfloat16, change: Any = lambda args: args, **options: Any
    ) -> str:
        call = make(case, dtype, CPU)
        with pytest.raises(ValueError) as error:
            getattr(library, case.op)(*change(call.args), **{**call.kwargs, **options})
        return str(error.value)

    small = GUIDANCE[0]
    assert "bfloat16 or float16" in refused(small, torch.float32)
    assert "a norm group each" in refused(small, groups=8)
    assert "8x8, 16x16 or 32x32" in refused(guidance(1, 4, 64, 64, 3, 10))
    assert "leave a pixel" in refused(guidance(1, 4, 8, 64, 1, 10))
    assert "bytes of shared memory" in refused(guidance(1, 32, 32, 128, 3, 10))
    assert "takes two networks" in refused(small, objective="learnability")
    unaligned = torch.empty(1 * 4 * 8 * 8 + 1, dtype=torch.bfloat16)[1:].view(1, 4, 8, 8)
    assert "multiple of four elements" in refused(small, out=unaligned)
    step = STEPS[2]
    assert "x is not contiguous" in refused(step, change=lambda a: (a[0].transpose(2, 3), *a[1:]))
    assert "denoised has 5 channels" in refused(
        step, change=lambda a: (a[0], a[1][:, :5].contiguous(), *a[2:])
    )
    assert "denoised has 4 channels" in refused(
        step, change=lambda a: (a[0], a[1][:, :4].contiguous(), *a[2:])
    )
    assert "seed is torch.int32" in refused(step, change=lambda a: (*a[:4], a[4].int(), *a[5:]))


def test_why_not_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "none.so")
    assert cuda.why_not(CPU) == "the CUDA library is not built (nvcc not found at install time)"
    monkeypatch.setattr(cuda, "LIBRARY", build() / "libacs_fast_cuda_host.so")
    assert cuda.why_not(CPU) == "it needs an NVIDIA GPU"
    assert not ops._has("cuda", "adaln") and ops._has("cuda", "guided_step")


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the CUDA library is not built")
def test_library_loads_without_a_driver() -> None:
    """It exports the same functions; without a device a launch answers an error code."""
    library = Library(cuda.LIBRARY, "cpu")
    if torch.cuda.is_available():
        return
    call = make(dataclasses.replace(OTHERS[0], op="philox_normal"), torch.float32, CPU)
    with pytest.raises(RuntimeError, match="acs_philox_normal returned CUDA error"):
        library.philox_normal(*call.args, **call.kwargs)
