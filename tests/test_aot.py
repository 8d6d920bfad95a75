"""The gate over compiled kernels: it holds for the kernels as they are, and it notices what it must."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from acs_fast.testing import MAKERS, Case
from benchmarks import aot_report, roofline
from benchmarks.launches import Machine, MetaMaker

ROOT = Path(__file__).resolve().parent.parent
SOUND = Machine(90, 4, 128, 0, 0, 65536, {"HGMMA": 8}, True)

# a cosine by tl.cos keeps a table in local memory; a product of 16 rows is too small for HGMMA
DEFECTIVE = """
import torch
import triton
import triton.language as tl

from benchmarks import aot_report
from benchmarks.launches import compile_for, recording


@triton.jit
def kernel(x, y, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, 16), tl.arange(0, SIZE)
    a = tl.load(x + i[:, None] * SIZE + j[None, :])
    b = tl.load(x + j[:, None] * SIZE + j[None, :])
    tl.store(y + i[:, None] * SIZE + j[None, :], tl.cos(tl.dot(a, b)))


with recording() as launches:
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    kernel[(3, 2)](x, torch.empty(16, 64, device="meta"), 48, SIZE=64, num_warps=4)
(launch,) = launches
assert launch.grid == (3, 2), launch.grid
assert launch.signature == {"x": "*bf16", "y": "*fp32", "n": "i32", "SIZE": "constexpr"}, launch.signature
assert set(launch.attributes) == {(0,), (1,), (2,)}, launch.attributes  # all three divisible by 16
for fault in aot_report.faults("kernel", compile_for(launch, 90), aot_report.TENSOR_CORE):
    print(fault)
"""


def compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python command in which Triton compiles: tests/conftest.py has it interpret here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_gate_holds_at_the_large_shapes() -> None:
    done = compiled("-m", "benchmarks.aot_report", "--quick")
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == 0, "\n".join(faults) or done.stderr


def test_a_defective_kernel_is_compiled_and_noticed(tmp_path: Path) -> None:
    script = tmp_path / "defective.py"
    script.write_text(DEFECTIVE)
    done = compiled(str(script))
    assert done.returncode == 0, done.stderr
    assert "in local memory" in done.stdout
    assert "multiplies matrices without HGMMA (it has HMMA" in done.stdout


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "keeps 8 bytes in local memory"),
        ({"local_accesses": 2}, "2 STL/LDL"),
        ({"shared": 228 * 1024}, "takes 233472 bytes of shared memory"),
        ({"architecture": 80, "tensor_core": {"HMMA": 8}, "shared": 164 * 1024}, "sm_80 takes 167936 bytes"),
        ({"tensor_core": {"HMMA": 64}}, "without HGMMA (it has HMMA 64)"),
        ({"tensor_core": {}}, "without HGMMA (it has -)"),
    ],
)
def test_the_gate_names_a_fault(change: dict[str, object], fault: str) -> None:
    (found,) = aot_report.faults("kernel", dataclasses.replace(SOUND, **change), aot_report.TENSOR_CORE)
    assert fault in found


@pytest.mark.parametrize("change", [{}, {"half_product": False, "tensor_core": {}}])
def test_the_gate_passes_a_sound_kernel(change: dict[str, object]) -> None:
    assert not list(aot_report.faults("kernel", dataclasses.replace(SOUND, **change), aot_report.TENSOR_CORE))


def report(registers: int, launches: int) -> str:
    """A report of one op and one kernel."""
    machine = dataclasses.replace(SOUND, registers=registers)
    kernels = [aot_report.kernel_row("adaln._kernel", "adaln-B66", "bf16", (264,), machine)]
    operations = [("adaln-B66", "bf16", str(launches), "6", "6", "10", "10", "0", "1")]
    parts = {"triton": "3", "copy": 1.0, "matrix": 1.0, "library": "It is not built here."}
    return aot_report.TEXT.format(
        ops=aot_report.markdown(aot_report.OP_COLUMNS, operations),
        kernels=aot_report.markdown(aot_report.KERNEL_COLUMNS, kernels),
        **parts,
    )


def test_a_report_is_compared_without_the_compilers_own_figures() -> None:
    assert not list(aot_report.differences(report(128, 1), report(140, 1)))
    assert len(list(aot_report.differences(report(128, 1), report(128, 2)))) == 2


def test_required_bytes_and_launches_of_a_case_counted_by_hand() -> None:
    case = Case("pred_xstart", {"B": 2, "C": 4, "H": 8, "W": 8})
    call = MAKERS[case.op](MetaMaker(torch.bfloat16), **case.shape)
    result = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16, device="meta")
    half = 2 * 8 * 8 * 2  # bytes of one channel of both samples
    expected = 4 * half + (4 + 3) * half + 4 * half + 10 * 4 + 8  # x, cond and guided null, out, row, step
    assert roofline.required_bytes(case, call, result) == expected
    # index_select, to bf16, cond - null, *, +, cat, * x, * eps, -
    assert roofline.eager_launches(case, call) == (9, 9)
