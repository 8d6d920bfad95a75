"""Times every op, each backend that serves it here against eager PyTorch and torch.compile, interleaved.

python -m benchmarks.ops_bench                          every op at batch 1, 8 and 66
python -m benchmarks.ops_bench --ops adaln --batch 8    some of them; --out FILE: not into results/ops.jsonl

A row is one implementation at one shape: median, p20 and p80 in microseconds per call. `check` is the error
of its result in this very process as a share of the allowed error (acs_fast.testing); what fails it gets no
row and makes the command fail. On a GPU CUDA events measure, on a CPU the clock. Calls repeat on the same
inputs, so small ones come out of the L2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from acs_fast import ops
from acs_fast.environment import describe, resolve_device
from acs_fast.testing import Call, Case, excess, make, plain, poisoned_out, tensors, truth
from benchmarks import roofline

RESULT = Path(__file__).parent / "results" / "ops.jsonl"
BATCHES = (1, 8, 66)
ROUNDS, TARGET_SECONDS = 30, 2e-3  # samples of each implementation, and how long one of them aims to take
WARM_UP = 3
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def implementations(case: Case, call: Call, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name -> one call of it: each backend into an `out`, then PyTorch eager and compiled."""
    baseline = getattr(plain, case.op)
    for backend in ops.BACKENDS:
        if backend != "reference" and ops.why_not(case.op, backend, device) is None:
            op = getattr(ops.select({case.op: backend}, device), case.op)
            out = poisoned_out(baseline, call)
            yield backend, lambda op=op, out=out: op(*call.args, **call.kwargs, out=out)
    yield "eager", lambda: baseline(*call.args, **call.kwargs)
    torch.compiler.reset()  # else a later shape of the same function is one recompilation too many
    compiled = torch.compile(baseline, dynamic=False)
    yield "torch.compile", lambda: compiled(*call.args, **call.kwargs)


def seconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Per call, of `calls` in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def measure(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each implementation, a round of all after another."""
    calls = {}
    for name, run in runs.items():
        for _ in range(WARM_UP):
            run()
        calls[name] = max(1, round(TARGET_SECONDS / seconds(run, 1, device)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(seconds(run, calls[name], device))
    return found


def machine_rates(device: torch.device) -> dict[str, float]:
    """This machine's own roof: bytes/s of a large copy, FLOP/s of a large bf16 product, in this process."""
    large = 1 << (30 if device.type == "cuda" else 26)
    source = torch.zeros(large, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).bfloat16()
    runs = {"copy": lambda: target.copy_(source), "matrix": lambda: a @ a}
    medians = {name: statistics.median(times) for name, times in measure(runs, device).items()}
    return {"copy": 2 * large / medians["copy"], "matrix": 2 * n**3 / medians["matrix"]}


def rows(
    case: Case, dtype: torch.dtype, device: torch.device, rates: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """The rows of one op at one shape; a row without "median" says why there is none."""
    call = make(case, dtype, device)
    usual = getattr(plain, case.op)(*call.args, **call.kwargs)
    true, usual_tensors = truth(case, call), tensors(usual)
    runs, checks = {}, {}
    for name, run in implementations(case, call, device):
        try:
            checks[name] = max(excess(tensors(run()), usual_tensors, true))
        except RuntimeError as error:  # a baseline that cannot be had is no failure of the ops
            if name != "torch.compile":
                raise
            print(f"{case.id}: no figure of torch.compile, it raises: {str(error).splitlines()[0]}")
            continue
        if checks[name] <= 1.0:
            runs[name] = run
    times = measure(runs, device)
    bytes_required = roofline.required_bytes(case, call, usual)
    work = roofline.flop(getattr(plain, case.op), call)
    floor = roofline.roofline_seconds(bytes_required, work, rates["copy"], rates["matrix"])
    for name, check in checks.items():
        row = {
            "op": case.op,
            "shape": case.shape,
            "options": case.options,
            "dtype": NAMES[dtype],
            "backend": name,
            "tier": "high",
            "check": round(check, 4),
        }
        if name in times:
            p20, median, p80 = (q * 1e6 for q in quantiles(times[name]))
            row |= {
                "unit": "us",
                "median": round(median, 2),
                "p20": round(p20, 2),
                "p80": round(p80, 2),
                "bytes_required": bytes_required,
                "flop": work,
                "percent_of_roofline": round(100e6 * floor / median, 1),
            }
        yield row


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def driver() -> str | None:
    """The NVIDIA driver's version, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def interpreted() -> bool:
    """Whether Triton's kernels would be interpreted, whose time says nothing."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def main() -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--ops", nargs="+", default=list(ops.OPS), choices=ops.OPS, metavar="OP")
    parser.add_argument("--batch", nargs="+", default=list(BATCHES), type=int, metavar="B")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if interpreted():
        sys.exit("ops_bench times kernels: run it without TRITON_INTERPRET")
    device = resolve_device(arguments.device)
    rates = machine_rates(device)
    world = {
        "driver": driver() if device.type == "cuda" else None,
        "measured_copy_gb_s": round(rates["copy"] / 1e9),
        "measured_matrix_tflop_s": round(rates["matrix"] / 1e12, 2),
        **describe(device),
    }
    failed = 0
    for batch in arguments.batch:
        for case in (case for case in roofline.production(batch) if case.op in arguments.ops):
            for dtype in roofline.dtypes(case.op):
                for row in rows(case, dtype, device, rates):
                    label = f"{case.id} {row['dtype']} {row['backend']}"
                    if "median" not in row:
                        failed += 1
                        print(
                            f"{label}: no figure, its error is {row['check']} times the allowed one",
                            flush=True,
                        )
                        continue
                    with arguments.out.open("a") as file:
                        file.write(json.dumps({**row, **world}) + "\n")
                    print(
                        f"{label}: {row['median']} us, {row['percent_of_roofline']} % of the roofline",
                        flush=True,
                    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
