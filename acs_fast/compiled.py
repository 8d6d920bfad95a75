"""The denoiser's elementwise ops through torch.compile, for CPUs, where no kernel of ours serves."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.ops import Op, Ops

COMPILED = ("adaln", "gated_residual_adaln")
MARK = ", compiled"  # in `sources`
REPEATS = 5


def compile_ops(ops: Ops, choice: str, tokens: Tensor, width: int) -> tuple[Ops, str]:
    """The ops with `COMPILED` by torch.compile, and a sentence on what was measured; or the ops as they are.

    A GEMM library keeps the linears, with packed weights and the GELU in their epilogue, so the two ops are
    all that Inductor could fuse in a block. choice: `on`, `off`, or `auto`, which takes the faster of both.
    tokens: [2B, T, D] of the engine's shape and dtype. width: elements of a row of the modulation table.
    Raises InputError for `on` where there is nothing to compile or no C++ compiler.
    """
    if choice == "off":
        return ops, ""
    reason = _why_not(ops, tokens)
    if reason:
        if choice == "on":
            raise InputError(f"--compile on: {reason}; use auto or off")
        return ops, ""
    wrapped = {name: _functional(getattr(ops, name)) for name in COMPILED}
    calls = {"eager": _bench(ops, tokens, width)}
    started = time.perf_counter()
    compiled = dataclasses.replace(
        ops, **wrapped, sources={**ops.sources, **dict.fromkeys(COMPILED, "reference" + MARK)}
    )
    calls["compiled"] = _bench(compiled, tokens, width)
    try:
        calls["compiled"]()
    except Exception as error:  # Inductor raises many kinds for a compiler that does not work
        if choice == "on":
            raise InputError(
                f"--compile on: torch.compile failed ({type(error).__name__}); use --compile off"
            ) from error
        return ops, f"compile: failed ({type(error).__name__}), so the denoiser runs eagerly"
    seconds = time.perf_counter() - started
    times = {name: min(_timed(call) for _ in range(REPEATS)) for name, call in calls.items()}
    taken = choice == "on" or times["compiled"] < times["eager"]
    note = (
        f"compile: took {seconds:.1f} s; what stands between two linears takes {1e3 * times['eager']:.2f} ms "
        f"eager, {1e3 * times['compiled']:.2f} ms compiled; {'compiled' if taken else 'eager'} is used"
    )
    return (compiled if taken else ops), note


def is_compiled(ops: Ops) -> bool:
    """Whether `compile_ops` compiled them."""
    return all(ops.sources[name].endswith(MARK) for name in COMPILED)


def _why_not(ops: Ops, tokens: Tensor) -> str:
    if tokens.device.type != "cpu":
        return f"on {tokens.device.type} the kernels are compiled already"
    if any(ops.sources[name] != "reference" for name in COMPILED):
        return "another backend serves the denoiser's ops"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "there is no C++ compiler on PATH"
    return ""


def _functional(op: Op) -> Op:
    """The compiled op; it returns new tensors, for Inductor's fusion fails on `out` that is also read."""
    compiled: Callable[..., Any] = torch.compile(op, dynamic=False)

    def call(*tensors: Tensor, eps: float, out: object = None) -> Any:
        return compiled(*tensors, eps=eps)

    return call


def _bench(ops: Ops, tokens: Tensor, width: int) -> Callable[[], object]:
    """Both ops once, on a strided table row as the denoiser has it."""
    n, _, d = tokens.shape
    x, y, normed = (torch.zeros_like(tokens) for _ in range(3))
    table = torch.zeros(2, max(width, 3 * d), dtype=tokens.dtype)
    gate, shift, scale = (table[:, i * d : (i + 1) * d] for i in range(3))
    rows = torch.arange(n) % 2

    def call() -> None:
        ops.adaln(x, shift, scale, rows, eps=1e-6, out=normed)
        ops.gated_residual_adaln(x, y, gate, shift, scale, rows, eps=1e-6, out=(x, normed))

    return call


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
