"""On a GPU: a batch is one graph. Nothing waits, a replay is the eager walk, and memory does not grow.

tests/test_capture.py shows on any machine that a trajectory can be captured.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acs_fast.engine import StepEngine
from tests.test_capture import KINDS, K, batch, make_engine, make_guidance

CUDA = torch.device("cuda")
HOST_CALLS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset", "cuMemcpy", "cuMemset")
GPU_KINDS = ["convnet", "two-convnets", "ddim", "resnet", "pixel", "full-jacobian"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def run(engine: StepEngine, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A batch by `denoise`: a copy of the result."""
    (*_, x) = engine.denoise(*inputs)
    return x.clone()


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_nothing_waits_for_the_gpu_through_two_curricula(kind) -> None:
    engine = make_engine(CUDA, torch.bfloat16, **KINDS[kind])
    first, second = (make_guidance(engine.config, CUDA, seed) for seed in (1, 2))
    for guidance in (None, first):
        engine.load(guidance)
        run(engine, batch(0, 2))  # captures, and fills the table for all classes
    graphs = dict(engine.graphs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for guidance in (first, second):
            engine.load(guidance)
            results = [run(engine, batch(1, start=start)) for start in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.graphs == graphs  # none was captured again
    assert set(graphs) == {(False, False), (True, False)}
    assert all(bool(torch.isfinite(x).all()) for x in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_a_replay_is_the_walk_and_takes_the_new_weights(monkeypatch, kind, dtype) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    engine = make_engine(CUDA, dtype, **KINDS[kind])
    results = []
    for seed in (1, 2):
        engine.load(make_guidance(engine.config, CUDA, seed))
        for inputs in (batch(0, 2), batch(1, start=7), batch(2, 1)):
            replayed = run(engine, inputs)
            (*_, walked) = engine.walk(*inputs)
            results.append(replayed)
            if engine.network is not None:
                assert torch.equal(replayed, walked)
            else:  # autograd's sums may come in another order
                torch.testing.assert_close(replayed, walked, rtol=0, atol=1e-2 * walked.abs().max().item())
    assert not torch.equal(results[0], results[3])  # the same batch by the second discriminator
    engine.load(None)
    replayed = run(engine, batch(0, 2))
    (*_, walked) = engine.walk(*batch(0, 2))
    assert torch.equal(replayed, walked) and not torch.equal(replayed, results[3])
    assert len(engine.graphs) == 2


@pytest.mark.parametrize("kind", [None, "convnet", "resnet"])
def test_a_batch_is_at_most_three_launches(kind) -> None:
    engine = make_engine(CUDA, torch.bfloat16, **KINDS[kind or "convnet"])
    engine.load(make_guidance(engine.config, CUDA, seed=1) if kind else None)
    for _ in range(2):
        run(engine, batch(0, 2))
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    batches = 4
    with torch.profiler.profile(activities=activities) as profile:
        for start in range(batches):
            for _ in engine.denoise(*batch(0, 2, start=start)):
                pass
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.name.startswith(HOST_CALLS)]
    assert names.count("cudaGraphLaunch") == batches, names
    assert len(names) <= 3 * batches, names


def test_memory_is_flat_over_fifty_batches() -> None:
    engine = make_engine(CUDA, torch.bfloat16)
    guidances = [make_guidance(engine.config, CUDA, seed) for seed in (1, 2)]
    for guidance in (None, *guidances):
        engine.load(guidance)
        run(engine, batch(0, 2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(50):
        if number % 10 == 0:
            engine.load(guidances[number // 10 % 2])
        run(engine, batch(number % K, start=number))
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert len(engine.graphs) == 2
