"""Compiles every kernel at its production shapes for GPUs that are not here, and reads the machine code.

python -m benchmarks.aot_report            write benchmarks/results/aot.md
python -m benchmarks.aot_report --check    compare with that file instead, all but the compiler's own figures
python -m benchmarks.aot_report --quick    the largest shape of each op on sm_90 only; print, write nothing

Exits 1 where a kernel spills, takes too much shared memory or multiplies bf16 matrices without tensor cores.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import acs_fast.kernels.triton as triton_ops
from acs_fast.kernels import reference
from acs_fast.kernels.structures import guidance_workspace
from acs_fast.testing import MAKERS, Call, Case, plain
from benchmarks import roofline
from benchmarks.launches import (
    ARCHITECTURES,
    SHARED_LIMIT,
    Launch,
    Machine,
    MetaMaker,
    compile_for,
    library_kernels,
    recording,
)

RESULT = Path(__file__).parent / "results" / "aot.md"
LIBRARY = Path(__file__).parent.parent / "kernels" / "cuda" / "libacs_fast_cuda.so"
BATCHES = (1, 66)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

GUIDANCE_LAUNCHES = 8  # at most, of a whole guided step with a ConvNet-3
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}  # what bf16 products must compile to
LIBRARY_TENSOR_CORE = {
    80: ("HMMA",),
    90: ("HGMMA", "HMMA"),
    100: ("UTCHMMA", "HMMA"),
}  # hand-written: mma.sync too
LIBRARY_PRODUCTS = "discriminator"  # in the names of the CUDA library's kernels with matrix products
MATRIX_OPS = ("conv_norm_act_pool", "conv_norm_act_pool_backward_input")
MATRIX_CHANNELS = 16  # input channels from which a convolution must be a matrix product


@dataclass(frozen=True)
class Recorded:
    """An op at one shape and dtype, with the launches of its Triton version."""

    case: Case
    dtype: torch.dtype
    call: Call
    result: Any
    launches: list[Launch]


def record(case: Case, dtype: torch.dtype) -> Recorded:
    """Call the Triton op on tensors without data, given `out` and workspace, and record what it launches."""
    call = MAKERS[case.op](MetaMaker(dtype), **case.shape, **case.options)
    result = getattr(reference, case.op)(*call.args, **call.kwargs)
    kwargs = dict(call.kwargs)
    if case.op == "discriminator_guidance":
        kwargs["workspace"] = guidance_workspace(call.args[0], call.args[-1], kwargs["groups"])
    with recording() as launches:
        getattr(triton_ops, case.op)(*call.args, **kwargs, out=result)
    return Recorded(case, dtype, call, result, launches)


def production() -> list[Case]:
    """Every op of the Triton backend at every production shape."""
    found = {case.id: case for batch in BATCHES for case in roofline.production(batch)}
    return [case for case in found.values() if hasattr(triton_ops, case.op)]


def largest(cases: list[Case]) -> list[Case]:
    """One case of each op."""
    by_size = sorted(cases, key=lambda case: math.prod(case.shape.values()))
    return list({case.op: case for case in by_size}.values())


# --- compilation -----------------------------------------------------------------------------------------

Key = tuple[str, str, int]  # source, options, architecture


def key(launch: Launch, architecture: int) -> Key:
    """What tells compiled kernels apart."""
    return launch.source.hash(), str(sorted(launch.options.items())), architecture


def compile_all(recorded: list[Recorded], architectures: Sequence[int]) -> dict[Key, Machine]:
    """Every distinct kernel for every architecture, on all cores."""
    jobs = {key(launch, a): (launch, a) for r in recorded for launch in r.launches for a in architectures}
    global _jobs  # launches cannot be pickled; forked workers inherit them
    _jobs = list(jobs.values())
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(_compile, range(len(jobs)), chunksize=1), strict=True))


def _compile(index: int) -> Machine:
    launch, architecture = _jobs[index]
    return compile_for(launch, architecture)


_jobs: list[tuple[Launch, int]] = []


# --- the gate --------------------------------------------------------------------------------------------


def faults(name: str, machine: Machine, tensor_core: dict[int, tuple[str, ...]]) -> Iterator[str]:
    """What is wrong with a kernel's machine code, a sentence each."""
    where = f"{name} on sm_{machine.architecture}"
    if machine.local:
        yield f"{where} keeps {machine.stack} bytes in local memory ({machine.local_accesses} STL/LDL)"
    if machine.shared > SHARED_LIMIT[machine.architecture]:
        yield f"{where} takes {machine.shared} bytes of shared memory, more than a block can have"
    wanted = tensor_core[machine.architecture]
    if machine.half_product and not set(wanted) & set(machine.tensor_core):
        yield f"{where} multiplies matrices without {' or '.join(wanted)} (it has {instructions(machine)})"


def op_faults(recorded: Recorded, products: bool) -> Iterator[str]:
    """What is wrong with an op's launches; `products`: whether one of them multiplies bf16 matrices."""
    case = recorded.case
    if case.op in MATRIX_OPS and case.shape["C_in"] >= MATRIX_CHANNELS and not products:
        yield f"{case.id} does its convolution without a matrix product"
    if case.op == "discriminator_guidance" and len(recorded.launches) > GUIDANCE_LAUNCHES:
        yield f"{case.id} takes {len(recorded.launches)} launches, more than {GUIDANCE_LAUNCHES}"
    if not recorded.launches:
        yield f"{case.id} launches nothing"


# --- tables ----------------------------------------------------------------------------------------------

KERNEL_COLUMNS = (
    "kernel",
    "first at",
    "type",
    "grid",
    "sm",
    "warps",
    "registers",
    "stack",
    "STL/LDL",
    "shared bytes",
    "tensor core",
)
COMPILERS_OWN = (
    "registers",
    "shared bytes",
    "tensor core",
)  # columns that another compiler version may change
OP_COLUMNS = (
    "op and shape",
    "type",
    "launches",
    "eager",
    "eager, noise as one",
    "bytes required",
    "bytes moved",
    "GFLOP",
    "predicted us",
)


def instructions(machine: Machine) -> str:
    """Tensor-core instructions and how often the code holds each."""
    return ", ".join(f"{name} {n}" for name, n in machine.tensor_core.items()) or "-"


def kernel_row(name: str, where: str, dtype: str, grid: Sequence[int], machine: Machine) -> tuple[str, ...]:
    """A row of the table of kernels."""
    shape = " x ".join(str(n) for n in grid) or "-"
    warps = "-" if machine.warps is None else str(machine.warps)
    figures = (machine.registers, machine.stack, machine.local_accesses, machine.shared)
    return (
        f"`{name}`",
        where,
        dtype,
        shape,
        str(machine.architecture),
        warps,
        *(str(n) for n in figures),
        instructions(machine),
    )


def op_row(recorded: Recorded) -> tuple[str, ...]:
    """A row of the table of ops."""
    case, call = recorded.case, recorded.call
    required = roofline.required_bytes(case, call, recorded.result)
    work = roofline.flop(getattr(plain, case.op), call)
    seconds = roofline.roofline_seconds(required, work, roofline.COPY_RATE, roofline.MATRIX_RATE)
    counts = (len(recorded.launches), *roofline.eager_launches(case, call))
    return (
        case.id,
        NAMES[recorded.dtype],
        *(str(n) for n in counts),
        str(required),
        str(roofline.moved_bytes(recorded.launches)),
        f"{work / 1e9:.3g}",
        f"{seconds * 1e6:.3g}",
    )


def markdown(columns: Sequence[str], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparable(text: str) -> list[str]:
    """The table rows of a report without the columns that are the compiler's own."""
    rows, skip = [], []
    for line in (line for line in text.splitlines() if line.startswith("|")):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] in (KERNEL_COLUMNS[0], OP_COLUMNS[0]):
            skip = [cells.index(name) for name in COMPILERS_OWN if name in cells]
        rows.append(" | ".join(cell for i, cell in enumerate(cells) if i not in skip))
    return rows


TEXT = """# Kernels compiled ahead of time

Written by `python -m benchmarks.aot_report` with Triton {triton}; no GPU took part, no time is measured.

- launches: of the Triton op. eager: ATen calls with a kernel that the same op takes in eager PyTorch, each
  counted once; "noise as one" counts the keyed noise, which is most of them, as a single call.
- bytes required: inputs read once and outputs written once. Bytes moved: what the launches move to and from
  memory, intermediate tensors included; what the L2 still holds when it is read again counts once.
- predicted us: the longer of the required bytes at {copy:.1f} TB/s and of the products at {matrix:.0f}
  TFLOP/s, rates of one H200. It is a lower bound.

## Ops

{ops}

## Triton kernels

A kernel stands at the first shape that needs it compiled anew.

{kernels}

## CUDA library

Shared bytes are the static ones; sm_90 and later reserve 1,024.

{library}
"""


def report(cases: list[Case], architectures: Sequence[int]) -> tuple[str, list[str]]:
    """The report, and what the gate found wrong."""
    recorded = [record(case, dtype) for case in cases for dtype in roofline.dtypes(case.op)]
    machines = compile_all(recorded, architectures)
    rows: dict[Key, tuple[str, ...]] = {}
    wrong: list[str] = []
    for one in recorded:
        compiled = [machines[key(launch, a)] for launch in one.launches for a in architectures]
        wrong += op_faults(one, any(m.half_product for m in compiled) or one.dtype == torch.float32)
        for launch in one.launches:
            for a in architectures:
                if (k := key(launch, a)) not in rows:
                    name = f"{launch.name} ({one.case.id}, {NAMES[one.dtype]})"
                    wrong += faults(name, machines[k], TENSOR_CORE)
                    where = (one.case.id, NAMES[one.dtype], launch.grid, machines[k])
                    rows[k] = kernel_row(launch.name, *where)
    library = []
    if LIBRARY.exists():
        for name, found in sorted(library_kernels(LIBRARY, LIBRARY_PRODUCTS).items()):
            for machine in found:
                wrong += faults(name, machine, LIBRARY_TENSOR_CORE)
                library.append(kernel_row(name, "-", "-", (), machine))
    text = TEXT.format(
        triton=triton.__version__,
        copy=roofline.COPY_RATE / 1e12,
        matrix=roofline.MATRIX_RATE / 1e12,
        ops=markdown(OP_COLUMNS, [op_row(one) for one in recorded]),
        kernels=markdown(KERNEL_COLUMNS, list(rows.values())),
        library=markdown(KERNEL_COLUMNS, library) if library else "It is not built here.",
    )
    return text, wrong


def main() -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the checked-in report")
    parser.add_argument("--quick", action="store_true", help="the largest shapes on sm_90, print only")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("aot_report compiles kernels: run it without TRITON_INTERPRET")
    if arguments.quick:
        text, wrong = report(largest(production()), (90,))
    else:
        text, wrong = report(production(), ARCHITECTURES)
    if arguments.check:
        wrong += differences(RESULT.read_text(), text)
    else:
        print(text)
        if not arguments.quick:
            RESULT.write_text(text)
    for sentence in wrong:
        print(f"FAILED: {sentence}")
    print(f"{len(wrong)} faults")
    return 1 if wrong else 0


def differences(old: str, new: str) -> Iterator[str]:
    """Where a report differs from the checked-in one; the library only where both have it."""
    parts = zip(old.split("## CUDA library"), new.split("## CUDA library"), strict=True)
    (old_head, old_library), (new_head, new_library) = zip(*parts, strict=True)
    pairs = [(old_head, new_head)]
    if "|" in old_library and "|" in new_library:
        pairs.append((old_library, new_library))
    for before, after in pairs:
        a, b = comparable(before), comparable(after)
        yield from (f"{RESULT.name} has, but this run has not: {row}" for row in a if row not in b)
        yield from (f"this run has, but {RESULT.name} has not: {row}" for row in b if row not in a)


if __name__ == "__main__":
    sys.exit(main())
