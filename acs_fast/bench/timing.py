"""Interleaved rounds, memory, launches, and the rate of the model's own matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from acs_fast import graph
from acs_fast.bench.check import Batch, last
from acs_fast.engine import StepEngine
from acs_fast.linear import Linear, can_pack
from acs_fast.models.dit import DiTConfig

QUANTILES = {"median": 0.5, "p20": 0.2, "p80": 0.8}
GEMM_COPIES = 3  # sets of weights in turn, so that no cache holds them: a model's blocks are in none either
LAUNCHES = ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch", "Memcpy", "Memset")  # of the CUDA API


@dataclass
class Run:
    """A call of `parts` equal parts to be timed; what comes before it is not; its warm-up, if another."""

    call: Callable[[], object]
    parts: int = 1
    before: Callable[[], object] = lambda: None
    warm_up: Callable[[], object] | None = None


def warm_up(runs: dict[str, Run], device: torch.device) -> None:
    """Every run once: libraries load, autotune and capture, what is compiled is compiled."""
    for run in runs.values():
        run.before()
        (run.warm_up or run.call)()
    synchronize(device)


def interleaved(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a part of every run: `repeats` rounds of all, one after another."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc="bench", unit="round", disable=None):
        for name, run in runs.items():
            run.before()
            synchronize(device)
            started = time.perf_counter()
            run.call()
            synchronize(device)
            found[name].append((time.perf_counter() - started) / run.parts)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figure(seconds: list[float], unit: str) -> dict[str, Any]:
    """Median, p20 and p80 in `ms` or `s`."""
    values = torch.tensor(seconds, dtype=torch.float64) * {"ms": 1e3, "s": 1.0}[unit]
    found = {name: round(values.quantile(q).item(), 5) for name, q in QUANTILES.items()}
    return {"unit": unit, **found}


def memory_mb(device: torch.device, peak: bool) -> int | None:
    """Megabytes allocated by PyTorch on the GPU, or resident of the process; now or at their peak."""
    if device.type == "cuda":
        now, most = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        return round((most if peak else now)(device) / 1e6)
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return round(int(text.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024 / 1e6)


def gemm_runs(shape: DiTConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """A block's four linears at 2 B T rows, as PyTorch has them and packed, where that is possible.

    A part is one set of the four, which is 2 rows 12 D^2 FLOP.
    """
    rows, d = 2 * batch_size * (shape.input_size // shape.patch_size) ** 2, shape.hidden_size
    inputs = {k: torch.randn(rows, k, device=device).to(dtype) for k in (d, 4 * d)}
    outputs = {n: torch.empty(rows, n, dtype=dtype, device=device) for n in (d, 3 * d, 4 * d)}
    calls: dict[str, list[Callable[[], Tensor]]] = {"gemm": [], "gemm packed": []}
    for k, n in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)) * GEMM_COPIES:
        module = nn.Linear(k, n, device=device, dtype=dtype).requires_grad_(False)
        calls["gemm"].append(partial(Linear(module, rows, pack=False), inputs[k], outputs[n]))
        if can_pack(module.weight):
            calls["gemm packed"].append(partial(Linear(module, rows), inputs[k], outputs[n]))
    return {
        name: Run(launched(partial(each, listed), device), GEMM_COPIES)
        for name, listed in calls.items()
        if listed
    }


def each(calls: list[Callable[[], Tensor]]) -> None:
    """Call one after another."""
    for call in calls:
        call()


def launched(call: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """The call itself, on CUDA the replay of its graph, so that no launch is waited for."""
    if device.type != "cuda":
        return call
    captured = graph.capture(call, call, pool)
    return partial(_replay, captured, call)  # `call` holds the tensors that the graph reads and writes


def _replay(captured: torch.cuda.CUDAGraph, _kept: object) -> None:
    captured.replay()


def operator_calls(call: Callable[[], object]) -> int:
    """Operators that a call runs on the CPU, without those inside another; a compiled region is one, too.

    By the profiler: under a `TorchDispatchMode`, compiled code runs eagerly, and does so ever after.
    """
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        call()

    def is_operator(event: Any) -> bool:
        return "::" in event.name or event.name.startswith("Torch-Compiled Region")

    def is_inside(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (is_operator(parent) or is_inside(parent))

    return sum(is_operator(event) and not is_inside(event) for event in profile.function_events)


def host_launches(engine: StepEngine, batch: Batch) -> int | None:
    """Calls of the CUDA API that launch or copy, for a batch and the copy of its result; None if unseen."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    synchronize(engine.device)
    with torch.profiler.profile(activities=kinds) as profile:
        last(engine.denoise(*batch))
        synchronize(engine.device)
    names = [event.name for event in profile.events()]
    return sum(n.startswith("cu") and any(kind in n for kind in LAUNCHES) for n in names) or None
