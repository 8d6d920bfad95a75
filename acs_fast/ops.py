"""THE kernel interface: `Ops` holds one callable per op; `select` chooses them once, before any capture."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from acs_fast.config import InputError

BACKENDS = ("cuda", "triton", "reference")  # in the order in which `auto` tries them

Op = Callable[..., Any]


@dataclass(frozen=True)
class Ops:
    """One callable per op, with the signatures of `acs_fast.kernels.reference`; where each came from."""

    adaln: Op
    gated_residual_adaln: Op
    philox_normal: Op
    pred_xstart: Op
    guided_step: Op
    conv_norm_act_pool: Op
    conv_norm_act_pool_backward_input: Op
    classifier_head_grad: Op
    discriminator_guided_step: Op
    discriminator_guidance: Op
    group_norm_silu: Op
    to_uint8: Op
    sources: Mapping[str, str]  # op -> backend


OPS = tuple(f.name for f in dataclasses.fields(Ops) if f.name != "sources")


def select(choice: str | Mapping[str, str], device: torch.device) -> Ops:
    """The ops for a device.

    choice: `auto` (op by op cuda, triton, reference; on a CPU reference), a backend for every op that it
    has, or {op: backend}; the other ops as `auto`. Raises InputError for an unknown op or backend, and for a
    named backend that cannot serve, with every reason.
    """
    if isinstance(choice, str):
        _check_backend(choice)
        wanted = {} if choice == "auto" else {op: choice for op in OPS if _has(choice, op)}
        if choice != "auto" and not wanted:
            raise InputError(f"--backend {choice}: {_why_not(choice, device) or 'it has no ops'}")
    else:
        wanted = dict(choice)
    refusals, chosen, sources = [], {}, {}
    for op, backend in wanted.items():
        if op not in OPS:
            raise InputError(f"there is no op {op!r}; use {', '.join(OPS)}")
        _check_backend(backend)
        if backend != "auto" and (reason := why_not(op, backend, device)):
            refusals.append(f"{op}={backend}: {reason}")
    if refusals:
        reasons = {text.split(": ", 1)[1] for text in refusals}
        if isinstance(choice, str) and len(reasons) == 1:
            raise InputError(f"--backend {choice} cannot serve here: {reasons.pop()}")
        raise InputError(f"--backend cannot be served here: {'; '.join(refusals)}")
    for op in OPS:
        backend = wanted.get(op, "auto")
        if backend == "auto":
            # without a GPU Triton's interpreter may serve, which is for tests alone
            tried = BACKENDS if device.type == "cuda" else ("reference",)
            backend = next(name for name in tried if why_not(op, name, device) is None)
        chosen[op], sources[op] = getattr(_module(backend), op), backend
    return Ops(**chosen, sources=sources)


def parse_choice(text: str) -> str | dict[str, str]:
    """`--backend` as a choice: `auto`, a backend, or `op=backend,op=backend`."""
    if "=" not in text:
        return text
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return {op.strip(): backend.strip() for op, _, backend in pairs}


def why_not(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve an op on a device, in one phrase, or None if it can."""
    if reason := _why_not(backend, device):
        return reason
    return None if _has(backend, op) else "it has no such kernel"


def _check_backend(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise InputError(
            f"there is no backend {name!r}; use auto, {', '.join(BACKENDS)}, or op=backend with commas"
        )


def _why_not(backend: str, device: torch.device) -> str | None:
    if backend == "reference":
        return None
    try:
        reason: str | None = _module(backend).why_not(device)
    except ImportError as error:
        return f"{error.name or backend} is not installed"
    return reason


def _has(backend: str, op: str) -> bool:
    try:
        return hasattr(_module(backend), op)
    except ImportError:
        return False


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"acs_fast.kernels.{backend}")


def table(device: torch.device) -> str:
    """What `acs-fast env` prints: op x backend; `no` with its reason, `-` where there is no such kernel."""
    rows = [["op", *BACKENDS]]
    notes: dict[str, None] = {}
    for op in OPS:
        cells = [op]
        for backend in BACKENDS:
            reason = why_not(op, backend, device)
            cells.append("yes" if reason is None else "no" if _has(backend, op) else "-")
            if reason is not None and _has(backend, op):
                notes[f"{backend} no: {reason}"] = None
        rows.append(cells)
    width = max(len(row[0]) for row in rows) + 2
    lines = [row[0].ljust(width) + "".join(cell.ljust(11) for cell in row[1:]) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), *notes])
