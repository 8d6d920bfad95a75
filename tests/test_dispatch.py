"""What a launcher does on the host: with `out` given it makes no tensor and reads none; what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from acs_fast import ops
from acs_fast.kernels.structures import guidance_workspace
from acs_fast.testing import Case, make, plain, poisoned_out
from tests.op_cases import CASES

triton = pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor  # noqa: E402 (needs triton)

CPU = torch.device("cpu")
FIRST = {case.op: case for case in reversed(CASES) if case.shape["B"] > 1}  # op -> its first such case


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that were launched; none of them runs."""
    names: list[str] = []

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        names.append(self.fn.__name__)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    yield names


class Calls(TorchDispatchMode):
    """Every ATen call that is more than another view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)
        }
        made = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        if not made or any(t.untyped_storage().data_ptr() not in given for t in made):
            self.found.append(str(func))
        return result


def call_with_out(case: Case) -> tuple[Any, Any]:
    """The inputs of a case, and its `out` (with a workspace where the op takes one)."""
    call = make(case, torch.bfloat16, CPU)
    out = poisoned_out(getattr(plain, case.op), call)
    if case.op == "discriminator_guidance":
        call.kwargs["workspace"] = guidance_workspace(call.args[0], call.args[8], call.kwargs["groups"])
    return call, out


@pytest.mark.parametrize("case", FIRST.values(), ids=lambda case: case.op)
def test_with_out_given_nothing_is_made_and_nothing_is_read(case: Case, launches: list[str]) -> None:
    op = getattr(ops.select({case.op: "triton"}, CPU), case.op)
    call, out = call_with_out(case)
    with Calls() as calls:
        op(*call.args, **call.kwargs, out=out)
    assert calls.found == []
    depth = len(call.args[8].blocks) if case.op == "discriminator_guidance" else 0
    assert len(launches) == (2 * depth + 2 if depth else 1)


def test_the_probe_sees_an_allocation_and_a_read() -> None:
    x = torch.ones(2)
    with Calls() as calls:
        x.view(1, 2)
        torch.empty(2)
        x.sum().item()
    assert [name.split(".")[1] for name in calls.found] == ["empty", "sum", "_local_scalar_dense"]


@pytest.mark.parametrize("case", FIRST.values(), ids=lambda case: case.op)
def test_a_tensor_that_is_not_contiguous_is_refused(case: Case, launches: list[str]) -> None:
    op = getattr(ops.select({case.op: "triton"}, CPU), case.op)
    call, _ = call_with_out(case)

    def spread(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        return t.repeat_interleave(2, dim=-1)[..., ::2]  # the same numbers, every other element

    first = tree_map(spread, call.args[0])
    with pytest.raises(ValueError, match="contiguous") as error:
        op(first, *call.args[1:], **call.kwargs)
    names = "pred_xstart: x" if case.op == "discriminator_guidance" else f"{case.op}: "
    assert str(error.value).startswith(names) and launches == []


def test_shapes_and_types_that_would_read_beside_a_tensor_are_refused(launches: list[str]) -> None:
    odd = Case("conv_norm_act_pool", {"N": 1, "B": 2, "C_in": 4, "C": 64, "H": 7, "W": 8, "G": 64})
    call = make(odd, torch.float32, CPU)
    convolve = ops.select({odd.op: "triton"}, CPU).conv_norm_act_pool
    with pytest.raises(ValueError, match="must be even, they are 7 and 8"):
        convolve(*call.args, **call.kwargs)
    call = make(FIRST["conv_norm_act_pool"], torch.float32, CPU)
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16, the weight torch\.float32"):
        convolve(call.args[0].bfloat16(), call.args[1], **call.kwargs)
    call = make(FIRST["guided_step"], torch.float32, CPU)
    step = ops.select({"guided_step": "triton"}, CPU).guided_step
    for position, word in ((4, "seed must be one int64"), (5, "step must be one int64")):
        args = [t.int() if i == position else t for i, t in enumerate(call.args)]
        with pytest.raises(ValueError, match=word):
            step(*args, **call.kwargs)
    assert launches == []
