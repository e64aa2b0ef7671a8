"""VarDiU where everything is closed form: a linear generator x = A z + b and a Gaussian target N(m, S).

The student's posterior p(z | x_t) is Gaussian, and bound and gradient are polynomials in (z, ε): see `linear_gaussian`.
Losses are 1/d of the bound's terms, d = `DATA`, and the bound itself is in nats.
Where draws are random, z-scores are held against `z_limit`: a right implementation fails with probability 1e-4 at most
(per test and parameter set, over all its comparisons together). The seeds are fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from linear_gaussian import (
    Linear,
    complete,
    diffusive_kl,
    gauss_hermite,
    gradient_rows,
    gradients,
    labelled_drawn,
    of_label,
    pick,
    quadrature,
    random_draw,
    student,
    student_marginal,
    students,
    target,
    target_marginal,
    targets,
    z_limit,
    z_scores,
)
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.diffusion.noise import Draw, Noise
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
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

SCHEDULES = [VE(), VP(), Cosine(), Rectified()]
LATENT, DATA = 2, 3

every_level = pytest.mark.parametrize(
    ("schedule", "t"),
    [(schedule, t) for schedule in SCHEDULES for t in (0.1, 0.45, 0.9)],
    ids=lambda v: v if isinstance(v, float) else type(v).__name__,
)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_control_variate = pytest.mark.parametrize("control_variate", ["zero", "one", "gaussian"])


@dataclass(frozen=True)
class Gaussian:
    """N(loc, covariance) as a conditional, by torch's own density."""

    loc: Tensor
    covariance: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        return MultivariateNormal(self.loc, self.covariance).log_prob(z)

    def transport(self, eta: Tensor) -> Tensor:
        return self.loc + (torch.linalg.cholesky(self.covariance) @ eta[..., None]).squeeze(-1)


class LinearPosterior(Posterior):
    """The linear generator's exact posterior N(μ, C), or, made wrong, N(shrink · μ + shift, widen² · C)."""

    def __init__(self, generator: Linear, shrink: float = 1.0, shift: float = 0.0, widen: float = 1.0) -> None:
        super().__init__()
        self.A, self.b = generator.A.detach().clone(), generator.b.detach().clone()
        self.shrink, self.widen = shrink, widen
        self.shift = nn.Parameter(torch.full((self.A.shape[1],), shift))

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Gaussian:
        mean, covariance = exact_posterior(self.A, self.b, x_t, alpha, sigma)
        return Gaussian(self.shrink * mean + self.shift, self.widen**2 * covariance)


def exact_posterior(A: Tensor, b: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (R, k) and covariance (R, k, k) of p(z | x_t)."""
    ratio2 = ((alpha / sigma) ** 2)[:, None, None]
    covariance = torch.linalg.inv(torch.eye(A.shape[1]) + ratio2 * (A.T @ A))
    residual = (alpha / sigma**2)[:, None] * (x_t - alpha[:, None] * b)
    return (covariance @ (residual @ A)[..., None]).squeeze(-1), covariance


def wrong_posterior(generator: Linear) -> LinearPosterior:
    return LinearPosterior(generator, shrink=0.8, shift=0.15, widen=1.4)


@pytest.fixture
def generator() -> Linear:
    return student()


def log_ratio(generator: Linear, teacher: GaussianMixture, draw: Draw) -> Tensor:
    """log p_θ^t(x_t) − log p_d^t(x_t), (R,)."""
    scales = draw.noise.alpha, draw.noise.sigma
    log_student = student_marginal(generator.A, generator.b, *scales).log_prob(draw.x_t)
    return log_student - target_marginal(teacher, *scales).log_prob(draw.x_t)


def posterior_kl(generator: Linear, posterior: LinearPosterior, schedule: Schedule, t: float) -> Tensor:
    """E KL(p(z | x_t) ‖ q(z | x_t)) in closed form for N(shrink · μ + shift, widen² C)."""
    alpha, sigma = schedule(torch.tensor([t]))
    A, b = generator.A.detach(), generator.b.detach()
    _, covariance = exact_posterior(A, b, torch.zeros(1, DATA), alpha, sigma)
    gain = covariance[0] @ A.T * (alpha / sigma**2)
    covariance_of_mean = gain @ student_marginal(A, b, alpha[0], sigma[0]).covariance_matrix @ gain.T
    precision = torch.linalg.inv(posterior.widen**2 * covariance[0])
    shift = posterior.shift.detach()
    distance = shift @ precision @ shift + (1 - posterior.shrink) ** 2 * (precision @ covariance_of_mean).trace()
    return 0.5 * (distance + LATENT * (posterior.widen**-2 - 1 + 2 * math.log(posterior.widen)))


class TestBound:
    @every_schedule
    def test_with_the_exact_posterior_the_integrand_is_the_log_ratio(
        self, generator: Linear, schedule: Schedule, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, schedule, (0.05, 0.3, 0.6, 0.95), 256, rng)
        objective = VarDiU(target(schedule), LinearPosterior(generator))
        expected = log_ratio(generator, objective.teacher, draw)
        torch.testing.assert_close(objective.bound(draw), expected, rtol=1e-10, atol=1e-10)

    @every_schedule
    def test_a_wrong_posterior_adds_its_log_ratio_to_every_row(
        self, generator: Linear, schedule: Schedule, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, schedule, (0.05, 0.3, 0.6, 0.95), 256, rng)
        scales = draw.noise.alpha, draw.noise.sigma
        posterior = wrong_posterior(generator)
        objective = VarDiU(target(schedule), posterior)
        exact = Gaussian(*exact_posterior(generator.A, generator.b, draw.x_t, *scales))
        excess = exact.log_prob(draw.z) - posterior(draw.x_t, *scales).log_prob(draw.z)
        expected = log_ratio(generator, objective.teacher, draw) + excess
        torch.testing.assert_close(objective.bound(draw), expected, rtol=1e-10, atol=1e-10)

    @every_level
    def test_mean_is_the_kl_and_with_a_wrong_posterior_exceeds_it_by_the_expected_posterior_kl(
        self, generator: Linear, schedule: Schedule, t: float
    ) -> None:
        draw, teacher = quadrature(generator, schedule, t), target(schedule)
        kl = diffusive_kl(generator.A, generator.b, teacher, t)
        exact = VarDiU(teacher, LinearPosterior(generator)).bound(draw)
        torch.testing.assert_close((draw.noise.weight * exact).sum(), kl, rtol=1e-10, atol=1e-11)
        posterior = wrong_posterior(generator)
        gap = posterior_kl(generator, posterior, schedule, t)
        assert gap > 0.1
        wrong = VarDiU(teacher, posterior).bound(draw)
        torch.testing.assert_close((draw.noise.weight * wrong).sum(), kl + gap, rtol=1e-10, atol=1e-10)

    @every_schedule
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_mean_over_random_draws(
        self, generator: Linear, schedule: Schedule, antithetic: bool, rng: torch.Generator
    ) -> None:
        t, draws, latents = 0.4, 2, 20_000
        draw = random_draw(generator, schedule, (t,), latents, rng, draws=draws, antithetic=antithetic)
        teacher = target(schedule)
        kl = diffusive_kl(generator.A, generator.b, teacher, t)
        posterior = wrong_posterior(generator)
        exact = VarDiU(teacher, LinearPosterior(generator)).bound(draw).view(draws, latents).mean(0)
        wrong = VarDiU(teacher, posterior).bound(draw).view(draws, latents).mean(0)
        z = torch.stack([z_scores(exact, kl), z_scores(wrong, kl + posterior_kl(generator, posterior, schedule, t))])
        assert z.abs().max() < z_limit(2)


class TestGradient:
    @every_control_variate
    @every_level
    def test_expected_gradient_is_that_of_the_closed_form_kl(
        self, generator: Linear, schedule: Schedule, t: float, control_variate: str
    ) -> None:
        """With q exact at the current θ and held there, ∇_θ E gap = 0, so the bound's gradient is the KL's."""
        objective = VarDiU(target(schedule), LinearPosterior(generator), control_variate=control_variate)
        loss = objective.generator_loss(quadrature(generator, schedule, t))
        parameters = list(generator.parameters())
        expected = gradients(diffusive_kl(*parameters, objective.teacher, t) / DATA, *parameters)
        torch.testing.assert_close(gradients(loss, *parameters), expected, rtol=1e-9, atol=1e-9)

    @every_schedule
    def test_with_a_wrong_posterior_expected_gradient_is_that_of_the_bound(
        self, generator: Linear, schedule: Schedule
    ) -> None:
        posterior, draw = wrong_posterior(generator), quadrature(generator, schedule, 0.4)
        objective = VarDiU(target(schedule), posterior)
        parameters = [*generator.parameters(), posterior.shift]
        expected = gradients(draw.noise.weight * objective.bound(draw) / DATA, *parameters)
        actual = gradients(objective.generator_loss(draw), *parameters)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @every_control_variate
    @every_schedule
    def test_every_row_has_the_gradient_of_the_bound_less_the_control_variate(
        self, generator: Linear, schedule: Schedule, control_variate: str, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, schedule, (0.1, 0.5, 0.9), 64, rng)
        objective = VarDiU(
            target(schedule), wrong_posterior(generator), control_variate=control_variate, sigma_data=1.3
        )
        alpha, sigma = draw.noise.alpha[:, None], draw.noise.sigma[:, None]
        c = {"zero": 0.0, "one": 1.0, "gaussian": sigma**2 / (sigma**2 + (1.3 * alpha) ** 2)}[control_variate]
        (of_bound,) = torch.autograd.grad(objective.bound(draw).sum(), draw.x, retain_graph=True)
        (actual,) = torch.autograd.grad(objective.generator_loss(draw).sum(), draw.x)
        expected = (of_bound - alpha * c * draw.noise.eps / sigma) / DATA
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    @every_control_variate
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_mean_over_random_draws(
        self, generator: Linear, antithetic: bool, control_variate: str, rng: torch.Generator
    ) -> None:
        schedule, t, draws, latents = VP(), 0.3, 2, 20_000
        draw = random_draw(generator, schedule, (t,), latents, rng, draws=draws, antithetic=antithetic)
        objective = VarDiU(target(schedule), LinearPosterior(generator), control_variate=control_variate)
        parameters = list(generator.parameters())
        expected = gradients(diffusive_kl(*parameters, objective.teacher, t) / DATA, *parameters)
        means = gradient_rows(objective, draw).unflatten(0, (draws, latents)).mean(0)
        z = z_scores(means, expected)
        assert z.abs().max() < z_limit(z.numel())

    @every_level
    def test_variances_near_the_optimum(self, schedule: Schedule, t: float) -> None:
        """Exact total variances of the gradient in (A, b): the rule is exact for its square.

        With the exact posterior a row's gradient in x_t is (1 − c) ε/σ + s_θ − s_T: near the optimum its variance
        goes as (1 − c)².
        """
        teacher = target(schedule)
        factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]])
        generator = Linear(1.02 * factor, teacher.means[0] + 0.02)
        posterior = LinearPosterior(generator)

        def variances(control_variate: str) -> tuple[float, float]:
            """Of a single row, and of the mean of an antithetic pair."""
            objective = VarDiU(teacher, posterior, control_variate=control_variate)
            plus, minus = (quadrature(generator, schedule, t, sign) for sign in (1.0, -1.0))
            weights = plus.noise.weight[:, None]
            # a row is w_r g_r, so Σ_r (row/w_r)² w_r = E g²
            row, mirrored = gradient_rows(objective, plus), gradient_rows(objective, minus)
            pair = (row + mirrored) / 2
            total = [(g**2 / weights).sum() - (g.sum(0) ** 2).sum() for g in (row, pair)]
            return float(total[0]), float(total[1])

        (zero, zero_pair), (gaussian, gaussian_pair), (one, one_pair) = map(variances, ("zero", "gaussian", "one"))
        alpha, sigma = schedule(torch.tensor(t))
        noise_left = float(1 / (1 + (sigma / alpha) ** 2)) ** 2  # (1 − c)² of the gaussian one with σ_d = 1
        assert gaussian / zero == pytest.approx(noise_left, rel=0.02, abs=1e-3)
        assert one < 1e-3 * zero
        assert zero_pair < 1e-3 * zero
        assert gaussian_pair < 0.6 * gaussian
        assert one_pair < one

    @every_schedule
    def test_gaussian_control_variate_cancels_the_noise_of_a_gaussian_teacher(
        self, generator: Linear, schedule: Schedule, rng: torch.Generator
    ) -> None:
        """The teacher's part of a row is α² (x − m)/(α² σ_d² + σ²), free of ε; with c = 0 or 1 it is not."""
        mean, std = torch.tensor([0.2, 0.4, -0.5]), 1.3
        teacher = GaussianMixture(mean[None], std=std, schedule=schedule)
        draw = random_draw(generator, schedule, (0.1, 0.5, 0.9), 64, rng)
        alpha, sigma = draw.noise.alpha[:, None], draw.noise.sigma[:, None]
        noiseless = alpha**2 * (draw.x - mean) / (alpha**2 * std**2 + sigma**2) / DATA

        def of_teacher(control_variate: str) -> Tensor:
            objective = VarDiU(teacher, Prior(), control_variate=control_variate, sigma_data=std)
            (g,) = torch.autograd.grad(objective.generator_loss(draw).sum(), draw.x, retain_graph=True)
            return g

        torch.testing.assert_close(of_teacher("gaussian"), noiseless, rtol=1e-9, atol=1e-9)
        for other in ("zero", "one"):
            assert (of_teacher(other) - noiseless).abs().mean() > 1e-2

    def test_antithetic_pair_cancels_what_is_linear_in_the_noise(self, generator: Linear, rng: torch.Generator) -> None:
        schedule, latents = Cosine(), 64
        draw = random_draw(generator, schedule, (0.2, 0.7), latents, rng, draws=2, antithetic=True)
        objective = VarDiU(target(schedule), wrong_posterior(generator), control_variate="zero")
        pair_mean = gradient_rows(objective, draw).unflatten(0, (2, latents)).mean(0)
        noiseless = replace(draw, noise=replace(draw.noise, eps=torch.zeros_like(draw.noise.eps)))
        expected = gradient_rows(objective, noiseless)[:latents]
        torch.testing.assert_close(pair_mean, expected, rtol=1e-9, atol=1e-9)


def brute_force_bound(draw: Draw, teacher: GaussianMixture, posterior: Posterior, z: Tensor, x: Tensor) -> Tensor:
    """The integrand of DiU_t^K, (R,), written out: z and x (K+1, R, ·) with the row's own latent first."""
    alpha, sigma, x_t = draw.noise.alpha, draw.noise.sigma, draw.x_t
    log_prior = MultivariateNormal(torch.zeros(z.shape[-1]), torch.eye(z.shape[-1])).log_prob(z)
    covariance = (sigma**2)[:, None, None] * torch.eye(x.shape[-1])
    log_likelihood = MultivariateNormal(alpha[:, None] * x, covariance).log_prob(x_t)
    log_q = posterior(x_t, alpha, sigma).log_prob(z)
    terms = log_prior + log_likelihood - log_q
    return terms.logsumexp(0) - math.log(len(terms)) - target_marginal(teacher, alpha, sigma).log_prob(x_t)


def drawn_bound(draw: Draw, teacher: GaussianMixture, posterior: Posterior) -> Tensor:
    """`brute_force_bound` with candidates from the posterior."""
    assert draw.eta is not None
    drawn = posterior(draw.x_t, draw.noise.alpha, draw.noise.sigma).transport(draw.eta)
    x = torch.stack([draw.x, *(draw.generator(z) for z in drawn)])
    return brute_force_bound(draw, teacher, posterior, torch.cat([draw.z[None], drawn]), x)


def shared_bound(draw: Draw, teacher: GaussianMixture, prior: Prior) -> Tensor:
    """`brute_force_bound` with the batch's latents as candidates, each once, and with the candidates' gradients."""
    n, rows = draw.noise.latents, len(draw.z)
    order = [[r % n, *(k for k in range(n) if k != r % n)] for r in range(rows)]
    order = torch.tensor(order).T
    return brute_force_bound(draw, teacher, prior, draw.z[:n][order], draw.x[:n][order])


class TestDrawnCandidates:
    @every_schedule
    @pytest.mark.parametrize("candidates", [1, 4])
    def test_value_and_gradient_are_those_of_the_bound_written_out(
        self, generator: Linear, schedule: Schedule, candidates: int, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, schedule, (0.2, 0.5, 0.9), 32, rng, candidates, draws=2, antithetic=True)
        posterior = wrong_posterior(generator)
        objective = VarDiU(target(schedule), posterior, candidates, control_variate="zero")
        expected = drawn_bound(draw, objective.teacher, posterior)
        torch.testing.assert_close(objective.bound(draw), expected, rtol=1e-9, atol=1e-9)
        parameters = [*generator.parameters(), posterior.shift]
        actual = gradients(objective.generator_loss(draw), *parameters)
        torch.testing.assert_close(actual, gradients(expected / DATA, *parameters), rtol=1e-8, atol=1e-8)

    @every_control_variate
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_with_the_exact_posterior_mean_gradient_is_that_of_the_kl(
        self, generator: Linear, control_variate: str, antithetic: bool, rng: torch.Generator
    ) -> None:
        schedule, t = Rectified(), 0.4
        objective = VarDiU(target(schedule), LinearPosterior(generator), 3, control_variate)
        parameters = list(generator.parameters())
        levels = {"draws": 2, "antithetic": antithetic}
        draws = [random_draw(generator, schedule, (t,), 64, rng, 3, **levels) for _ in range(250)]
        samples = torch.stack([gradients(objective.generator_loss(d), *parameters) / 128 for d in draws])
        expected = gradients(diffusive_kl(*parameters, objective.teacher, t) / DATA, *parameters)
        z = z_scores(samples, expected)
        assert z.abs().max() < z_limit(z.numel())

    @pytest.mark.parametrize("q", ["wrong", "prior"])
    def test_bound_falls_with_the_number_of_candidates_to_the_kl(
        self, generator: Linear, q: str, rng: torch.Generator
    ) -> None:
        """gap_K is at least 0 and, by Jensen's inequality, at most E log(1 + χ²(p(z | x_t) ‖ q)/(K + 1))."""
        schedule, times, counts = VP(), (0.3, 0.6), (0, 1, 4, 16, 64)
        posterior = wrong_posterior(generator) if q == "wrong" else Prior()
        draw = random_draw(generator, schedule, times, 20_000, rng, max(counts))
        teacher, gaps = target(schedule), {}
        with torch.no_grad():
            exact = log_ratio(generator, teacher, draw)
            for k in counts:
                part = replace(draw, eta=draw.eta[:k])
                gaps[k] = VarDiU(teacher, posterior, k).bound(part) - exact
            chi2 = self.chi_square(generator, posterior, draw)
        limit = z_limit(3 * len(counts))
        for fewer, more in zip(counts, counts[1:], strict=False):
            assert z_scores(gaps[fewer] - gaps[more], 0.0) > limit
        for k, gap in gaps.items():
            assert z_scores(gap, 0.0) > -limit
            assert z_scores(gap - (chi2 / (k + 1)).log1p(), 0.0) < limit
        assert abs(gaps[64].mean()) < 0.05 * gaps[0].mean()

    @staticmethod
    def chi_square(generator: Linear, posterior: Posterior, draw: Draw) -> Tensor:
        """χ²(p(z | x_t) ‖ q) = ∫ p²/q − 1 of two Gaussians, (R,)."""
        scales = draw.noise.alpha, draw.noise.sigma
        mean_p, covariance_p = exact_posterior(generator.A, generator.b, draw.x_t, *scales)
        if isinstance(posterior, Prior):
            mean_q, covariance_q = torch.zeros_like(mean_p), torch.eye(LATENT).expand_as(covariance_p)
        else:
            q = posterior(draw.x_t, *scales)
            mean_q, covariance_q = q.loc, q.covariance
        P, Q = torch.linalg.inv(covariance_p), torch.linalg.inv(covariance_q)
        M = 2 * P - Q
        h = 2 * P @ mean_p[..., None] - Q @ mean_q[..., None]

        def quadratic(matrix: Tensor, v: Tensor) -> Tensor:
            return (v.mT @ matrix @ v).flatten()

        exponent = 0.5 * quadratic(torch.linalg.inv(M), h) - quadratic(P, mean_p[..., None])
        exponent = exponent + 0.5 * quadratic(Q, mean_q[..., None])
        return (P.logdet() - 0.5 * Q.logdet() - 0.5 * M.logdet() + exponent).exp() - 1


def shards(draw: Draw, parts: int) -> list[Draw]:
    """A draw with one row a latent in equal parts."""
    noises = [draw.noise.shard(part, parts) for part in range(parts)]
    tensors = zip(draw.z.chunk(parts), draw.x.chunk(parts), noises, strict=True)
    return [Draw(z, x, noise, draw.generator) for z, x, noise in tensors]


class TestSharedCandidates:
    @every_schedule
    @pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (2, True), (4, True), (4, False)])
    def test_value_counts_every_latent_once(
        self, generator: Linear, schedule: Schedule, draws: int, antithetic: bool, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, schedule, (0.2, 0.6, 0.9), 7, rng, draws=draws, antithetic=antithetic)
        objective = VarDiU(target(schedule), Prior(), "batch")
        expected = shared_bound(draw, objective.teacher, Prior())
        torch.testing.assert_close(objective.bound(draw), expected, rtol=1e-9, atol=1e-9)

    def test_expected_gradient_is_that_of_the_bound_candidates_included(self) -> None:
        """By quadrature over (z_0, z_1, ε) in one dimension: the candidates' own gradients vanish in the mean.

        The integrand is smooth but no polynomial: the rule errs by 8e-6 with 12 nodes an axis, 3e-6 with 16, 1e-7
        with 24.
        """
        schedule, t, nodes = Rectified(), 0.5, 20
        generator = Linear(torch.tensor([[0.9]]), torch.tensor([0.4]))
        teacher = GaussianMixture(torch.tensor([[-0.3]]), covariances=torch.tensor([[[1.44]]]), schedule=schedule)
        points, weights = gauss_hermite(1, nodes)
        pairs, pair_weights = gauss_hermite(2, nodes)
        t_rows = torch.full((2 * nodes,), t)
        alpha, sigma = schedule(t_rows)
        parameters = list(generator.parameters())
        objective = VarDiU(teacher, Prior(), "batch", control_variate="one")
        actual = expected = torch.zeros(2)
        for pair, pair_weight in zip(pairs, pair_weights, strict=True):
            weight = pair_weight * weights.repeat_interleave(2) / 2
            eps = points.repeat_interleave(2, 0)
            noise = Noise(t_rows, alpha, sigma, weight, eps, latents=2)
            z = noise.rows(pair[:, None])
            draw = Draw(z, generator(z), noise, generator)
            actual = actual + gradients(objective.generator_loss(draw), *parameters)
            expected = expected + gradients(weight * shared_bound(draw, teacher, Prior()), *parameters)
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)

    @every_control_variate
    @pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (4, True)])
    def test_mean_gradient_is_that_of_the_bound_candidates_included(
        self, generator: Linear, control_variate: str, draws: int, antithetic: bool, rng: torch.Generator
    ) -> None:
        """Paired differences to autograd through everything, over independent batches."""
        schedule, parameters = VP(), list(generator.parameters())
        objective = VarDiU(target(schedule), Prior(), "batch", control_variate)
        samples = []
        for _ in range(400):
            draw = random_draw(generator, schedule, (0.3, 0.5), 6, rng, draws=draws, antithetic=antithetic)
            full = gradients(shared_bound(draw, objective.teacher, Prior()) / DATA, *parameters)
            samples.append(gradients(objective.generator_loss(draw), *parameters) - full)
        z = z_scores(torch.stack(samples), 0.0)
        assert z.abs().max() < z_limit(z.numel())

    def test_control_variate_one_leaves_the_difference_of_two_scores(
        self, generator: Linear, rng: torch.Generator
    ) -> None:
        """The gradient in x_t is s_m − s_T, s_m the score of the batch's mixture: no bare noise is left."""
        schedule = Cosine()
        draw = random_draw(generator, schedule, (0.2, 0.6), 7, rng, draws=2, antithetic=True)
        teacher = target(schedule)
        (actual,) = torch.autograd.grad(VarDiU(teacher, Prior(), "batch", "one").generator_loss(draw).sum(), draw.x)
        x_t = draw.x_t.detach().requires_grad_()
        expected = []
        for row, t in zip(x_t, draw.noise.t, strict=True):
            student = GaussianMixture(draw.x[:7].detach(), std=0.0, schedule=schedule)
            difference = student.log_prob(row[None], t[None]) - teacher.log_prob(row[None], t[None])
            (g,) = torch.autograd.grad(difference.sum(), x_t)
            expected.append(g.sum(0))
        expected = draw.noise.alpha[:, None] * torch.stack(expected) / DATA
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)

    def test_bound_falls_with_the_batch_to_the_kl(self, generator: Linear, rng: torch.Generator) -> None:
        """64 latents without candidates, in eight batches, and in one: paired differences over independent draws."""
        schedule = VP()
        teacher = target(schedule)
        alone, shared = VarDiU(teacher, Prior()), VarDiU(teacher, Prior(), "batch")
        gaps = []
        with torch.no_grad():
            for _ in range(120):
                draw = random_draw(generator, schedule, (0.4,), 64, rng)
                exact = log_ratio(generator, teacher, draw)
                in_eight = torch.cat([shared.bound(part) for part in shards(draw, 8)])
                bounds = torch.stack([alone.bound(draw), in_eight, shared.bound(draw)])
                gaps.append((bounds - exact).mean(1))
        gap = torch.stack(gaps)
        limit = z_limit(5)
        assert (z_scores(gap[:, :-1] - gap[:, 1:], 0.0) > limit).all()
        assert (z_scores(gap, 0.0) > -limit).all()
        assert gap[:, -1].mean() < 0.05 * gap[:, 0].mean()

    @pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (4, True)])
    def test_a_single_latent_is_vardiu_itself(
        self, generator: Linear, draws: int, antithetic: bool, rng: torch.Generator
    ) -> None:
        draw = random_draw(generator, VE(), (0.3, 0.5), 1, rng, draws=draws, antithetic=antithetic)
        shared, single = VarDiU(target(VE()), Prior(), "batch"), VarDiU(target(VE()), Prior())
        losses = [objective.generator_loss(draw) for objective in (shared, single)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        slopes = [gradients(loss, *generator.parameters()) for loss in losses]
        torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)

    def test_images_give_what_their_pixels_give(self, rng: torch.Generator) -> None:
        A, b = torch.randn(16, 3, generator=rng), torch.randn(16, generator=rng)
        images, vectors = Linear(A, b, (1, 4, 4)), Linear(A.clone(), b.clone())
        teacher = GaussianMixture(torch.randn(5, 16, generator=rng), std=0.7)
        draw = random_draw(images, teacher.schedule, (0.5, 0.7), 6, rng, draws=2, antithetic=True)
        flat = replace(
            draw, x=draw.noise.rows(vectors(draw.z[:6])), noise=replace(draw.noise, eps=draw.noise.eps.flatten(1))
        )
        of_images, of_vectors = VarDiU(OfImages(teacher), Prior(), "batch"), VarDiU(teacher, Prior(), "batch")
        loss, expected = of_images.generator_loss(draw), of_vectors.generator_loss(flat)
        assert loss.shape == (12,)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(of_images.bound(draw), of_vectors.bound(flat))
        torch.testing.assert_close(gradients(loss, images.A, images.b), gradients(expected, vectors.A, vectors.b))


class OfImages(nn.Module):
    """A teacher of vectors as one of images."""

    def __init__(self, teacher: GaussianMixture) -> None:
        super().__init__()
        self.teacher, self.schedule = teacher, teacher.schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.teacher(x_t.flatten(1), t).view_as(x_t)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.teacher.log_prob(x_t.flatten(1), t)


class Latents2d(Linear):
    """The linear generator with latents of shape (1, 2)."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__(A, b)
        self.latent_shape = (1, A.shape[1])

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(1))


@pytest.mark.parametrize("candidates", [0, 3, "batch"])
def test_latents_of_any_shape_give_what_flat_ones_give(
    generator: Linear, candidates: int | str, rng: torch.Generator
) -> None:
    shaped = Latents2d(generator.A.detach().clone(), generator.b.detach().clone())
    count = candidates if isinstance(candidates, int) else 0
    draw = random_draw(generator, VE(), (0.5,), 5, rng, count)
    eta = None if draw.eta is None else draw.eta.unflatten(2, (1, 2))
    z = draw.z[:, None]
    draw_shaped = Draw(z, shaped(z), draw.noise, shaped, eta)
    posterior = Prior() if candidates == "batch" else wrong_posterior(generator)
    objective = VarDiU(target(VE()), posterior, candidates)
    torch.testing.assert_close(objective.generator_loss(draw_shaped), objective.generator_loss(draw))
    torch.testing.assert_close(objective.bound(draw_shaped), objective.bound(draw))


@pytest.mark.parametrize("candidates", [0, 3, "batch"])
def test_one_loss_a_row_times_its_weight(generator: Linear, candidates: int | str, rng: torch.Generator) -> None:
    posterior = Prior() if candidates == "batch" else wrong_posterior(generator)
    objective = VarDiU(target(VE()), posterior, candidates)
    draw = random_draw(generator, VE(), (0.5,), 4, rng, objective.needs.eta, draws=2)
    weight = torch.rand(8, generator=rng)
    weighted = replace(draw, noise=replace(draw.noise, weight=weight))
    for loss in (objective.generator_loss, objective.posterior_loss):
        assert loss(draw).shape == (8,)
        torch.testing.assert_close(loss(weighted), weight * loss(draw))


class PosteriorOfLabels(Posterior):
    """q(z | x_t, c) = q_c(z | x_t)."""

    def __init__(self, posteriors: list[LinearPosterior]) -> None:
        super().__init__()
        self.of_label = nn.ModuleList(posteriors)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Gaussian:
        gaussians = [posterior(x_t, alpha, sigma) for posterior in self.of_label]
        return Gaussian(pick([q.loc for q in gaussians], labels), pick([q.covariance for q in gaussians], labels))


@every_schedule
@pytest.mark.parametrize("candidates", [0, 3])
def test_under_labels_losses_and_gradients_are_those_of_each_class_alone(
    candidates: int, schedule: Schedule, rng: torch.Generator
) -> None:
    generator, teacher = students(), targets(schedule)
    posteriors = [wrong_posterior(generator.of(c)) for c in range(2)]
    both = VarDiU(teacher, PosteriorOfLabels(posteriors), candidates)
    drawn = labelled_drawn(generator, schedule, (0.2, 0.6), 12, rng, candidates, draws=2, antithetic=True)
    draw = complete(drawn, generator)
    loss, bound = both.generator_loss(draw), both.bound(draw)
    of_A, of_b = torch.autograd.grad(loss.sum(), list(generator.parameters()), retain_graph=True)
    for c, (posterior, denoiser) in enumerate(zip(posteriors, teacher.of_label, strict=True)):
        alone, objective = generator.of(c), VarDiU(denoiser, posterior, candidates)
        own, rows = of_label(draw, c, alone)
        assert 0 < len(rows) < 24
        torch.testing.assert_close(loss[rows], objective.generator_loss(own), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(bound[rows], objective.bound(own), rtol=1e-10, atol=1e-10)
        expected = gradients(objective.generator_loss(own), *alone.parameters(), posterior.shift)
        actual = [of_A[c].flatten(), of_b[c], gradients(loss, posterior.shift)]
        torch.testing.assert_close(torch.cat(actual), expected, rtol=1e-9, atol=1e-9)


def test_loss_is_the_formula_of_the_paper(generator: Linear, rng: torch.Generator) -> None:
    schedule = VP()
    draw = random_draw(generator, schedule, (0.2, 0.6), 16, rng)
    posterior, teacher = wrong_posterior(generator), target(schedule)
    alpha, sigma, x_t = draw.noise.alpha, draw.noise.sigma, draw.x_t.detach().requires_grad_()
    (s_t,) = torch.autograd.grad(target_marginal(teacher, alpha, sigma).log_prob(x_t).sum(), x_t)
    expected = (-posterior(x_t, alpha, sigma).log_prob(draw.z) - (s_t * x_t).sum(1)) / DATA
    actual = VarDiU(teacher, posterior, control_variate="zero").generator_loss(draw)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("posterior", [DiagonalGaussian, FullGaussian, MixtureOfGaussians, NeuralSplineFlow])
def test_every_learned_posterior_reaches_generator_and_itself(
    generator: Linear, posterior: type[Posterior], rng: torch.Generator
) -> None:
    q = posterior(DATA, LATENT, 1.0, depth=2, width=8)  # type: ignore[call-arg]
    objective = VarDiU(target(VE()), q, 2 if q.reparameterised else 0)
    draw = random_draw(generator, VE(), (0.5,), 4, rng, objective.needs.eta)
    objective.generator_loss(draw).sum().backward()
    for parameter in (*generator.parameters(), *objective.networks["posterior"].parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_posterior_loss_trains_the_posterior_alone(generator: Linear, rng: torch.Generator) -> None:
    posterior = wrong_posterior(generator)
    objective = VarDiU(target(VE()), posterior, posterior_steps=3)
    assert [(update.name, update.trains, update.repeats) for update in objective.updates()] == [
        ("posterior", ("posterior",), 2),
        ("student", ("student", "posterior"), 1),
    ]
    draw = random_draw(generator, VE(), (0.5,), 16, rng)
    of_both = gradients(objective.generator_loss(draw), posterior.shift)
    objective.posterior_loss(draw).sum().backward()
    torch.testing.assert_close(posterior.shift.grad, of_both)
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("candidates", [0, 4])
def test_one_weighting_for_the_posterior(candidates: int, generator: Linear, rng: torch.Generator) -> None:
    """In φ the gradients of its own updates and of the joint one are the same for a draw, at any w(t)."""
    posterior = wrong_posterior(generator)
    objective = VarDiU(target(VP()), posterior, candidates, posterior_steps=2)
    draw = random_draw(generator, VP(), (0.1, 0.5, 0.9), 16, rng, candidates)
    draw = replace(draw, noise=replace(draw.noise, weight=draw.noise.sigma**2 / draw.noise.alpha))
    of_joint, of_own = (
        gradients(loss(draw), posterior.shift) for loss in (objective.generator_loss, objective.posterior_loss)
    )
    torch.testing.assert_close(of_own, of_joint, rtol=1e-12, atol=1e-12)


def test_posterior_loss_with_candidates_has_the_posterior_gradient_of_the_bound(
    generator: Linear, rng: torch.Generator
) -> None:
    posterior = wrong_posterior(generator)
    objective = VarDiU(target(VE()), posterior, 4, posterior_steps=2)
    draw = random_draw(generator, VE(), (0.5,), 16, rng, 4)
    expected = gradients(objective.bound(draw) / DATA, posterior.shift)
    torch.testing.assert_close(gradients(objective.posterior_loss(draw), posterior.shift), expected)


class Recording(nn.Module):
    """A learned teacher that keeps what it was called with."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.denoiser = Preconditioned(LevelMLP(DATA, DATA, depth=1, width=8), 1.0, schedule)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.calls.append(condition)
        return self.dropout(self.denoiser(x_t, t))


class TestTeacher:
    def test_it_is_frozen_and_stays_in_evaluation_mode(self, generator: Linear, rng: torch.Generator) -> None:
        teacher = Recording(VE()).train()
        objective = VarDiU(teacher, wrong_posterior(generator))
        draw = random_draw(generator, VE(), (0.5,), 4, rng)
        assert not any(module.training for module in teacher.modules())
        objective.generator_loss(draw).sum().backward()
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    def test_it_is_none_of_the_networks_that_are_trained_and_kept(self, generator: Linear) -> None:
        posterior = wrong_posterior(generator)
        assert VarDiU(Recording(VE()), posterior).networks == {"posterior": posterior}
        assert VarDiU(Recording(VE()), Prior(), candidates="batch").networks == {}

    def test_it_receives_the_conditions_of_the_batch(self, generator: Linear, rng: torch.Generator) -> None:
        teacher = Recording(VE())
        labels = torch.arange(4)
        draw = replace(random_draw(generator, VE(), (0.5,), 4, rng), batch={"label": labels})
        VarDiU(teacher, Prior()).generator_loss(draw)
        assert [list(call) for call in teacher.calls] == [["label"]]
        assert teacher.calls[0]["label"] is labels

    def test_without_a_density_there_is_no_bound_to_log(self, generator: Linear, rng: torch.Generator) -> None:
        objective = VarDiU(Recording(VE()), Prior())
        draw = random_draw(generator, VE(), (0.5,), 4, rng)
        assert objective.measure(draw) == {}
        with pytest.raises(UsageError, match="needs a teacher with log_prob, but Recording has none"):
            objective.bound(draw)

    def test_with_a_density_the_bound_is_logged_in_nats(self, generator: Linear, rng: torch.Generator) -> None:
        objective = VarDiU(target(VE()), LinearPosterior(generator))
        draw = random_draw(generator, VE(), (0.5,), 4, rng)
        diagnostics = objective.measure(draw)
        assert not diagnostics["bound"].requires_grad
        torch.testing.assert_close(diagnostics["bound"], objective.bound(draw).mean().detach())


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"candidates": "batch"}, "candidates shared across the batch come from the prior"),
            ({"candidates": -1}, "candidates must be 0, positive, 'batch' or 'chain', but is -1"),
            ({"candidates": "bacth"}, "candidates must be 0, positive, 'batch' or 'chain', but is bacth"),
            ({"candidates": 1.5}, "candidates must be 0, positive, 'batch' or 'chain', but is 1.5"),
            ({"control_variate": "gausian"}, "unknown control variate 'gausian': did you mean gaussian?"),
            ({"posterior_steps": 0}, "posterior_steps must be at least 1"),
            ({"posterior": Prior(), "posterior_steps": 2}, "and 1 for the prior"),
            ({"posterior": MixtureOfGaussians(DATA, LATENT, 1.0), "candidates": 2}, "no reparameterised draws"),
        ],
    )
    def test_arguments(self, generator: Linear, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError) as caught:
            VarDiU(target(VE()), **({"posterior": wrong_posterior(generator)} | arguments))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_candidates_without_their_random_numbers(self, generator: Linear, rng: torch.Generator) -> None:
        objective = VarDiU(target(VE()), wrong_posterior(generator), 4)
        with pytest.raises(UsageError, match=r"needs draw\.eta, \(4, R, latent\)"):
            objective.generator_loss(random_draw(generator, VE(), (0.5,), 4, rng))
