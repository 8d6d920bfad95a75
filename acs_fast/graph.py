"""Capture of a fixed sequence of GPU work as one CUDA graph, and what a captured training needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_STEPS = 3  # of a training: libraries load their kernels and the optimizer makes its state


def capture(call: Callable[[], None], warm_up: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of what `call` launches, on the current device, with its temporary memory in `pool`.

    warm_up: runs once before, on a side stream: libraries load, autotune and compile there, which a capture
    forbids. It must launch every kernel with the shapes and pointer alignments of `call`.
    The capture is `thread_local`: another thread (a loader's, a writer's) may use CUDA meanwhile.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        call()
    return graph


def captured_training(step: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None]:
    """The replay of a training step as a CUDA graph; the warm-up trains too, so `start_anew` must follow.

    Graphs of one pool replay one after another, and none reads what another left there.
    """

    def warm_up() -> None:
        for _ in range(WARMUP_STEPS):
            step()

    with torch.cuda.device(device):
        return capture(step, warm_up, pool).replay


def set_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """The learning rate of the next steps; where a graph reads it from the device, it is put there."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = float(rate)
        elif isinstance(rate, Tensor):
            group["lr"].copy_(rate)
        else:
            group["lr"].fill_(rate)


@torch.no_grad()
def start_anew(network: nn.Module, optimizer: torch.optim.Optimizer, initial: dict[str, Any]) -> None:
    """In place: these weights, and the optimizer as before its first step."""
    network.load_state_dict(initial)
    for state in optimizer.state.values():
        for values in state.values():
            if isinstance(values, Tensor):
                values.zero_()
