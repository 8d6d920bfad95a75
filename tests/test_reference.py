"""The specification agrees with plain PyTorch and its autograd in float64, so that neither loosens the rule.

The rule of acs_fast.testing allows a kernel twice the error of plain PyTorch: were the reference wrong, that
error would be large, and every kernel within it.
"""

from __future__ import annotations

import pytest
import torch

from acs_fast.testing import Case, make, plain, tensors, truth
from tests.op_cases import CASES

FP32_INSIDE = 1e-5  # relative; plain PyTorch makes noise, statistics and logits in fp32 even here


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_reference_is_plain_pytorch_in_float64(case: Case) -> None:
    call = make(case, torch.float64, torch.device("cpu"), seed=len(case.id))
    usual = tensors(getattr(plain, case.op)(*call.args, **call.kwargs))
    for a, b in zip(truth(case, call), usual, strict=True):
        error = (a.double() - b.double()).abs().max().item()
        assert error <= FP32_INSIDE * b.double().abs().max().item(), error
