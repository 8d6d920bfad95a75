"""Capture of a fixed sequence of GPU work as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
