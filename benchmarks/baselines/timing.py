"""How the scripts that compare methods time, check and record: no figure without a green check."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acs_fast.environment import describe, version
from benchmarks.ops_bench import driver, machine_rates, measure, quantiles, seconds
from benchmarks.roofline import roofline_seconds

OVERFLOW = 4  # operands of a call are drawn anew until they fill the L2 so many times
MOST_COPIES = 64
# what a call may raise where a library does not serve it
REFUSALS = (RuntimeError, NotImplementedError, ImportError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Machine:
    """Where a figure was measured, and the roofs that the same process measured there."""

    device: torch.device
    copy: float  # bytes/s, read and written
    matrix: float  # FLOP/s of a large bf16 product

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        """The roofs of this process: a large copy and a large bf16 product."""
        rates = machine_rates(device)
        return cls(device, rates["copy"], rates["matrix"])

    def provenance(self) -> dict[str, Any]:
        """What stands in every row: versions, device, driver, threads, commit and the measured roofs."""
        world = describe(self.device)
        world["versions"]["diffusers"] = version("diffusers")
        return {
            "driver": driver() if self.device.type == "cuda" else None,
            "measured_copy_gb_s": round(self.copy / 1e9, 1),
            "measured_matrix_tflop_s": round(self.matrix / 1e12, 3),
            **world,
        }


@dataclass(frozen=True)
class Trial:
    """One call to be timed: what its row says, the call on several operands, and the error of its result."""

    labels: dict[str, Any]
    calls: Sequence[Callable[[], Tensor]]
    error: Callable[[Tensor], float]
    allowed: float
    flop: int
    bytes: int


def copies(operand_bytes: int, device: torch.device) -> int:
    """How many sets of operands a call rotates through, so that none is in the L2 when its turn comes."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_COPIES, 1 + OVERFLOW * cache // operand_bytes))


def together(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], str]:
    """All calls as one: a CUDA graph, so that no launch is waited for, else one after another; and which."""

    def eager() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return eager, "calls"
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        eager()  # libraries choose and load their kernels before the capture
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError as error:
        torch.cuda.set_stream(torch.cuda.default_stream(device))  # a capture that fails leaves its own behind
        torch.cuda.synchronize(device)
        return eager, f"calls, for it cannot be captured: {first_line(error)}"
    return partial(_replay, graph, list(calls)), "graph"


def _replay(graph: torch.cuda.CUDAGraph, _kept: object) -> None:
    """Replay; `_kept` are the tensors of the graph, which itself keeps only what it allocated."""
    graph.replay()


KINDS = {  # of operator, by what its name holds
    "linears": ("addmm", "_linear_pointwise", "baddbmm"),
    "attention": ("scaled_dot_product",),
    "gelu": ("aten::gelu",),
}


def operator_ms(run: Callable[[], Any], parts: int) -> dict[str, float]:
    """Milliseconds of a part of a CPU run by kind of operator, the rest as `other`: from the profiler."""
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        run()
    spent = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profile.key_averages():
        kind = next((k for k, words in KINDS.items() if any(word in event.key for word in words)), "other")
        spent[kind] += event.self_cpu_time_total / 1e3 / parts
    return {kind: round(ms, 1) for kind, ms in spent.items()}


def run_trial(trial: Trial, machine: Machine) -> dict[str, Any]:
    """The row of a trial: with a figure if the call works and its result is right, else with the reason."""
    row = dict(trial.labels)
    try:
        error = trial.error(trial.calls[0]())
        row |= {"error": error, "check": round(error / trial.allowed, 4)}
        if not error <= trial.allowed:
            return {**row, "reason": f"its error is {error:.1e}, {trial.allowed:.1e} is allowed"}
        run, how = together(trial.calls, machine.device)
        times = [t / len(trial.calls) for t in measure({"": run}, machine.device)[""]]
    except REFUSALS as refusal:
        return {**row, "reason": f"{type(refusal).__name__}: {first_line(refusal)}"}
    floor = roofline_seconds(trial.bytes, trial.flop, machine.copy, machine.matrix)
    median = statistics.median(times)
    return {
        **row,
        **figures(times, 1e6, "us"),
        "flop": trial.flop,
        "bytes": trial.bytes,
        "tflop_s": round(trial.flop / median / 1e12, 3),
        "percent_of_roofline": round(100 * floor / median, 1),
        "timed": f"{how} of {len(trial.calls)}",
    }


def interleaved(
    runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every run, `repeats` times, a round of all after another; each ran once before."""
    for run in runs.values():
        seconds(run, 1, device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(run, 1, device))
    return found


def figures(times: list[float], factor: float, unit: str) -> dict[str, Any]:
    """Median, p20 and p80 of seconds, in `unit`, which a second has `factor` of."""
    p20, median, p80 = (q * factor for q in quantiles(times if len(times) > 1 else times * 2))
    return {"unit": unit, "median": round(median, 3), "p20": round(p20, 3), "p80": round(p80, 3)}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; inf where it is not finite."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error == error else float("inf")


def first_line(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def append(path: Path, row: dict[str, Any]) -> None:
    """Write a row at the end of a .jsonl file, at once: what is measured survives a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
