"""Schedule, respacing and the sampling steps against float64 derivations from the forward process alone."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from acs_fast import diffusion
from acs_fast.diffusion import ddim_step, ddpm_step, predict_eps, predict_xstart, step_coefficients

STEPS = [2, 5, 50, 250, 1000]


def alphas_cumprod():
    """a_t of the linear schedule by a plain product, in Python floats."""
    products, product = [], 1.0
    for t in range(1000):
        product *= 1.0 - (1e-4 + t * (0.02 - 1e-4) / 999)
        products.append(product)
    return products


def bayes_posterior(x0, xt, a, a_prev):
    """Mean and variance of q(x_{t-1} | x_t, x_0) as the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    alpha = a / a_prev
    beta = 1.0 - alpha
    precision = alpha / beta + 1.0 / (1.0 - a_prev)
    mean = (math.sqrt(alpha) * xt / beta + math.sqrt(a_prev) * x0 / (1.0 - a_prev)) / precision
    return mean, 1.0 / precision


def images(seed, channels=4):
    return torch.randn(3, channels, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_steps(num_sampling_steps):
    """All but the last step (index 0), which adds no noise."""
    return step_coefficients(num_sampling_steps)[1:]


@pytest.mark.parametrize("steps", STEPS, ids=lambda s: f"{s}-steps")
def test_timesteps_are_evenly_spaced_and_rounded(steps):
    expected = [round(Fraction(i * 999, steps - 1)) for i in range(steps)]
    assert [c.timestep for c in step_coefficients(steps)] == expected
    assert expected[0] == 0 and expected[-1] == 999


@pytest.mark.parametrize("steps", STEPS, ids=lambda s: f"{s}-steps")
def test_coefficients_match_a_float64_rederivation(steps):
    table, a_prev, variances = alphas_cumprod(), 1.0, []
    for i, c in enumerate(step_coefficients(steps)):
        a = table[c.timestep]
        got = dataclasses.asdict(c)
        expected = {
            "alpha_cumprod": a,
            "alpha_cumprod_prev": a_prev,
            "max_log_variance": math.log(1 - a / a_prev),
        }
        if i == 0:  # x_{t-1} is x0 itself
            expected |= {"posterior_mean_x0": 1.0, "posterior_mean_xt": 0.0, "sigma": 0.0}
        else:
            mean_x0, variance = bayes_posterior(1.0, 0.0, a, a_prev)
            mean_xt, _ = bayes_posterior(0.0, 1.0, a, a_prev)
            expected |= {
                "posterior_mean_x0": mean_x0,
                "posterior_mean_xt": mean_xt,
                "sigma": math.sqrt(variance),
            }
            expected["min_log_variance"] = math.log(variance)
            variances.append(variance)
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12), f"{name} of step {i}"
        a_prev = a
    # IDDPM clips the last step's variance, which is zero, to that of the step before it
    assert step_coefficients(steps)[0].min_log_variance == pytest.approx(math.log(variances[0]), rel=1e-9)


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=str(steps)):
        step_coefficients(steps)


@pytest.mark.parametrize("c", noisy_steps(7), ids=lambda c: f"t{c.timestep}")
def test_ddpm_step_is_the_gaussian_posterior(c):
    x, x0, noise = images(0), images(1), images(2)
    mean, variance = bayes_posterior(x0, x, c.alpha_cumprod, c.alpha_cumprod_prev)
    torch.testing.assert_close(ddpm_step(x, x0, torch.zeros_like(x), c, None), mean, rtol=1e-9, atol=1e-9)
    expected = mean + math.sqrt(variance) * noise
    torch.testing.assert_close(ddpm_step(x, x0, noise, c, None), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", noisy_steps(7), ids=lambda c: f"t{c.timestep}")
@pytest.mark.parametrize("end", [-1.0, 0.0, 1.0], ids=["posterior", "middle", "beta"])
def test_learned_range_interpolates_the_log_variance(c, end):
    x, x0, noise = images(0), images(1), images(2)
    mean, posterior = bayes_posterior(x0, x, c.alpha_cumprod, c.alpha_cumprod_prev)
    beta = 1.0 - c.alpha_cumprod / c.alpha_cumprod_prev
    variance = {-1.0: posterior, 0.0: math.sqrt(posterior * beta), 1.0: beta}[end]
    got = ddpm_step(x, x0, noise, c, torch.full_like(x, end))
    torch.testing.assert_close(got, mean + math.sqrt(variance) * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("values", [None, 1.0], ids=["fixed", "learned"])
def test_last_ddpm_step_adds_no_noise(values):
    x, x0, c = images(0), images(1), step_coefficients(7)[0]
    values = None if values is None else torch.full_like(x, values)
    torch.testing.assert_close(ddpm_step(x, x0, images(2), c, values), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", step_coefficients(7), ids=lambda c: f"t{c.timestep}")
def test_ddim_without_eta_ignores_the_noise_and_follows_the_closed_form(c):
    x0, eps = images(1), images(2)
    x = math.sqrt(c.alpha_cumprod) * x0 + math.sqrt(1 - c.alpha_cumprod) * eps
    got = ddim_step(x, x0, images(3), c, 0.0)
    assert torch.equal(got, ddim_step(x, x0, 100 * images(4), c, 0.0))
    expected = math.sqrt(c.alpha_cumprod_prev) * x0 + math.sqrt(1 - c.alpha_cumprod_prev) * eps
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("c", step_coefficients(7), ids=lambda c: f"t{c.timestep}")
def test_ddim_with_eta_one_is_ddpm_with_the_fixed_variance(c):
    x, x0, noise = images(0), images(1), images(2)
    torch.testing.assert_close(
        ddim_step(x, x0, noise, c, 1.0), ddpm_step(x, x0, noise, c, None), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("c", noisy_steps(7), ids=lambda c: f"t{c.timestep}")
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_ddim_keeps_the_marginal_variance(c, eta):
    # x0 = 0, eps = 1: the factor of eps and the factor of the noise are independent and must make 1 - a_prev
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x = math.sqrt(1 - c.alpha_cumprod) * one
    of_eps = ddim_step(x, 0 * one, 0 * one, c, eta)
    of_noise = ddim_step(x, 0 * one, one, c, eta) - of_eps
    assert (of_eps**2 + of_noise**2).item() == pytest.approx(1 - c.alpha_cumprod_prev, rel=1e-9)
    assert of_noise.item() == pytest.approx(eta * c.sigma, rel=1e-9)


@pytest.mark.parametrize("c", step_coefficients(7), ids=lambda c: f"t{c.timestep}")
def test_predictions_invert_the_forward_process(c):
    x0, eps = images(1), images(2)
    x = math.sqrt(c.alpha_cumprod) * x0 + math.sqrt(1 - c.alpha_cumprod) * eps
    torch.testing.assert_close(predict_xstart(x, eps, c), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(predict_eps(x, x0, c), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [None, 4, 9, 3, 1, 0], ids=lambda k: f"cfg-channels-{k}")
def test_guidance_scale_applies_to_the_first_channels_only(channels):
    cond, null = images(0), images(1)
    got = diffusion.classifier_free_guidance(cond, null, 4.0, channels)
    guided = 4 if channels is None else min(channels, 4)
    torch.testing.assert_close(got[:, :guided], (4.0 * cond - 3.0 * null)[:, :guided])
    assert torch.equal(got[:, guided:], cond[:, guided:])


def test_guidance_scale_one_is_conditional_and_zero_unconditional():
    cond, null = images(0), images(1)
    torch.testing.assert_close(diffusion.classifier_free_guidance(cond, null, 1.0, None), cond)
    assert torch.equal(diffusion.classifier_free_guidance(cond, null, 0.0, None), null)
