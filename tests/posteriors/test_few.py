"""Posteriors are densities in z, differentiable in x_t, and find a known posterior when trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.noise import Draw, Noise
from vardistill.diffusion.schedules import VE
from vardistill.errors import UsageError
from vardistill.networks import ACTIVATIONS
from vardistill.objectives import VarDiU
from vardistill.posteriors.few import (
    DiagonalGaussian,
    FullGaussian,
    MixtureOfGaussians,
    NeuralSplineFlow,
    Posterior,
    Prior,
)

pytestmark = pytest.mark.usefixtures("float64")

DATA, SIGMA_DATA = 3, 1.5
LEARNED: list[Callable[..., Posterior]] = [DiagonalGaussian, FullGaussian, MixtureOfGaussians, NeuralSplineFlow]
RATIOS = (0.05, 0.7, 30.0)

every_learned = pytest.mark.parametrize("family", LEARNED)
every_family = pytest.mark.parametrize("family", [*LEARNED, lambda *args, **sizes: Prior()])
every_reparameterised = pytest.mark.parametrize("family", [DiagonalGaussian, FullGaussian, NeuralSplineFlow])
every_latent = pytest.mark.parametrize("latent", [1, 2])


def perturbed(family: Callable[..., Posterior], latent: int, seed: int = 0) -> Posterior:
    """A small posterior of the family, away from its initial weights."""
    torch.manual_seed(seed)
    posterior = family(DATA, latent, SIGMA_DATA, depth=2, width=16)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return posterior


def inputs(rng: torch.Generator, ratios: tuple[float, ...] = RATIOS) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (B, DATA) of plausible size and the scales (B,), α ≠ 1."""
    ratio = torch.tensor(ratios)
    alpha = 1 / (1 + ratio)
    x_t = torch.randn(len(ratio), DATA, generator=rng) * (alpha * (ratio**2 + SIGMA_DATA**2).sqrt())[:, None]
    return x_t, alpha, alpha * ratio


def place(posterior: Posterior, q: Any, rows: int, latent: int) -> tuple[Tensor, Tensor]:
    """Centre and extent of q's mass, (B, latent) each, known without its density."""
    if isinstance(posterior, Prior):
        return torch.zeros(rows, latent), torch.ones(rows, latent)
    if isinstance(posterior, MixtureOfGaussians):
        return q.mean, q.variance.sqrt()
    z = q.transport(torch.randn(2000, rows, latent, generator=torch.Generator().manual_seed(1)))
    return z.mean(0), z.std(0)


@every_family
@every_latent
def test_integrates_to_one(family: Callable[..., Posterior], latent: int, rng: torch.Generator) -> None:
    """Trapezoidal rule on ± 8 standard deviations; a spline's density bends, hence the tolerance."""
    posterior, (x_t, alpha, sigma) = perturbed(family, latent), inputs(rng)
    nodes = {1: 4001, 2: 301}[latent]
    axis = torch.linspace(-8, 8, nodes)
    grid = torch.cartesian_prod(*[axis] * latent).view(-1, 1, latent)
    with torch.no_grad():
        q = posterior(x_t, alpha, sigma)
        centre, extent = place(posterior, q, len(x_t), latent)
        density = q.log_prob(centre + extent * grid).exp()
    mass = density.sum(0) * (axis[1] - axis[0]) ** latent * extent.prod(1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol={1: 2e-5, 2: 1e-3}[latent])


@every_learned
@every_latent
def test_is_differentiable_in_x_t_and_z(family: Callable[..., Posterior], latent: int, rng: torch.Generator) -> None:
    posterior, (x_t, alpha, sigma) = perturbed(family, latent), inputs(rng, (0.3, 0.7, 3.0))
    z = torch.randn(len(x_t), latent, generator=rng)

    def log_prob(x_t: Tensor, z: Tensor) -> Tensor:
        return posterior(x_t, alpha, sigma).log_prob(z)

    slopes = torch.autograd.grad(log_prob(x_t.requires_grad_(), z).sum(), x_t)[0]
    assert slopes.abs().min() > 0
    assert torch.autograd.gradcheck(log_prob, (x_t, z.requires_grad_()))


@every_reparameterised
@every_latent
def test_transport_has_the_density_of_log_prob(
    family: Callable[..., Posterior], latent: int, rng: torch.Generator
) -> None:
    """log q(T(η)) = log N(η) − log |det ∂T/∂η|."""
    posterior = perturbed(family, latent)
    base = MultivariateNormal(torch.zeros(latent), torch.eye(latent))
    x_t, alpha, sigma = inputs(rng)
    for row in range(len(x_t)):
        q = posterior(*(v[row : row + 1] for v in (x_t, alpha, sigma)))
        for eta in (1.5 * torch.randn(5, latent, generator=rng)).detach():
            jacobian = torch.autograd.functional.jacobian(lambda v, q=q: q.transport(v[None])[0], eta)
            expected = base.log_prob(eta) - torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(q.log_prob(q.transport(eta[None]))[0], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("family", [DiagonalGaussian, FullGaussian, NeuralSplineFlow])
def test_transport_is_differentiable_in_x_t(family: Callable[..., Posterior], rng: torch.Generator) -> None:
    posterior, (x_t, alpha, sigma) = perturbed(family, 2), inputs(rng, (0.3, 0.7, 3.0))
    eta = torch.randn(2, len(x_t), 2, generator=rng)

    def transport(x_t: Tensor) -> Tensor:
        return posterior(x_t, alpha, sigma).transport(eta)

    assert torch.autograd.gradcheck(transport, (x_t.requires_grad_(),))


def test_prior_is_the_standard_normal(rng: torch.Generator) -> None:
    x_t, alpha, sigma = inputs(rng)
    z = torch.randn(5, len(x_t), 4, generator=rng)
    q = Prior()(x_t, alpha, sigma)
    torch.testing.assert_close(q.log_prob(z), MultivariateNormal(torch.zeros(4), torch.eye(4)).log_prob(z))
    torch.testing.assert_close(q.transport(z), z)
    assert list(Prior().parameters()) == []


@every_learned
@pytest.mark.parametrize("leading", [(), (4,), (2, 4)])
def test_rows_and_leading_axes_are_independent(
    family: Callable[..., Posterior], leading: tuple[int, ...], rng: torch.Generator
) -> None:
    posterior, (x_t, alpha, sigma) = perturbed(family, 2), inputs(rng)
    z = torch.randn(*leading, len(x_t), 2, generator=rng)
    together = posterior(x_t, alpha, sigma).log_prob(z)
    assert together.shape == z.shape[:-1]
    for row in range(len(x_t)):
        q = posterior(*(v[row : row + 1] for v in (x_t, alpha, sigma)))
        one_by_one = torch.stack([q.log_prob(v[None])[0] for v in z[..., row, :].reshape(-1, 2)])
        torch.testing.assert_close(together[..., row].flatten(), one_by_one)


@every_learned
def test_depends_on_the_ratio_and_on_x_t_in_units_of_alpha(
    family: Callable[..., Posterior], rng: torch.Generator
) -> None:
    """q(z | x_t, α, σ) = q(z | x_t/α, 1, σ/α): the same under every schedule."""
    posterior, (x_t, alpha, sigma) = perturbed(family, 2), inputs(rng)
    z = torch.randn(len(x_t), 2, generator=rng)
    rescaled = posterior(x_t / alpha[:, None], torch.ones_like(alpha), sigma / alpha)
    torch.testing.assert_close(rescaled.log_prob(z), posterior(x_t, alpha, sigma).log_prob(z))


@every_learned
def test_silent_networks_give_the_natural_scale(family: Callable[..., Posterior], rng: torch.Generator) -> None:
    """With all weights 0: N(0, s(r)² I), s(r) = r/√(r² + σ_d²), from certainty at no noise to the prior at much."""
    posterior, (x_t, alpha, sigma) = perturbed(family, 2), inputs(rng)
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.zero_()
    ratio = sigma / alpha
    scale = (ratio / (ratio**2 + SIGMA_DATA**2).sqrt())[:, None]
    z = scale * torch.randn(len(x_t), 2, generator=rng)
    torch.testing.assert_close(posterior(x_t, alpha, sigma).log_prob(z), Normal(0.0, scale).log_prob(z).sum(1))


@every_learned
def test_every_parameter_gets_a_gradient(family: Callable[..., Posterior], rng: torch.Generator) -> None:
    posterior, (x_t, alpha, sigma) = perturbed(family, 2), inputs(rng, (0.5,) * 64)
    posterior(x_t, alpha, sigma).log_prob(0.5 * torch.randn(64, 2, generator=rng)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in posterior.parameters())


@every_learned
def test_state_restores_the_same_density(family: Callable[..., Posterior], rng: torch.Generator) -> None:
    posterior, other = perturbed(family, 2, seed=0), perturbed(family, 2, seed=1)
    x_t, alpha, sigma = inputs(rng)
    z = torch.randn(len(x_t), 2, generator=rng)
    expected = posterior(x_t, alpha, sigma).log_prob(z)
    assert not torch.equal(other(x_t, alpha, sigma).log_prob(z), expected)
    other.load_state_dict(posterior.state_dict())
    assert torch.equal(other(x_t, alpha, sigma).log_prob(z), expected)


@every_learned
@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_refuses_a_standard_deviation_that_is_not_positive(family: Callable[..., Posterior], sigma_data: float) -> None:
    with pytest.raises(UsageError, match="sigma_data must be positive"):
        family(DATA, 2, sigma_data)


@every_learned
@pytest.mark.parametrize("depth", [1, 3])
def test_mixed_precision_rounds_hidden_layers_and_these_alone(
    family: Callable[..., Posterior], depth: int, rng: torch.Generator
) -> None:
    """With one layer there are none between the first and the last: nothing is rounded."""
    single, mixed = (family(DATA, 2, SIGMA_DATA, depth=depth, width=32, mixed=mixed).float() for mixed in (False, True))
    mixed.load_state_dict(single.state_dict())
    scaled = [v.float() for v in inputs(rng)]
    z = torch.randn(len(RATIOS), 2, generator=rng).float()
    exact, rounded = (q(*scaled).log_prob(z).detach() for q in (single, mixed))
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact) == (depth == 1)
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_networks_activation_is_the_one_asked_for(activation: str) -> None:
    posterior = DiagonalGaussian(DATA, 2, SIGMA_DATA, depth=2, width=16, activation=activation)
    assert {type(layer) for layer in posterior.network.modules()} >= {type(ACTIVATIONS[activation]())}


def test_refuses_a_mixture_of_nothing() -> None:
    with pytest.raises(UsageError, match="components must be at least 1, but is 0"):
        MixtureOfGaussians(DATA, 2, 1.0, components=0)


def train(posterior: Posterior, draw: Callable[[int], Draw], steps: int = 500) -> None:
    """Fit a posterior as an objective does between updates of the generator."""
    objective = VarDiU(GaussianMixture(torch.zeros(1, 3), std=1.0), posterior, posterior_steps=2)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.posterior_loss(draw(256)).mean().backward()
        optimizer.step()
        decay.step()


def small(family: Callable[..., Posterior], data: int, latent: int) -> Posterior:
    torch.manual_seed(0)
    sizes: dict[Any, dict[str, Any]] = {
        MixtureOfGaussians: {"components": 3},
        NeuralSplineFlow: {"transforms": 1, "hidden": (32,), "context": 8},
    }
    return family(data, latent, 1.0, depth=2, width=48, **sizes.get(family, {}))


class TestLinearGenerator:
    """x_t = A z + b + σ ε with σ between 0.3 and 3: p(z | x_t) is Gaussian."""

    A = torch.tensor([[1.1, 0.6], [0.4, 0.9], [0.3, 0.5]], dtype=torch.float64)
    b = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)

    def generator(self, z: Tensor) -> Tensor:
        return z @ self.A.T + self.b

    def draw(self, n: int, rng: torch.Generator) -> Draw:
        t = VE().time(torch.empty(n).uniform_(math.log(0.3), math.log(3), generator=rng).exp())
        alpha, sigma = VE()(t)
        z, eps = torch.randn(n, 2, generator=rng), torch.randn(n, 3, generator=rng)
        return Draw(z, self.generator(z), Noise(t, alpha, sigma, alpha, eps, n), self.generator)

    def posterior(self, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (R, 2) and covariance (R, 2, 2) of p(z | x_t)."""
        covariance = torch.linalg.inv(torch.eye(2) + (sigma**-2)[:, None, None] * (self.A.T @ self.A))
        residual = (x_t - self.b) @ self.A * (sigma**-2)[:, None]
        return (covariance @ residual[..., None]).squeeze(-1), covariance

    @every_learned
    def test_training_finds_the_posterior(self, family: Callable[..., Posterior], rng: torch.Generator) -> None:
        """E KL(p(z | x_t) ‖ q) ends near its least value in the family; so do q's mean and covariance.

        That value is 0 but for the diagonal Gaussian, whose optimum has the posterior's marginal variances v:
        KL = ½ (Σ ln v − ln det C). Tolerances are about three times what this short training leaves.
        """
        q = small(family, 3, 2)
        train(q, lambda n: self.draw(n, rng))
        draw = self.draw(10_000, rng)
        mean, covariance = self.posterior(draw.x_t, draw.noise.sigma)
        with torch.no_grad():
            log_q = q(draw.x_t, draw.noise.alpha, draw.noise.sigma).log_prob(draw.z)
            z = samples(q, draw, 200, rng)
        kl = (MultivariateNormal(mean, covariance).log_prob(draw.z) - log_q).mean()
        if family is DiagonalGaussian:
            variances = covariance.diagonal(dim1=1, dim2=2)
            least = 0.5 * (variances.log().sum(1) - covariance.logdet()).mean()
            assert least > 0.1
            kl, covariance = kl - least, torch.diag_embed(variances)
        assert kl.abs() < 0.05
        centred = z - z.mean(0)
        spread = torch.einsum("kri,krj->rij", centred, centred) / (len(z) - 1)
        assert (z.mean(0) - mean[:200]).pow(2).mean().sqrt() < 0.1
        assert (spread - covariance[:200]).pow(2).mean().sqrt() < 0.08


def samples(q: Posterior, draw: Draw, rows: int, rng: torch.Generator) -> Tensor:
    """(1000, rows, latent) draws from q at the first rows."""
    conditional: Any = q(*(v[:rows] for v in (draw.x_t, draw.noise.alpha, draw.noise.sigma)))
    if q.reparameterised:
        return conditional.transport(torch.randn(1000, rows, draw.z.shape[1], generator=rng))
    return conditional.sample((1000,))


class TestTwoBranches:
    """x_t = z² + ½ ε: p(z | x_t) has a mode on either side of 0."""

    sigma = 0.5

    def draw(self, n: int, rng: torch.Generator) -> Draw:
        z, eps = torch.randn(n, 1, generator=rng), torch.randn(n, 1, generator=rng)
        alpha, sigma = torch.ones(n), torch.full((n,), self.sigma)
        return Draw(z, z**2, Noise(VE().time(sigma), alpha, sigma, alpha, eps, n), torch.square)

    def log_posterior(self, z: Tensor, x_t: Tensor) -> Tensor:
        """log p(z | x_t), (R,), normalised on a grid."""
        grid = torch.linspace(-8, 8, 2001)

        def log_joint(z: Tensor) -> Tensor:
            return Normal(0.0, 1.0).log_prob(z) + Normal(z**2, self.sigma).log_prob(x_t)

        return log_joint(z).squeeze(1) - (log_joint(grid).logsumexp(1) + (grid[1] - grid[0]).log())

    @every_learned
    def test_mixtures_and_flows_see_both(self, family: Callable[..., Posterior], rng: torch.Generator) -> None:
        q = small(family, 1, 1)
        train(q, lambda n: self.draw(n, rng))
        draw = self.draw(10_000, rng)
        with torch.no_grad():
            log_q = q(draw.x_t, draw.noise.alpha, draw.noise.sigma).log_prob(draw.z)
        kl = (self.log_posterior(draw.z, draw.x_t) - log_q).mean()
        if family in (MixtureOfGaussians, NeuralSplineFlow):
            assert kl < 0.04
        else:
            assert kl > 0.4
