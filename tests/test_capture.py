"""A trajectory can be captured as one CUDA graph: shown without a GPU, on PyTorch's meta device.

It has shapes and no values: what reads a value back raises, and it is not the host, so that a copy between
them shows. tests/test_graph.py captures on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acs_fast import engine as engine_module
from acs_fast import ops
from acs_fast.attention import Attention, choose
from acs_fast.config import DistillConfig
from acs_fast.engine import StepEngine
from acs_fast.guidance import Guidance
from acs_fast.models import classifier
from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.models.vae import VAE
from tests.test_sampler import randomise

CPU, META = torch.device("cpu"), torch.device("meta")
SIZE, K, STEPS = 16, 3, 5
WINDOW = (0.1, 0.9)  # all steps but the first and the last are guided
KINDS: dict[str, dict[str, Any]] = {
    "convnet": {},
    "two-convnets": {"objective": "learnability", "trust_radius": "eps"},
    "ddim": {"sampler": "ddim", "eta": 0.5, "clip_denoised": True, "cfg_channels": 3},
    "resnet": {"discriminator": "resnet-18"},
    "full-jacobian": {"jacobian": "full"},
    "pixel": {"guidance_space": "pixel"},
    "pixel-tiny": {"guidance_space": "pixel-tiny", "jacobian": "full"},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks, and a table of modulations on the meta device too."""
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)
    monkeypatch.setitem(engine_module.TABLE_BYTES, "meta", 1 << 20)


def make_guidance(config: DistillConfig, device: torch.device, seed: int, decode_batch: int = 1) -> Guidance:
    """Two random networks that see a sample or its decode."""
    decode, channels, size = None, 4, SIZE
    if config.guidance_space != "latent":
        pytest.importorskip("diffusers")  # not on every machine with a GPU
        from tests.test_vae import small_kl, small_tiny

        module = small_tiny() if config.guidance_space == "pixel-tiny" else small_kl()
        vae = VAE(module.to(device))
        decode, channels, size = vae.decode_differentiable, 3, vae.factor * SIZE
    torch.manual_seed(seed)
    networks = [build_classifier(config.discriminator, channels, K, size) for _ in range(2)]
    f_i, f_real = (network.eval().requires_grad_(False).to(device) for network in networks)
    how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
    return Guidance(config.objective, f_i, f_real, config.omega, *how_far, decode, decode_batch)


def make_engine(
    device: torch.device, dtype: torch.dtype = torch.float32, batch_size: int = 2, **settings: Any
) -> StepEngine:
    """An engine of a small random DiT; on the meta device without its values."""
    defaults = {"num_sampling_steps": STEPS, "guidance_window": WINDOW, "discriminator": "convnet-2"}
    config = DistillConfig(**{**defaults, **settings})
    shape = DiTConfig(SIZE, 2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=K)
    model = randomise(DiT(shape), 0.1, seed=3).to(device, dtype)
    attention = Attention("math")
    if device.type == "cuda":
        attention = choose("auto", (2 * batch_size, (SIZE // 2) ** 2, 2, 32), dtype, device)
    return StepEngine(
        model, config, ops.select("auto" if device.type == "cuda" else "reference", device), device,
        batch_size=batch_size, class_labels=range(K), attention=attention,
    )  # fmt: skip


def batch(*labels: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of these classes, as the engine is given it."""
    rows = torch.tensor(labels)
    return rows, torch.arange(start, start + len(rows)), rows


# --- without a GPU: the meta device --------------------------------------------------------------------


class NoConstants(TorchFunctionMode):
    """Refuses to copy a value from the host, which the meta device does not show as an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.asarray), "a value is copied from the host"
        return func(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """Every operation: its name with the shapes and dtypes of its results; none may wait for a value."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.operations = device, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} reads a value"
        dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # by numbers it has a size, by a mask not
            dynamic = any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not dynamic, f"{func} has a size that depends on values"
        results = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, Tensor)]
        assert all(tensor.device == self.device for tensor in tensors), f"{func} leaves {self.device}"
        shapes = [(tuple(t.shape), t.dtype) for t in tree_leaves(results) if isinstance(t, Tensor)]
        self.operations.append((str(func), shapes))
        return results


def trace(engine: StepEngine, guided: bool) -> list[list[Any]]:
    """The operations of every step, the start before the first one."""
    steps: list[list[Any]] = []
    with torch.no_grad(), NoConstants(), Trace(engine.device) as mode:
        start = engine._start

        def begin(given: bool) -> None:
            start(given)
            steps.append(mode.operations[:])
            mode.operations.clear()

        engine._start = begin  # type: ignore[method-assign]
        for _ in engine._trajectory(guided, False):
            steps.append(mode.operations[:])
            mode.operations.clear()
        engine._start = start  # type: ignore[method-assign]
    return steps


def assert_capturable(engine: StepEngine, guided: bool) -> list[list[Any]]:
    """Every step of a kind is the same operations on the same shapes, so the first needs all the memory."""
    steps = trace(engine, guided)
    assert len(steps) == 1 + STEPS and all(steps)
    kinds: dict[bool, list[Any]] = {}
    for number, operations in zip(reversed(range(STEPS)), steps[1:], strict=True):
        active = guided and engine._active(number)
        assert operations == kinds.setdefault(active, operations), f"step {number} differs from its kind"
    assert len(kinds) == (2 if guided else 1)
    if guided:
        assert len(kinds[True]) > len(kinds[False])
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_value_copies_or_needs_a_new_size(kind) -> None:
    engine = make_engine(META, torch.bfloat16, **KINDS[kind])
    engine.load(make_guidance(engine.config, META, seed=1))
    assert (engine.network is not None) == (kind in ("convnet", "two-convnets", "ddim"))
    operations = assert_capturable(engine, True)
    engine.load(None)
    engine.load(make_guidance(engine.config, META, seed=2))
    assert trace(engine, True) == operations


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_neither_does_a_step_without_guidance(sampler) -> None:
    assert_capturable(make_engine(META, torch.bfloat16, sampler=sampler), False)


Breakage = Callable[[StepEngine, int], object]
BREAKAGES: dict[str, tuple[str, Breakage]] = {
    "item": ("item|reads a value", lambda engine, step: engine.x.sum().item()),
    "branch": ("item|reads a value|bool", lambda engine, step: bool((engine.x > 0).all())),
    "to the host": ("Cannot copy out of meta", lambda engine, step: engine.x.cpu()),
    "from the host": ("leaves meta", lambda engine, step: torch.zeros(1).to(engine.device)),
    "a constant": ("copied from the host", lambda engine, step: torch.tensor([1.0], device=engine.device)),
    "mask": ("depends on values", lambda engine, step: engine.x[engine.x > 0]),
    "nonzero": ("depends on values", lambda engine, step: engine.x.nonzero()),
    "equal": ("reads a value", lambda engine, step: torch.equal(engine.x, engine.x)),
    "a new size": ("differs", lambda engine, step: torch.empty(step + 1, device=engine.device)),
    "a new dtype": ("differs", lambda engine, step: engine.x.to((torch.half, torch.double)[step == 2])),
    "one operation more": ("differs", lambda engine, step: step == 2 and engine.x.neg()),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_step_that_cannot_be_captured_is_found(monkeypatch, name) -> None:
    step, (message, breakage) = StepEngine._step, BREAKAGES[name]

    def broken(engine: StepEngine, number: int, guided: bool) -> None:
        step(engine, number, guided)
        breakage(engine, number)

    monkeypatch.setattr(StepEngine, "_step", broken)
    engine = make_engine(META)
    engine.load(make_guidance(engine.config, META, seed=1))
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=message):
        assert_capturable(engine, True)


# --- on the CPU: everything stays where it is ----------------------------------------------------------


def addresses(thing: Any, name: str = "engine", seen: set[int] | None = None) -> dict[str, int]:
    """Where every tensor that an engine holds lies, by the attributes that lead to it."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {} if thing.is_mkldnn else {name: thing.data_ptr()}
    if isinstance(thing, nn.Module):
        return {f"{name}.{key}": tensor.data_ptr() for key, tensor in thing.state_dict().items()}
    if isinstance(thing, list | tuple):
        parts: Iterator[tuple[str, Any]] = ((str(number), part) for number, part in enumerate(thing))
    elif type(thing).__module__.startswith("acs_fast") and hasattr(thing, "__dict__"):
        # the guidance that was loaded is the caller's: the engine has its own copy
        parts = ((key, part) for key, part in vars(thing).items() if key != "loaded")
    else:
        return {}
    found: dict[str, int] = {}
    for key, part in parts:
        found |= addresses(part, f"{name}.{key}", seen)
    return found


@pytest.mark.parametrize("kind", ["convnet", "two-convnets", "resnet", "pixel", "full-jacobian"])
def test_batches_and_another_curriculum_find_everything_where_it_was(kind) -> None:
    settings = {**KINDS[kind], "num_sampling_steps": 2, "guidance_window": (0.0, 1.0)}
    engine, fresh = (make_engine(CPU, **settings) for _ in range(2))
    first, second = (make_guidance(engine.config, CPU, seed) for seed in (1, 2))
    inputs = batch(0, 2)
    results = []
    engine.load(first)
    before = addresses(engine)
    held = ("engine.x", "engine.inputs", "engine.table", "engine.steps", "engine.denoiser.table.values")
    assert set(held) < set(before) and len(before) > 30
    assert any(key.startswith(("engine.network.", "engine.guidance.discriminator.")) for key in before)
    for guidance in (first, None, second, first, second):
        engine.load(guidance)
        for rows in (batch(1), batch(1, 0, start=4), inputs):
            (*_, x) = engine.denoise(*rows)
        results.append(x.clone())
        assert x.data_ptr() == before["engine.x"]
        assert addresses(engine) == before
    assert torch.equal(results[0], results[3]) and torch.equal(results[2], results[4])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    fresh.load(second)
    (*_, x) = fresh.denoise(*inputs)
    assert torch.equal(x, results[4])  # the static copies have all of the new weights


def alignments(engine: StepEngine, guided: bool) -> dict[int, list[tuple[str, list[int]]]]:
    """Per step: the ops that are called, and the addresses of their tensors."""
    calls: list[tuple[str, list[int]]] = []

    def recorded(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            leaves = tree_leaves((args, keywords))
            calls.append((name, [leaf.data_ptr() for leaf in leaves if isinstance(leaf, Tensor)]))
            return op(*args, **keywords)

        return call

    wrapped = {name: recorded(name, getattr(engine.ops, name)) for name in ops.OPS}
    engine.ops = engine.denoiser.ops = dataclasses.replace(engine.ops, **wrapped)
    steps = {}
    with torch.no_grad():
        for number in reversed(range(STEPS)):
            calls.clear()
            engine._step(number, guided)
            steps[number] = calls[:]
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_step_has_the_alignment_that_was_warmed_up(batch_size, dtype) -> None:
    """Triton compiles per alignment, and a capture forbids it: here at the widths of DiT-XL/2."""
    shape = DiTConfig(4, 2, in_channels=4, hidden_size=1152, depth=1, num_heads=16, num_classes=K)
    config = DistillConfig(num_sampling_steps=STEPS, guidance_window=WINDOW, discriminator="convnet-2")
    model = randomise(DiT(shape), 0.02, seed=0).to(dtype)
    engine = StepEngine(
        model, config, ops.select("reference", CPU), CPU,
        batch_size=batch_size, class_labels=range(K), attention=Attention("math"),
    )  # fmt: skip
    torch.manual_seed(0)
    f_i = build_classifier("convnet-2", 4, K, 4).eval().requires_grad_(False)
    how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
    engine.load(Guidance(config.objective, f_i, None, config.omega, *how_far))
    for guided in (True, False):
        steps = alignments(engine, guided)
        for number, calls in steps.items():
            kind = next(n for n in steps if not guided or engine._active(n) == engine._active(number))
            assert [name for name, _ in calls] == [name for name, _ in steps[kind]]
            for (name, found), (_, first) in zip(calls, steps[kind], strict=True):
                assert [a % 16 for a in found] == [a % 16 for a in first], f"{name} in step {number}"
                moved = [a for a, b in zip(found, first, strict=True) if a != b]
                assert all(a % 16 == 0 for a in moved), f"{name} in step {number}"
        changing = {a for calls in steps.values() for _, found in calls for a in found}
        assert len(changing) > len({a for _, found in steps[0] for a in found})  # some do change
