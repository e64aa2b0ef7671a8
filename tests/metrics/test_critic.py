"""A critic's error and the bias it causes, against closed forms for a linear generator and Gaussian denoisers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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
)
from vardistill.errors import UsageError
from vardistill.generators import MLP
from vardistill.metrics.critic import critic_bias
from vardistill.schedules import VE, VP, Schedule

pytestmark = pytest.mark.usefixtures("float64")

RATIOS = [0.7, 2.0]

every_schedule = pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)


def measure(generator: Linear, critic: GaussianDenoiser, seed: int = 0, n: int = 8000) -> tuple[Tensor, Tensor]:
    objective = SimpleNamespace(teacher=target(critic.schedule), critic=critic)
    rng = torch.Generator().manual_seed(seed)
    result = critic_bias(objective, generator, RATIOS, rng, n, nodes=40)
    assert result.ratio.tolist() == RATIOS
    return result.critic_error, result.gradient_bias


@every_schedule
def test_the_exact_critic_has_neither_error_nor_bias(schedule: Schedule) -> None:
    """To the quadrature's error."""
    generator = student()
    error, bias = measure(generator, exact_critic(generator, schedule), n=500)
    assert (error < 1e-3).all()
    assert (bias < 1e-3).all()


@every_schedule
@pytest.mark.parametrize(("shift", "widen"), [(0.6, 1.0), (0.0, 1.6)])
def test_a_wrong_critic_has_those_of_the_closed_form(schedule: Schedule, shift: float, widen: float) -> None:
    """Within 10 %: over 5 standard deviations of either, as ten other seeds show them."""
    generator = student()
    critic = wrong_critic(generator, schedule, shift, widen)
    error, bias = measure(generator, critic)
    for i, ratio in enumerate(RATIOS):
        t = schedule.time(torch.tensor(ratio))
        alpha, sigma = schedule(t)
        own = student_marginal(generator.A, generator.b, alpha, sigma)
        wrong = torch.linalg.inv(alpha**2 * critic.factor @ critic.factor.T + sigma**2 * torch.eye(3))
        H, at_mean = own.precision_matrix - wrong, alpha * wrong @ (critic.mean - generator.b)
        squared = (H @ own.covariance_matrix @ H).trace() + at_mean.pow(2).sum()
        expected = float((squared / own.precision_matrix.trace()).sqrt().detach())
        assert float(error[i]) == pytest.approx(expected, rel=0.1)
        parameters = list(generator.parameters())
        exact = gradients(diffusive_kl(*parameters, target(schedule), float(t)), *parameters)
        relative = float(predicted_bias(generator, critic, float(t)).norm() / exact.norm())
        assert float(bias[i]) == pytest.approx(relative, rel=0.1)


def test_bad_input_is_refused(rng: torch.Generator) -> None:
    objective = SimpleNamespace(teacher=target(VE()), critic=exact_critic(student(), VE()))
    with pytest.raises(UsageError, match="at most 3 latent dimensions, but there are 4"):
        critic_bias(objective, MLP(latent=4, data=3), RATIOS, rng)
    for ratios in ([], [0.0], [math.nan]):
        with pytest.raises(UsageError, match="ratios must be positive and finite"):
            critic_bias(objective, student(), ratios, rng)
    with pytest.raises(UsageError, match="n must be at least 2, but is 1"):
        critic_bias(objective, student(), RATIOS, rng, n=1)
