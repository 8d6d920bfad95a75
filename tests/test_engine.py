"""The engine over the ops against the plain, eager ACS: ten guided steps of every objective and sampler."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from acs_fast import ops
from acs_fast.attention import Attention
from acs_fast.config import DistillConfig
from acs_fast.diffusion import step_coefficients
from acs_fast.engine import StepEngine
from acs_fast.guidance import Guidance
from acs_fast.models import classifier
from acs_fast.models.classifier import build_classifier
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.sampler import denoise
from tests.test_sampler import randomise

CPU = torch.device("cpu")
LABELS, INDICES, TARGETS = torch.tensor([0, 2]), torch.tensor([5, 0]), torch.tensor([1, 0])
BACKENDS = [name for name in ("reference", "triton") if ops.why_not("guided_step", name, CPU) is None]
SAMPLERS = {
    "learned-range": {},
    "fixed-small": {"variance": "fixed_small", "cfg_channels": 2},
    "ddim": {"sampler": "ddim", "eta": 0.5, "clip_denoised": True},
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks, for Triton's interpreter is slow."""
    monkeypatch.setattr(classifier, "CONVNET_WIDTH", 16)


def setting(size: int = 8, **settings: object) -> tuple[DistillConfig, DiT, Guidance]:
    """A run of ten steps, each guided but the first and the last, with random networks."""
    defaults = {"num_sampling_steps": 10, "guidance_window": (0.05, 0.95), "discriminator": "convnet-2"}
    config = DistillConfig(**{**defaults, **settings})
    shape = DiTConfig(
        size, 2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=True
    )
    model = randomise(DiT(shape), 0.2, seed=3)
    torch.manual_seed(4)
    networks = [build_classifier(config.discriminator, 4, 3, size) for _ in range(2)]
    f_i, f_real = (network.eval().requires_grad_(False) for network in networks)
    how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
    return config, model, Guidance(config.objective, f_i, f_real, config.omega, *how_far)


def by_ops(backend: str, config: DistillConfig, model: DiT, guidance: Guidance | None) -> torch.Tensor:
    """The trajectory [steps, B, C, H, W] through the ops of a backend."""
    # the denoiser's own ops are the reference's: test_denoiser.py has them, and the interpreter is slow
    step_ops = {op: backend for op in ops.OPS if op not in ("adaln", "gated_residual_adaln")}
    engine = make_engine(config, model, ops.select(step_ops, CPU))
    engine.load(guidance)
    return torch.stack([x.clone() for x in engine.denoise(LABELS, INDICES, TARGETS)])


def make_engine(config: DistillConfig, model: DiT, kernels: ops.Ops, batch_size: int = 2) -> StepEngine:
    """An engine of a copy of the model, whose weights it may take."""
    return StepEngine(
        copy.deepcopy(model), config, kernels, CPU,
        batch_size=batch_size, class_labels=[0, 1, 2], attention=Attention("math"),
    )  # fmt: skip


def plainly(config: DistillConfig, model: DiT, guidance: Guidance | None) -> torch.Tensor:
    """The same by the plain sampler."""
    return torch.stack(list(denoise(model, LABELS, INDICES, config, guidance, TARGETS)))


def assert_equal_within_rounding(
    backend: str, settings: dict[str, Any], guided: bool = True, tolerance: float = 2e-5
) -> None:
    config, model, guidance = setting(**settings)
    got = by_ops(backend, config, model, guidance if guided else None)
    expected = plainly(config, model, guidance if guided else None)
    error = (got - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert error.max() < tolerance, error.max(dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trust_radius", ["sigma", "eps"])
@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating", "learnability", "density_ratio"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_ten_guided_steps_equal_the_plain_sampler(backend, name, objective, trust_radius) -> None:
    settings = {**SAMPLERS[name], "objective": objective, "trust_radius": trust_radius}
    assert_equal_within_rounding(backend, settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_guidance(backend) -> None:
    assert_equal_within_rounding(backend, {}, guided=False)


@pytest.mark.parametrize(
    "settings", [{"jacobian": "full"}, {"discriminator": "resnet-18", "size": 16}], ids=["full", "resnet"]
)
def test_what_no_op_computes_takes_autograd(settings) -> None:
    # a step beside a kink of ResNet's ReLUs turns the gradient: rounding grows to 5e-4
    assert_equal_within_rounding("reference", settings, tolerance=2e-3)


def test_a_shape_that_the_kernel_refuses_is_composed_of_the_other_ops_and_said(capsys) -> None:
    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise ValueError("discriminator_guidance: this shape is too large")

    config, model, guidance = setting()
    refusing = dataclasses.replace(ops.select("auto", CPU), discriminator_guidance=refuse)
    engine = make_engine(config, model, refusing)
    engine.load(guidance)
    got = torch.stack([x.clone() for x in engine.denoise(LABELS, INDICES, TARGETS)])
    assert torch.equal(got, by_ops("reference", config, model, guidance))
    assert capsys.readouterr().err.count("this shape is too large") == 1


def test_the_guided_window_is_closed() -> None:
    config, model, _ = setting()
    timesteps = [c.timestep / 1000 for c in step_coefficients(10)]
    config = dataclasses.replace(config, guidance_window=(timesteps[2], timesteps[5]))
    engine = make_engine(config, model, ops.select("auto", CPU))
    assert [step for step in range(10) if engine._active(step)] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "settings", [{}, {"discriminator": "resnet-18", "size": 16}], ids=["ops", "autograd"]
)
def test_a_second_guidance_is_copied_into_the_memory_of_the_first(settings) -> None:
    config, model, guidance = setting(objective="learnability", **settings)
    other = dataclasses.replace(
        guidance, discriminator=guidance.real_classifier, real_classifier=guidance.discriminator
    )
    engine = make_engine(config, model, ops.select("auto", CPU))
    for each in (guidance, other, None, guidance):
        engine.load(each)
        got = [x.clone() for x in engine.denoise(LABELS, INDICES, TARGETS)]
        fresh = make_engine(config, model, ops.select("auto", CPU))
        fresh.load(each)
        expected = [x.clone() for x in fresh.denoise(LABELS, INDICES, TARGETS)]
        assert torch.equal(torch.stack(got), torch.stack(expected))
