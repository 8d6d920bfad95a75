"""The sampling loop against a naive float64 loop, written image by image from the equations of METHOD.md."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from acs_fast import sampler
from acs_fast.config import DistillConfig
from acs_fast.guidance import Guidance
from acs_fast.kernels.reference import philox_normal
from acs_fast.models.dit import DiT, DiTConfig
from acs_fast.sampler import denoise

CLASSES, SHAPE = 3, (4, 4, 4)
LABELS, INDICES = [0, 2, 1], [5, 0, 7]
SAMPLERS = {
    "ddpm-learned-range": {"sampler": "ddpm", "variance": "auto"},
    "ddpm-fixed-small": {"sampler": "ddpm", "variance": "fixed_small"},
    "ddim-eta-0": {"sampler": "ddim", "eta": 0.0},
    "ddim-eta-0.7": {"sampler": "ddim", "eta": 0.7},
}


def randomise(module, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def make_model(**shape):
    config = DiTConfig(
        4, 2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=CLASSES, learn_sigma=True
    )
    return randomise(DiT(dataclasses.replace(config, **shape)), 0.3, seed=3)


class Asinh(nn.Module):
    """Smooth and never flat: a random denoiser's x0 is hundreds wide, which saturates the usual functions."""

    def forward(self, x):
        return torch.asinh(x)


def make_network(seed, inputs=64):
    layers = nn.Flatten(), nn.Linear(inputs, 8), Asinh(), nn.Linear(8, CLASSES)
    return randomise(nn.Sequential(*layers), 0.3, seed)


class Decoder(nn.Module):
    """A smooth stand-in for a VAE: [B, 4, 4, 4] to [B, 3, 8, 8]."""

    def __init__(self, width, seed):
        super().__init__()
        first, last = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.layers = nn.Sequential(first, Asinh(), nn.Upsample(scale_factor=2), last)
        randomise(self, 0.3, seed)

    def forward(self, x):
        return self.layers(x)


SPACES = {"latent": None, "pixel": Decoder(8, seed=5), "pixel-tiny": Decoder(3, seed=6)}


def make_config(**settings):
    defaults = {"num_sampling_steps": 4, "seed": 2**33 + 1, "cfg_scale": 2.5, "guidance_window": (0.2, 0.8)}
    return DistillConfig(**{**defaults, **settings})


def make_guidance(config, dtype=torch.float32):
    decode = copy.deepcopy(SPACES[config.guidance_space])
    inputs = 64 if decode is None else 192
    networks = make_network(1, inputs).to(dtype), make_network(2, inputs).to(dtype)
    how_far = config.guidance_scale, config.trust_radius, config.guidance_window, config.jacobian
    return Guidance(config.objective, *networks, config.omega, *how_far, decode and decode.to(dtype))


def walk(model, config, guidance=None, labels=LABELS, indices=INDICES, targets=None):
    """Every x of the trajectory: [steps, B, C, H, W]."""
    targets = None if targets is None else torch.tensor(targets)
    return torch.stack(
        list(denoise(model, torch.tensor(labels), torch.tensor(indices), config, guidance, targets))
    )


def naive_objective(guidance, z, target):
    z = z if guidance.decode is None else guidance.decode(z[None])[0]
    if guidance.objective == "density_ratio":
        return guidance.discriminator(z[None])[0, target].sigmoid().log()
    p = guidance.discriminator(z[None])[0].softmax(0)[target]
    if guidance.objective == "adversarial":
        return -p.log()
    if guidance.objective == "nonsaturating":
        return (1 - p).log()
    return -p.log() + guidance.omega * guidance.real_classifier(z[None])[0].softmax(0)[target].log()


def naive_walk(model, config, guidance, label, index, target):
    """Equations (1) to (4) for one image, with nothing but the denoiser taken from the package."""
    steps, channels = config.num_sampling_steps, model.config.in_channels
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = [round(i * 999 / (steps - 1)) for i in range(steps)]

    def noise(step):
        key = (torch.tensor([number]) for number in (label, index, config.seed, step))
        return philox_normal(*key, shape=SHAPE)[0].double()

    def denoiser(x, t, y):
        return model(x[None], torch.tensor([t]), torch.tensor([y]))[0]

    x, trajectory = noise(1000), []
    for i in reversed(range(steps)):
        t, a = times[i], alphas[times[i]]
        a_prev = alphas[times[i - 1]] if i > 0 else torch.tensor(1.0, dtype=torch.float64)
        guided = guidance is not None and config.guidance_window[0] <= t / 1000 <= config.guidance_window[1]
        x = x.detach().requires_grad_()
        cond, null = denoiser(x, t, label), denoiser(x, t, CLASSES)
        eps = [
            null[k] + config.cfg_scale * (cond[k] - null[k])
            if config.cfg_channels is None or k < config.cfg_channels
            else cond[k]
            for k in range(channels)
        ]
        eps = torch.stack(eps)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        if config.clip_denoised:
            x0 = x0 + (x0.clamp(-1, 1) - x0).detach()  # the gradient passes straight through
        beta = 1 - a / a_prev
        posterior = beta * (1 - a_prev) / (1 - a)
        push = 0.0
        if guided:
            z = x0 if config.jacobian == "full" else x0.detach().requires_grad_()
            value = naive_objective(guidance, z, target)
            (g,) = torch.autograd.grad(value, x if config.jacobian == "full" else z)
            radius = posterior.sqrt() * math.sqrt(64)
            if config.trust_radius == "eps":
                radius = (1 - a).sqrt() * eps.norm()
            push = config.guidance_scale * radius * g / g.norm() if g.any() else g
        if config.sampler == "ddpm":
            mean = x * (a / a_prev).sqrt() * (1 - a_prev) / (1 - a) + x0 * a_prev.sqrt() * beta / (1 - a)
            variance = posterior
            if config.variance != "fixed_small" and model.config.learn_sigma and i > 0:
                v = (cond[channels:] + 1) / 2
                variance = (v * beta.log() + (1 - v) * posterior.log()).exp()
            x = mean + variance.sqrt() * noise(i)
        else:
            sigma = config.eta * posterior.sqrt()
            implied = (x - a.sqrt() * x0) / (1 - a).sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * implied + sigma * noise(i)
        x = (x + push).detach()
        trajectory.append(x)
    return torch.stack(trajectory)


def naive_batch(model, config, guidance, targets=LABELS):
    rows = zip(LABELS, INDICES, targets, strict=True)
    return torch.stack([naive_walk(model, config, guidance, *row) for row in rows], dim=1)


@pytest.fixture
def float64_noise(monkeypatch):
    """The same noise in float64, so that the loop runs in float64 and compares tightly."""
    monkeypatch.setattr(sampler, "philox_normal", lambda *args, **key: philox_normal(*args, **key).double())


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("trust_radius", ["sigma", "eps"])
@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating", "learnability", "density_ratio"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_sampling_follows_the_equations(float64_noise, name, objective, trust_radius, jacobian):
    config = make_config(objective=objective, trust_radius=trust_radius, jacobian=jacobian, **SAMPLERS[name])
    model, guidance = make_model().double(), make_guidance(config, torch.float64)
    got = walk(model, config, guidance)
    assert not got.requires_grad
    torch.testing.assert_close(got, naive_batch(model, config, guidance), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cfg_channels": 3},
        {"cfg_channels": 3, "jacobian": "full"},
        {"cfg_scale": 1.0},
        {"clip_denoised": True},
        {"clip_denoised": True, "sampler": "ddim", "eta": 0.7},
        {"clip_denoised": True, "jacobian": "full", "trust_radius": "eps"},
        {"clip_denoised": True, "jacobian": "full", "guidance_window": (0.0, 0.3), "num_sampling_steps": 9},
        {"guidance_window": (0.0, 1.0), "trust_radius": "eps"},
        {"num_sampling_steps": 2},
        {"num_sampling_steps": 9, "seed": 0},
        {"guidance_space": "pixel", "clip_denoised": True},
        {"guidance_space": "pixel-tiny", "clip_denoised": True, "jacobian": "full"},
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_settings_follow_the_equations(float64_noise, settings, guided):
    config = make_config(**settings)
    model, guidance = make_model().double(), make_guidance(config, torch.float64) if guided else None
    got = walk(model, config, guidance)
    torch.testing.assert_close(got, naive_batch(model, config, guidance), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_single_precision_stays_close_to_float64(name, clip):
    config = make_config(clip_denoised=clip, **SAMPLERS[name])
    got = walk(make_model(), config, make_guidance(config))
    expected = naive_batch(make_model().double(), config, make_guidance(config, torch.float64))
    assert got.dtype == torch.float32
    error = (got.double() - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert error.max() < 1e-4


def test_settings_change_the_samples():
    variants = [
        {},
        {"cfg_channels": 3},
        {"clip_denoised": True},
        {"cfg_scale": 1.0},
        {"trust_radius": "eps"},
        {"seed": 1},
        {"jacobian": "full"},
        {"variance": "fixed_small"},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7},
        {"objective": "learnability"},
        {"objective": "density_ratio"},
        {"guidance_scale": 0.5},
        {"guidance_window": (0.2, 0.5)},
        {"guidance_space": "pixel"},
        {"guidance_space": "pixel-tiny"},
        {"guidance_space": "pixel", "jacobian": "full"},
    ]
    configs = [make_config(**variant) for variant in variants]
    ends = [walk(make_model(), config, make_guidance(config))[-1] for config in configs]
    for i, a in enumerate(ends):
        for j, b in enumerate(ends[:i]):
            assert (a - b).abs().max() > 1e-2, (variants[i], variants[j])


def test_model_without_variance_channels_takes_the_fixed_variance():
    config, model = make_config(), make_model(learn_sigma=False)
    assert torch.equal(walk(model, config), walk(model, dataclasses.replace(config, variance="fixed_small")))
    expected = naive_batch(make_model(learn_sigma=False).double(), config, None)
    torch.testing.assert_close(walk(model, config).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "guided"),
    [
        ((0.0, 1.0), [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ((0.333, 0.555), [555, 444, 333]),
        ((0.334, 0.554), [444]),
        ((0.45, 0.55), []),
        ((0.999, 1.0), [999]),
    ],
    ids=["all", "closed-ends", "inside", "between-two-steps", "first"],
)
@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_guidance_acts_inside_the_window_only(window, guided, jacobian):
    config = make_config(num_sampling_steps=10, guidance_window=window, jacobian=jacobian)
    model, guidance, seen = make_model(), make_guidance(config), []

    class Probe(Guidance):
        def radius(self, eps, c):
            seen.append(c.timestep)
            return super().radius(eps, c)

    probe = Probe(**{field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)})
    steered, plain = walk(model, config, probe), walk(model, config)
    assert seen == guided
    before = (999 - max(guided, default=-111)) // 111  # steps before the first guided one
    assert torch.equal(steered[:before], plain[:before])
    assert (steered[before:] != plain[before:]).flatten(2).any(dim=2).all()


def test_without_guidance_the_gradient_settings_do_not_matter():
    plain = walk(make_model(), make_config())
    changed = make_config(
        objective="learnability", jacobian="full", guidance_scale=9.0, guidance_window=(0.0, 1.0)
    )
    assert torch.equal(walk(make_model(), changed), plain)
    zero = make_config(guidance_scale=0.0)
    assert torch.equal(walk(make_model(), zero, make_guidance(zero)), plain)


def test_guidance_raises_its_objective():
    config = make_config(sampler="ddim", trust_radius="eps", guidance_scale=0.2, guidance_window=(0.0, 0.2))
    guidance = make_guidance(config)  # the last step alone is guided
    labels = torch.tensor(LABELS)
    guided, plain = (walk(make_model(), config, g)[-1] for g in (guidance, None))
    assert (guidance.value(guided, labels) > guidance.value(plain, labels)).all()


def test_targets_are_the_labels_that_the_discriminator_sees(float64_noise):
    config, targets = make_config(), [2, 0, 0]
    model, guidance = make_model().double(), make_guidance(config, torch.float64)
    got = walk(model, config, guidance, targets=targets)
    torch.testing.assert_close(got, naive_batch(model, config, guidance, targets), rtol=1e-8, atol=1e-9)
    assert torch.equal(walk(model, config, guidance, targets=LABELS), walk(model, config, guidance))
    assert (got[-1] - walk(model, config, guidance)[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_an_image_does_not_depend_on_its_batch(guided):
    config, model = make_config(clip_denoised=True), make_model()
    guidance = make_guidance(config) if guided else None
    batch = walk(model, config, guidance)[-1]
    alone = [walk(model, config, guidance, [y], [k])[-1, 0] for y, k in zip(LABELS, INDICES, strict=True)]
    turned = walk(model, config, guidance, LABELS[::-1], INDICES[::-1])[-1].flip(0)
    larger = walk(model, config, guidance, [1, 1, *LABELS], [0, 1, *INDICES])[-1, 2:]
    for other in (torch.stack(alone), turned, larger):
        torch.testing.assert_close(other, batch, rtol=1e-3, atol=1e-4)
    assert torch.equal(walk(model, config, guidance)[-1], batch)  # and the same call gives the same bytes


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating", "learnability", "density_ratio"])
def test_every_guidance_space_follows_the_equations(float64_noise, objective, space, jacobian):
    config = make_config(objective=objective, guidance_space=space, jacobian=jacobian)
    model, guidance = make_model(depth=2).double(), make_guidance(config, torch.float64)
    got = walk(model, config, guidance)
    assert not got.requires_grad
    torch.testing.assert_close(got, naive_batch(model, config, guidance), rtol=1e-8, atol=1e-9)
    assert torch.equal(walk(model, config, guidance), got)


class Cast(nn.Module):
    """A denoiser that works in bf16 and looks, from outside, like one in fp32."""

    def __init__(self, model):
        super().__init__()
        self.outside = nn.Parameter(torch.zeros(1))
        self.inside, self.config, self.null_label = model, model.config, model.null_label

    def forward(self, x, timesteps, class_labels):
        assert x.dtype == torch.float32
        return self.inside(x.bfloat16(), timesteps, class_labels).float()


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_in_bfloat16_leaves_the_steps_in_float32(name, jacobian):
    config = make_config(jacobian=jacobian, **SAMPLERS[name])
    model, guidance = make_model().bfloat16(), make_guidance(config)
    got = walk(model, config, guidance)
    assert got.dtype == torch.float32 and not torch.equal(got, got.bfloat16().float())
    assert torch.equal(got, walk(Cast(model), config, guidance))
    first, exact = got[0], walk(make_model(), config, guidance)[0]
    error = (first - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert 0 < error.max() < 0.1
