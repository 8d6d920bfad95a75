"""Backends: `fast` is held against `reference`, others are found by their entry point and checked."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from acs_fast import DistillConfig, InputError, backends, get_backend
from acs_fast.backends import GROUP, METHODS, Backend, Fast, Reference, why_no_backend
from acs_fast.guidance import unit
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.networks import Networks
from tests.test_sampler import randomise

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [3, 8]
SETTINGS: dict[str, Any] = {
    "num_sampling_steps": 8, "discriminator": "convnet-2", "discriminator_steps": 20, "guidance_scale": 0.3,
}  # fmt: skip
LABELS, INDICES = torch.tensor([3, 8, 3, 8, 3]), torch.arange(5)
TARGETS = torch.tensor([0, 1, 0, 1, 0])


def prepared(name: str, **settings: Any) -> Backend:
    shape = DiTConfig(8, 2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    networks = Networks(randomise(DiT(shape), 0.2, seed=3), None, None)
    backend = get_backend(name)
    config = DistillConfig(**{**SETTINGS, **settings})
    backend.prepare(config, networks, class_labels=CLASSES, batch_size=3)
    return backend


@pytest.fixture(scope="module")
def both() -> tuple[Backend, Backend]:
    return prepared("fast"), prepared("reference")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def test_what_was_chosen_is_kept(both) -> None:
    assert both[0].config.attention == "flash" and both[0].config.compile == "off"
    assert both[0].generator.engine is not None and both[1].generator.engine is None


def test_a_batch_without_guidance_is_the_same(both) -> None:
    a, b = (backend.sample(LABELS, INDICES) for backend in both)
    assert a.shape == (5, 1, 8, 8) and a.dtype == torch.float32 and close(a, b)
    assert torch.equal(both[0].sample(LABELS, INDICES), a)
    assert not close(both[0].sample(LABELS, INDICES + 1), a, 0.1)


def test_the_discriminators_are_the_same_and_know_their_images(both) -> None:
    samples = both[1].sample(LABELS, INDICES)
    a, b = (backend.fit(samples, TARGETS, seed=4) for backend in both)
    assert all(close(p, q, 1e-3) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert (a(samples).argmax(dim=1) == TARGETS).all()
    assert not a.training and not any(p.requires_grad for p in a.parameters())
    other, warm = both[0].fit(samples, TARGETS, seed=5), both[0].fit(samples, TARGETS, seed=4, previous=b)
    assert not close(other.classifier.weight, a.classifier.weight, 0.1)
    assert not close(warm.classifier.weight, a.classifier.weight, 1e-3)


@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating"])
@pytest.mark.parametrize("network", ["convnet-2", "convnet-3"])
def test_the_guidance_gradient_is_the_same_and_the_finite_differences(objective, network) -> None:
    fast, reference = (prepared(n, objective=objective, discriminator=network) for n in ("fast", "reference"))
    samples = reference.sample(LABELS, INDICES)
    f = reference.fit(samples, TARGETS)
    x0 = 0.5 * samples
    a, b = (backend.guidance_gradient(f, x0, TARGETS) for backend in (fast, reference))
    assert close(a, b, 1e-3) and torch.allclose(b.flatten(1).norm(dim=1), torch.ones(5), atol=1e-5)
    guidance = reference.generator.steer(f.double(), None)
    moved = 1e-6 * unit(torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).double())
    up, down = (guidance.value((x0.double() + s * moved).clamp(-1, 1), TARGETS) for s in (1, -1))
    slope = (up - down) / 2e-6
    g = guidance.gradient(x0.double(), x0.double(), TARGETS)
    assert torch.allclose(slope, (g * moved / 1e-6).flatten(1).sum(dim=1), rtol=1e-3, atol=1e-9)


def test_guided_samples_are_the_same_and_are_moved(both) -> None:
    plain = both[1].sample(LABELS, INDICES)
    f = both[1].fit(plain, TARGETS)
    a, b = (backend.sample(LABELS, INDICES, f, targets=TARGETS) for backend in both)
    assert close(a, b, 1e-3) and not close(plain, b, 1e-2)


def test_given_latents_and_steps_are_seen_by_both(both) -> None:
    latents = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    seen: dict[str, list[tuple[int, int, int]]] = {}
    results = []
    for backend in both:
        steps = seen.setdefault(type(backend).__name__, [])

        def on_step(number: int, timestep: int, x: Tensor, steps: Any = steps) -> None:
            steps.append((number, timestep, len(x)))
            if number == 5:
                x.mul_(0.5)

        results.append(backend.sample(LABELS, INDICES, latents=latents, on_step=on_step))
    assert close(*results) and seen["Fast"] == seen["Reference"]
    assert [number for number, _, _ in seen["Fast"]] == 2 * list(range(8))  # batches of 2 and 3
    assert seen["Fast"][0][1:] == (999, 2) and seen["Fast"][-1][1:] == (0, 3)
    assert not close(both[0].sample(LABELS, INDICES, latents=latents), results[0], 0.05)
    assert not close(both[0].sample(LABELS, INDICES), results[0], 0.05)


def test_decode_of_a_pixel_model_is_the_sample(both) -> None:
    samples = both[0].sample(LABELS, INDICES)
    assert all(backend.decode(samples) is samples for backend in both)


def test_objectives_that_need_real_images_are_refused() -> None:
    with pytest.raises(InputError, match="'density_ratio' needs real images, which a Backend's fit is not"):
        prepared("fast", objective="density_ratio")


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("acs_loop", ROOT / "examples" / "acs_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_written_once_is_the_same_on_both() -> None:
    """Until a discriminator's training has made rounding visible, as AdamW does of it."""
    loop = load_example()
    assert len((ROOT / "examples" / "acs_loop.py").read_text().splitlines()) <= 65
    config = DistillConfig(**SETTINGS, ipc=loop.IPC, num_curricula=loop.CURRICULA)
    a, b = (loop.sample_set(get_backend(name), config) for name in ("fast", "reference"))
    assert torch.equal(a[1], b[1]) and len(a[2]) == loop.CURRICULA - 1
    first = len(loop.CLASSES) * loop.IPC // loop.CURRICULA
    assert close(a[0][:first], b[0][:first]) and close(a[0], b[0], 0.05)
    assert not torch.equal(a[0][first:], a[0][:-first])


# those of other packages

TOY = """
import torch

class Toy:
    def prepare(self, config, networks=None, *, class_labels, batch_size, schedule=None): self.config = config
    def sample(self, class_labels, indices, discriminator=None, *, targets=None, latents=None, on_step=None):
        return torch.zeros(len(class_labels), 1, 8, 8)
    def fit(self, samples, targets, *, seed=0, previous=None): return torch.nn.Flatten()
    def guidance_gradient(self, discriminator, pred_xstart, targets): return torch.zeros_like(pred_xstart)
    def decode(self, samples): return samples

class Lacking(Toy):
    decode = None

class Needy(Toy):
    def decode(self, samples, vae): return samples

class Narrow(Toy):
    def sample(self, class_labels, indices): return None

def broken(): raise RuntimeError("no licence")
"""
USE = """
import sys
from acs_fast import InputError, get_backend
for name in sys.argv[1:]:
    try:
        print(type(get_backend(name)).__name__)
    except InputError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with backends, as pip leaves it in a folder of the path."""
    site = tmp_path_factory.mktemp("site")
    (site / "acs_toy.py").write_text(TOY)
    info = site / "acs_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acs-toy\nVersion: 1.0\n")
    lines = [
        "toy = acs_toy:Toy",
        "lacking = acs_toy:Lacking",
        "narrow = acs_toy:Narrow",
        "needy = acs_toy:Needy",
    ]
    lines += ["broken = acs_toy:broken", "gone = acs_gone:Toy"]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    return site


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy", "Toy"),
        ("lacking", "the backend 'lacking' (acs_toy:Lacking) is no acs_fast.Backend: it has no decode(); a "
         "backend has prepare, sample, fit, guidance_gradient, decode"),
        ("narrow", "the backend 'narrow' (acs_toy:Narrow) is no acs_fast.Backend: its sample() takes no "
         "discriminator, targets, latents, on_step; it is called with class_labels, indices, discriminator, "
         "targets, latents, on_step"),
        ("needy", "the backend 'needy' (acs_toy:Needy) is no acs_fast.Backend: its decode() needs vae too; "
         "it is called with samples"),
        ("broken", "the backend 'broken' (acs_toy:broken) cannot be loaded (RuntimeError: no licence)"),
        ("gone", "the backend 'gone' (acs_gone:Toy) cannot be loaded (ModuleNotFoundError: No module named "
         "'acs_gone')"),
        ("none", "there is no backend 'none'; installed are broken, fast, gone, lacking, narrow, "
         "needy, reference, toy"),
    ],
)  # fmt: skip
def test_a_contributed_backend_is_found_and_checked(installed, name, message) -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(installed)!r}]\n{USE}"
    command = [sys.executable, "-c", code, name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == message


def test_the_own_ones_are_offered_too() -> None:
    declared = {p.name: p.value for p in entry_points(group=GROUP) if p.name in backends.OWN}
    assert declared == {"fast": "acs_fast.backends:Fast", "reference": "acs_fast.backends:Reference"}
    for kind in (Fast, Reference):
        assert why_no_backend(kind()) is None
    assert all(hasattr(Backend, name) and getattr(Backend, name).__doc__ for name in METHODS)
