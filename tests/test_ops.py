"""Every op, backend, dtype and shape by the rule of acs_fast.testing; with a GPU the same file runs on it."""

from __future__ import annotations

import pytest
import torch

from acs_fast import ops
from acs_fast.testing import Case, excess, make, plain, poisoned_out, tensors, truth
from tests.op_cases import CASES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def backends(op: str) -> list[str]:
    """The backends that serve an op here: without a GPU the reference and, interpreted, Triton."""
    return [name for name in ops.BACKENDS if ops.why_not(op, name, DEVICE) is None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(case, b, id=f"{case.id}-{b}") for case in CASES for b in backends(case.op)],
)
def test_error_is_within_the_rule(case: Case, backend: str, dtype: str) -> None:
    call = make(case, DTYPES[dtype], DEVICE, seed=len(case.id))
    op = getattr(ops.select({case.op: backend}, DEVICE), case.op)
    out = poisoned_out(getattr(plain, case.op), call)
    given = tensors(out)
    pointers = [t.data_ptr() for t in given]
    try:
        got = tensors(op(*call.args, **call.kwargs, out=out))
    except ValueError as refusal:
        if backend != "cuda":
            raise
        pytest.skip(str(refusal))  # its kernels take fewer shapes; tests/test_cuda.py holds which
    assert [t.data_ptr() for t in got] == pointers, "the result is not `out`"
    usual = tensors(getattr(plain, case.op)(*call.args, **call.kwargs))
    worst = excess(got, usual, truth(case, call))
    assert max(worst) <= 1.0, worst
