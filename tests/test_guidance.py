"""The guidance: objectives and their gradients, direction, trust radius and window."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from acs_fast import diffusion, guidance
from acs_fast.guidance import Guidance

OBJECTIVES = ("adversarial", "nonsaturating", "learnability", "density_ratio")
SHAPE, NUM_CLASSES = (2, 3, 3), 4
LABELS = torch.tensor([0, 3, 1, 2, 3])


def network(seed, inputs=18):
    """A smooth float64 classifier of [B, 2, 3, 3], or of other `inputs`, into 4 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, NUM_CLASSES))
    return layers.double().requires_grad_(False)


def make(objective="adversarial", **values):
    settings = {
        "discriminator": network(1), "real_classifier": network(2) if objective == "learnability" else None,
        "omega": 0.5, "scale": 0.3, "trust_radius": "sigma", "window": (0.1, 0.7), "jacobian": "identity",
    }  # fmt: skip
    return Guidance(objective=objective, **{**settings, **values})


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(LABELS), *SHAPE, generator=generator, dtype=torch.float64)


class Decoder(nn.Module):
    """A smooth float64 stand-in for a VAE: [B, 2, 3, 3] to [B, 3, 6, 6]; `seen` has every batch's size."""

    def __init__(self, seed, width):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.layers = nn.Sequential(first, nn.Tanh(), nn.Upsample(scale_factor=2), last)
        self.layers.double().requires_grad_(False)
        self.seen = []

    def forward(self, latents):
        self.seen.append(len(latents))
        return self.layers(latents)


SPACES = {"latent": lambda: None, "pixel": lambda: Decoder(5, 8), "pixel-tiny": lambda: Decoder(6, 3)}


def make_in(space, objective="adversarial", **values):
    """A guidance whose classifiers see what that space shows them."""
    decode = SPACES[space]()
    inputs = 18 if decode is None else 108
    networks = {
        "discriminator": network(1, inputs),
        "real_classifier": network(2, inputs) if objective == "learnability" else None,
    }
    return make(objective, decode=decode, **{**networks, **values})


def plain_value(guide, z, label):
    """L of one sample in plain probabilities, as METHOD.md's table writes it."""
    z = z if guide.decode is None else guide.decode(z[None])[0]
    if guide.objective == "density_ratio":
        return -math.log(1 + math.exp(-guide.discriminator(z[None])[0, label]))
    p = guide.discriminator(z[None])[0].exp()
    p = p[label] / p.sum()
    if guide.objective == "adversarial":
        return -math.log(p)
    if guide.objective == "nonsaturating":
        return math.log(1 - p)
    q = guide.real_classifier(z[None])[0].exp()
    return -math.log(p) + guide.omega * math.log(q[label] / q.sum())


def finite_difference(guide, z, label, h=1e-5, x0=lambda x: x):
    """Central differences of L(x0(z)) at one sample, from the plain formula."""
    gradient = torch.zeros_like(z)
    for i in range(z.numel()):
        step = torch.zeros_like(z)
        step.view(-1)[i] = h
        rise = plain_value(guide, x0(z + step), label) - plain_value(guide, x0(z - step), label)
        gradient.view(-1)[i] = rise / (2 * h)
    return gradient


def logit_gradient(objective, *logits, **values):
    """d sum L / d logits, as a tuple of one tensor for every logits argument."""
    leaves = [value.clone().requires_grad_() for value in logits]
    value = getattr(guidance, objective)(*leaves, LABELS, **values)
    return torch.autograd.grad(value.sum(), leaves)


def random_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(len(LABELS), NUM_CLASSES, generator=generator, dtype=torch.float64)


def one_hot():
    return nn.functional.one_hot(LABELS, NUM_CLASSES).double()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_is_the_formula(objective):
    guide, z = make(objective), samples()
    expected = [plain_value(guide, row, label) for row, label in zip(z, LABELS.tolist(), strict=True)]
    torch.testing.assert_close(guide.value(z, LABELS), torch.tensor(expected, dtype=torch.float64))


def test_adversarial_gradient_is_softmax_minus_one_hot():
    logits = random_logits(1)
    (got,) = logit_gradient("adversarial", logits)
    torch.testing.assert_close(got, logits.softmax(1) - one_hot())


def test_nonsaturating_gradient_is_softmax_of_the_others_minus_softmax():
    logits = random_logits(1)
    others = (logits.exp() * (1 - one_hot())) / (logits.exp() * (1 - one_hot())).sum(1, keepdim=True)
    (got,) = logit_gradient("nonsaturating", logits)
    torch.testing.assert_close(got, others - logits.softmax(1))


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0], ids=lambda v: f"omega-{v}")
def test_learnability_gradient_is_the_difference_of_two_adversarial_ones(omega):
    logits, real_logits = random_logits(1), random_logits(2)
    of_logits, of_real = logit_gradient("learnability", logits, real_logits, omega=omega)
    torch.testing.assert_close(of_logits, logits.softmax(1) - one_hot())
    torch.testing.assert_close(of_real, -omega * (real_logits.softmax(1) - one_hot()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_direction_is_the_normalised_finite_difference(objective):
    guide, z = make(objective), samples()
    direction = guide.direction(z, z, LABELS)
    for row, label, got in zip(z, LABELS.tolist(), direction, strict=True):
        gradient = finite_difference(guide, row, label)
        torch.testing.assert_close(got, gradient / gradient.norm(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_along_the_direction_raises_every_value(objective):
    guide, z = make(objective), samples()
    before, step = guide.value(z, LABELS), 1e-4 * guide.direction(z, z, LABELS)
    assert (guide.value(z + step, LABELS) > before).all()
    assert (guide.value(z - step, LABELS) < before).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_direction_has_unit_norm_for_each_sample_alone(objective, jacobian):
    guide, x = make(objective, jacobian=jacobian), samples().requires_grad_()
    direction = guide.direction(x, x.tanh(), LABELS)
    assert direction.shape == x.shape and not direction.requires_grad
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(len(LABELS), dtype=torch.float64))
    alone = [
        guide.direction(one, one.tanh(), LABELS[i : i + 1])
        for i, one in ((i, x.detach()[i : i + 1].requires_grad_()) for i in range(len(LABELS)))
    ]
    torch.testing.assert_close(direction, torch.cat(alone))


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_direction_of_a_zero_gradient_is_zero(jacobian, dtype):
    constant = network(1).to(dtype)
    for parameter in constant.parameters():
        parameter.zero_()
    guide, x = make(discriminator=constant, jacobian=jacobian), samples().to(dtype).requires_grad_()
    assert torch.equal(guide.direction(x, 2 * x, LABELS), torch.zeros_like(x))


def test_small_gradients_keep_unit_norm():
    faint = network(1).float()
    faint[3].weight.mul_(1e-12)
    z = samples().float()
    norm = make(discriminator=faint).direction(z, z, LABELS).flatten(1).norm(dim=1)
    torch.testing.assert_close(norm, torch.ones(len(LABELS)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_identity_and_full_jacobian_agree_where_x0_is_a_multiple_of_x(objective):
    x = samples().requires_grad_()
    identity, full = (make(objective, jacobian=j).direction(x, 0.4 * x, LABELS) for j in ("identity", "full"))
    torch.testing.assert_close(identity, full)


def test_full_jacobian_goes_through_the_denoiser():
    x = samples().requires_grad_()
    mix = torch.linspace(-2, 3, 18 * 18, dtype=torch.float64).sin().view(18, 18)
    x0 = (x.flatten(1) @ mix).view_as(x)
    at_x0 = make().direction(x, x0, LABELS)
    through = (at_x0.flatten(1) @ mix.T).view_as(x)
    expected = through / through.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(make(jacobian="full").direction(x, x0, LABELS), expected)
    assert (expected - at_x0).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.3, 2.0], ids=lambda v: f"scale-{v}")
@pytest.mark.parametrize("step", [0, 3, 9], ids=lambda v: f"step-{v}")
def test_radii_follow_their_formulas(scale, step):
    eps, c = samples(4), diffusion.step_coefficients(10)[step]
    a, a_prev = c.alpha_cumprod, c.alpha_cumprod_prev
    sigma = math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    got = make(trust_radius="sigma", scale=scale).radius(eps, c)
    assert got.shape == (len(LABELS), 1, 1, 1) and got.dtype == eps.dtype
    torch.testing.assert_close(got, torch.full_like(got, scale * sigma * math.sqrt(18)), rtol=1e-9, atol=0)
    got = make(trust_radius="eps", scale=scale).radius(eps, c)
    expected = [scale * math.sqrt(1 - a) * math.sqrt((row**2).sum()) for row in eps]
    torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("timestep", "inside"),
    [(0, False), (99, False), (100, True), (400, True), (700, True), (701, False), (999, False)],
)
def test_window_is_a_closed_interval(timestep, inside):
    c = dataclasses.replace(diffusion.step_coefficients(10)[4], timestep=timestep)
    assert make(window=(0.1, 0.7)).active(c) is inside


def test_window_ends_are_exact():
    for timestep in range(0, 1000, 7):
        c = dataclasses.replace(diffusion.step_coefficients(2)[1], timestep=timestep)
        assert make(window=(timestep / 1000, timestep / 1000)).active(c)
        assert make(window=(0.0, 1.0)).active(c)


@pytest.mark.parametrize("margin", [14, 18, 30], ids=lambda m: f"margin-{m}")
@pytest.mark.parametrize("objective", ["adversarial", "nonsaturating"])
def test_direction_is_right_where_the_discriminator_is_sure(objective, margin):
    sign = 1.0 if objective == "adversarial" else -1.0  # sure of the class, or sure that it is another one
    sure = network(1)
    sure[3].bias.copy_(torch.tensor([sign * margin, 0.0, 0.0, 0.0]))
    z, labels = samples(), torch.zeros(len(LABELS), dtype=torch.long)
    exact = make(objective, discriminator=sure).direction(z, z, labels)
    single = make(objective, discriminator=sure.float()).direction(z.float(), z.float(), labels)
    cosine = (single.double() * exact).flatten(1).sum(dim=1)
    assert cosine.min() > 0.9999


def test_a_broken_discriminator_is_not_silently_ignored():
    broken = network(1)
    broken[1].weight[0, 0] = math.nan
    z = samples()
    assert make(discriminator=broken).direction(z, z, LABELS).isnan().any()


def mixed(x):
    """A predicted x0 that is no multiple of x: a smooth map of [..., 2, 3, 3]."""
    mix = torch.linspace(-2, 3, 18 * 18, dtype=torch.float64).sin().view(18, 18)
    return 0.5 * x.sin() + (x.reshape(-1, 18) @ mix).tanh().view_as(x)


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_in_every_space_is_the_finite_difference(objective, space, jacobian):
    guide, x = make_in(space, objective, jacobian=jacobian), samples().requires_grad_()
    gradient = guide.gradient(x, mixed(x), LABELS)
    direction = guide.direction(x, mixed(x), LABELS)
    assert gradient.shape == x.shape and gradient.dtype == x.dtype and not gradient.requires_grad
    for row, label, g, d in zip(x.detach(), LABELS.tolist(), gradient, direction, strict=True):
        if jacobian == "full":
            expected = finite_difference(guide, row, label, x0=mixed)
        else:
            expected = finite_difference(guide, mixed(row), label)
        torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(d, expected / expected.norm(), rtol=1e-6, atol=1e-7)
    assert torch.equal(guide.gradient(x, mixed(x), LABELS), gradient)


def test_the_spaces_give_other_directions():
    z = samples()
    directions = [make_in(space).direction(z, z, LABELS) for space in SPACES]
    for i, a in enumerate(directions):
        for b in directions[:i]:
            assert ((a * b).flatten(1).sum(dim=1) < 0.9).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_along_the_direction_raises_the_value_of_the_decode(objective):
    guide, z = make_in("pixel", objective), samples()
    before, step = guide.value(z, LABELS), 1e-4 * guide.direction(z, z, LABELS)
    assert (guide.value(z + step, LABELS) > before).all()


@pytest.mark.parametrize("space", SPACES)
def test_the_gradient_passes_straight_through_the_clamp_of_x0(space):
    guide, x0 = make_in(space), 3 * samples()
    assert (x0.abs() > 1).any() and (x0.abs() < 1).any()
    clipped = guide.gradient(x0, x0, LABELS, clip=True)
    assert torch.equal(clipped, guide.gradient(x0, x0.clamp(-1, 1), LABELS))
    assert (clipped != 0).all()


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("decode_batch", [1, 2, 5, 9], ids=lambda n: f"by-{n}")
def test_decoding_in_parts_gives_the_same_gradient(decode_batch, jacobian):
    x = samples().requires_grad_()
    whole = make_in("pixel", jacobian=jacobian).gradient(x, mixed(x), LABELS)
    guide = make_in("pixel", jacobian=jacobian, decode_batch=decode_batch)
    torch.testing.assert_close(guide.gradient(x, mixed(x), LABELS), whole)
    assert sum(guide.decode.seen) == len(LABELS) and max(guide.decode.seen) == min(decode_batch, len(LABELS))


@pytest.mark.parametrize("jacobian", ["identity", "full"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_in_bfloat16_give_a_float32_gradient(objective, space, jacobian):
    def directed(guide, x):
        x = x.requires_grad_()
        return guide.direction(x, x.tanh(), LABELS)

    guide = make_in(space, objective, jacobian=jacobian)
    exact = directed(guide, samples())
    for module in (guide.discriminator, guide.real_classifier, guide.decode):
        if module is not None:
            module.bfloat16()
    decode = guide.decode and (lambda x0: guide.decode(x0.bfloat16()))  # as a VAE in bf16 does
    low = dataclasses.replace(guide, decode=decode)
    assert low.value(samples().float(), LABELS).dtype == torch.float32
    direction = directed(low, samples().float())
    assert direction.dtype == torch.float32
    assert (direction.double() * exact).flatten(1).sum(dim=1).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_dtypes_are_computed_without_a_cast(dtype):
    plain = network(1).to(dtype)
    z = samples().to(dtype)
    value = make(discriminator=plain).value(z, LABELS)
    assert value.dtype == dtype and torch.equal(value, guidance.adversarial(plain(z), LABELS))


@pytest.mark.parametrize("jacobian", ["identity", "full"])
def test_the_gradient_has_the_dtype_of_x(jacobian):
    x = samples().float().requires_grad_()
    guide = make(discriminator=network(1).float(), jacobian=jacobian)
    assert guide.gradient(x, x.bfloat16(), LABELS).dtype == torch.float32


def unit_vectors(seed, count, zeros=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(NUM_CLASSES, count, math.prod(SHAPE), generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=2, keepdim=True)
    vectors[:, count - zeros :] = 0
    return vectors


@pytest.mark.parametrize("zeros", [0, 2])
def test_repulsion_is_the_gradient_of_the_nearest_cosine(zeros):
    x, earlier = samples(3).requires_grad_(), unit_vectors(7, 5, zeros)[LABELS]
    cosine = torch.einsum("bd,bmd->bm", x.flatten(1), earlier) / x.flatten(1).norm(dim=1, keepdim=True)
    (expected,) = torch.autograd.grad(cosine[:, : 5 - zeros].max(dim=1).values.sum(), x)
    torch.testing.assert_close(guidance.repulsion(x.detach(), earlier), expected)


def test_repulsion_from_nothing_is_nothing():
    assert not guidance.repulsion(samples(3), torch.zeros(len(LABELS), 4, math.prod(SHAPE))).any()


def test_repulsion_is_subtracted_by_its_weight():
    x, earlier = samples(3), unit_vectors(7, 5)
    plain, repelled = make(), make(gamma=0.7, earlier=earlier)
    difference = plain.gradient(x, x, LABELS) - repelled.gradient(x, x, LABELS)
    torch.testing.assert_close(difference, 0.7 * guidance.repulsion(x, earlier[LABELS]))
