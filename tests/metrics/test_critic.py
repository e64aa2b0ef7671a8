"""A critic's error and the bias it causes, against closed forms for a linear generator and Gaussian denoisers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from linear_gaussian import (
    GaussianDenoiser,
    Linear,
    diffusive_kl,
    exact_critic,
    gradients,
    predicted_bias,
    student,
    student_marginal,
    target,
    wrong_critic,
    z_limit,
    z_scores,
)
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.metrics.critic import CriticBias, critic_bias, squared_norm
from vardistill.students.perceptron import MLP

pytestmark = pytest.mark.usefixtures("float64")

RATIOS = [0.7, 2.0]

every_schedule = pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)


def measure(generator: Linear, critic: GaussianDenoiser, seed: int = 0, n: int = 8000) -> CriticBias:
    objective = SimpleNamespace(teacher=target(critic.schedule), critic=critic)
    result = critic_bias(objective, generator, RATIOS, torch.Generator().manual_seed(seed), n, nodes=40)
    assert result.ratio.tolist() == RATIOS
    return result


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_squared_norm_is_unbiased_and_its_standard_error_not_too_small(mean: float, rng: torch.Generator) -> None:
    """Over 20,000 sets of 16 chunks g_i ~ N(mean, I) in R³, seed 0; failure rate 1e-4 for the mean.

    Its variance is 2·3/(16·15) + 4·3 mean²/16. The jackknife's is above it in the mean (Efron & Stein 1981), and at
    mean 0, where the statistic is degenerate, below 3 times it: 4 (M − 1)/(M − 2)² beside 2/(M − 1) by first order.
    """
    g = mean + torch.randn(20_000, 16, 3, generator=rng)
    value, error = squared_norm(g @ g.mT)
    assert z_scores(value, 3 * mean**2).abs() < z_limit(1)
    variance = 6 / 240 + 12 * mean**2 / 16
    assert float(value.var()) == pytest.approx(variance, rel=0.1)
    assert 1 < float(error.pow(2).mean()) / variance < (3 if mean == 0 else 1.3)


@every_schedule
def test_the_exact_critic_has_neither_error_nor_bias(schedule: Schedule) -> None:
    """To the quadrature's error; of either sign, so nothing clamps it."""
    generator = student()
    result = measure(generator, exact_critic(generator, schedule), n=512)
    assert (result.critic_error < 1e-3).all()
    assert (result.bias_norm2.abs() < 1e-6 * result.gradient_norm2).all()
    assert result.gradient_bias < 1e-3
    worse = measure(generator, wrong_critic(generator, schedule, shift=0.02, widen=1.0), n=512)
    assert (worse.bias_norm2 > 1e-6 * worse.gradient_norm2).all()


@every_schedule
@pytest.mark.parametrize(("shift", "widen"), [(0.6, 1.0), (0.0, 1.6)])
def test_a_wrong_critic_has_those_of_the_closed_form(schedule: Schedule, shift: float, widen: float) -> None:
    """The score's error within 10 %, the norms within 7 of their standard errors: 4e-6 each by t with 15 degrees."""
    generator = student()
    critic = wrong_critic(generator, schedule, shift, widen)
    result = measure(generator, critic)
    biases, norms = [], []
    for i, ratio in enumerate(RATIOS):
        t = schedule.time(torch.tensor(ratio))
        alpha, sigma = schedule(t)
        own = student_marginal(generator.A, generator.b, alpha, sigma)
        wrong = torch.linalg.inv(alpha**2 * critic.factor @ critic.factor.T + sigma**2 * torch.eye(3))
        H, at_mean = own.precision_matrix - wrong, alpha * wrong @ (critic.mean - generator.b)
        squared = (H @ own.covariance_matrix @ H).trace() + at_mean.pow(2).sum()
        expected = float((squared / own.precision_matrix.trace()).sqrt().detach())
        assert float(result.critic_error[i]) == pytest.approx(expected, rel=0.1)
        parameters = list(generator.parameters())
        exact = gradients(diffusive_kl(*parameters, target(schedule), float(t)), *parameters)
        norms.append(exact.pow(2).sum())
        biases.append(predicted_bias(generator, critic, float(t)).pow(2).sum())
    bias, norm = torch.stack(biases), torch.stack(norms)
    assert ((result.bias_norm2 - bias).abs() < 7 * result.bias_error).all()
    assert ((result.gradient_norm2 - norm).abs() < 7 * result.gradient_error).all()
    assert (result.bias_error < 0.1 * bias).all()
    assert float(result.gradient_bias) == pytest.approx(float((bias.sum() / norm.sum()).sqrt()), rel=0.1)


def test_without_a_gradient_there_is_no_ratio_to_it() -> None:
    """A generator that learns its mean alone and has the target's: G = 0 under noise that is not, seeds 0 to 7."""
    generator = student()
    generator.A.requires_grad_(False)
    teacher = GaussianMixture(generator.b.detach()[None], std=2.0, schedule=VE())
    objective = SimpleNamespace(teacher=teacher, critic=wrong_critic(generator, VE(), shift=0.6))
    rngs = [torch.Generator().manual_seed(seed) for seed in range(8)]
    results = [critic_bias(objective, generator, RATIOS, rng, n=512, nodes=40) for rng in rngs]
    norm2 = torch.stack([result.gradient_norm2 for result in results])
    error = torch.stack([result.gradient_error for result in results])
    assert (norm2 < 0).any()
    assert (norm2 > 0).any()
    assert (norm2.abs() < 7 * error).all()
    assert all((result.bias_norm2 > 5 * result.bias_error).all() for result in results)
    assert all(result.gradient_bias.isnan() for result in results)


def test_parameters_without_a_part_in_the_samples_have_no_gradient() -> None:
    generator = student()
    expected = measure(generator, wrong_critic(generator, VE(), shift=0.6, widen=1.0), n=512)
    generator.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
    idle = measure(generator, wrong_critic(generator, VE(), shift=0.6, widen=1.0), n=512)
    assert torch.equal(idle.bias_norm2, expected.bias_norm2)


def test_bad_input_is_refused(rng: torch.Generator) -> None:
    objective = SimpleNamespace(teacher=target(VE()), critic=exact_critic(student(), VE()))
    with pytest.raises(UsageError, match="at most 3 latent dimensions, but there are 4"):
        critic_bias(objective, MLP(latent=4, data=3), RATIOS, rng)
    for ratios in ([], [0.0], [math.nan]):
        with pytest.raises(UsageError, match="ratios must be positive and finite"):
            critic_bias(objective, student(), ratios, rng)
    with pytest.raises(UsageError, match="n must be at least 16, but is 15"):
        critic_bias(objective, student(), RATIOS, rng, n=15)
