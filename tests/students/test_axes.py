"""The linear-Gaussian start: moments of the data, the exact posterior, and a bound without a gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from linear_gaussian import random_draw, student_marginal, target_marginal, z_limit, z_scores
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import VE, VP, Schedule
from vardistill.errors import UsageError
from vardistill.objectives import VarDiU
from vardistill.posteriors.few import DiagonalGaussian, FullGaussian, MixtureOfGaussians, NeuralSplineFlow, Posterior
from vardistill.students.axes import SMALLEST_SCALE, PrincipalAxes, principal_axes
from vardistill.students.perceptron import MLP

pytestmark = pytest.mark.usefixtures("float64")

FACTOR = torch.tensor([[2.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
MEAN = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)

every_latent = pytest.mark.parametrize("latent", [1, 2, 3])
every_schedule = pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
Family = Callable[..., Posterior]
FAMILIES: list[Family] = [DiagonalGaussian, FullGaussian, MixtureOfGaussians, NeuralSplineFlow]


def points(n: int = 400) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return MEAN + torch.randn(n, 3, generator=rng, dtype=torch.float64) @ FACTOR.T


def start(latent: int, **options: int) -> tuple[MLP, PrincipalAxes]:
    torch.manual_seed(0)
    axes = principal_axes(points(), latent)
    return MLP(latent, 3, depth=1, width=8, data_std=1.3, linear=True, **options).start_from(axes), axes


def posterior(family: Family, axes: PrincipalAxes, latent: int) -> Posterior:
    torch.manual_seed(1)
    return family(3, latent, 1.3, depth=2, width=16, axes=axes)


class TestAxes:
    def test_all_of_them_give_the_datas_covariance(self) -> None:
        axes = principal_axes(points(), 3)
        U, s = axes.directions, axes.scales
        torch.testing.assert_close(U.T @ U, torch.eye(3))
        torch.testing.assert_close(U @ torch.diag(s**2) @ U.T, points().T.cov())
        torch.testing.assert_close(axes.mean, points().mean(0))
        assert (s.diff() < 0).all()

    @every_latent
    def test_the_first_ones_are_those_of_all(self, latent: int) -> None:
        few, every = principal_axes(points(), latent), principal_axes(points(), 3)
        assert torch.equal(few.directions, every.directions[:, :latent])
        assert torch.equal(few.scales, every.scales[:latent])

    def test_directions_without_spread_keep_some(self) -> None:
        flat = points() * torch.tensor([1.0, 1.0, 0.0])
        scales = principal_axes(flat, 3).scales
        assert float(scales[2]) == pytest.approx(SMALLEST_SCALE * float(scales[0]))

    def test_one_dimension_and_single_precision(self) -> None:
        axes = principal_axes(points()[:, :1].float(), 1)
        torch.testing.assert_close(axes.scales, points()[:, :1].std(0).float())
        assert axes.directions.abs().tolist() == [[1.0]]
        assert axes.mean.dtype == torch.float32

    @pytest.mark.parametrize(
        ("data", "axes", "match"),
        [
            (points(1), 1, "need 2 points and 1 to 3 axes, but got 1 points and 1 axes"),
            (points(), 4, "but got 400 points and 4 axes"),
            (points(), 0, "but got 400 points and 0 axes"),
            (torch.ones(5, 3), 2, "need data that vary, but all points are the same"),
            (torch.tensor([[1.0, 2.0], [math.nan, 3.0]]), 1, "need finite points, but got NaN or infinity"),
            (torch.zeros(4, 2, 3), 1, "points .n, d. of floats, but got .4, 2, 3. of torch.float32"),
            (torch.zeros(4, 2, dtype=torch.uint8), 1, "but got .4, 2. of torch.uint8"),
        ],
    )
    def test_mistakes(self, data: Tensor, axes: int, match: str) -> None:
        with pytest.raises(UsageError, match=match):
            principal_axes(data, axes)


class TestGenerator:
    def test_it_starts_as_the_map_with_the_datas_moments(self) -> None:
        """Its mean and covariance are those of x = μ + U diag(s) z, whose covariance at all axes is the data's."""
        generator, axes = start(3)
        assert torch.equal(generator(torch.zeros(1, 3))[0], axes.mean)
        columns = (generator(torch.eye(3)) - axes.mean).T
        torch.testing.assert_close(columns, axes.directions * axes.scales)
        torch.testing.assert_close(columns @ columns.T, points().T.cov())

    @every_latent
    def test_it_is_made_of_points_in_one_call(self, latent: int) -> None:
        """With their scale, their precision and their axes, which it gives back."""
        generator, axes = MLP.from_data(points(), latent, depth=1, width=8), principal_axes(points(), latent)
        assert generator.data_std == pytest.approx(float(points().var(0).mean().sqrt()))
        assert (generator.latent_shape, generator.data_shape) == ((latent,), (3,))
        z = torch.randn(5, latent, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(generator(z), axes.mean + z @ (axes.directions * axes.scales).T)
        for name in ("mean", "directions", "scales"):
            torch.testing.assert_close(getattr(generator.axes, name), getattr(axes, name))

    def test_it_has_a_latent_for_every_dimension_unless_told_otherwise(self) -> None:
        assert MLP.from_data(points()).latent_shape == (3,)

    def test_one_from_random_weights_has_no_axes(self) -> None:
        with pytest.raises(UsageError, match=r"has no principal axes: see MLP.from_data"):
            _ = MLP(2, 3).axes
        with pytest.raises(UsageError, match=r"linear map is not set: see MLP.from_data"):
            _ = MLP(2, 3, linear=True).axes

    def test_an_int_as_the_datas_mean_does_not_round_the_map(self) -> None:
        axes = principal_axes(points().float(), 3)
        assert torch.equal(MLP(3, 3, linear=True, data_mean=0).start_from(axes).offset, axes.mean)

    @every_latent
    def test_its_perceptron_learns_and_comes_back_from_disk(self, latent: int, tmp_path: Path) -> None:
        generator, _ = start(latent, fourier=4)
        z = torch.randn(64, latent, generator=torch.Generator().manual_seed(0))
        generator(z).pow(2).sum().backward()
        last = generator.layers[-1]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in last.parameters())
        assert not any(p is generator.slope or p is generator.offset for p in generator.parameters())
        generator.float().save_pretrained(tmp_path)
        assert torch.equal(MLP.from_pretrained(tmp_path).float().sample(10), generator.sample(10))

    def test_axes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(UsageError, match=r"principal axes \(3, 2\) need MLP\(linear=True\) of shape \(3, 1\)"):
            MLP(1, 3, linear=True).start_from(principal_axes(points(), 2))
        with pytest.raises(UsageError, match=r"need MLP\(linear=True\)"):
            MLP(2, 3).start_from(principal_axes(points(), 2))


def teacher(schedule: Schedule) -> GaussianMixture:
    covariance = torch.eye(3) + 0.3 * torch.ones(3, 3)
    return GaussianMixture(torch.zeros(1, 3), covariances=covariance[None], schedule=schedule)


def of_start(generator: MLP, schedule: Schedule, rng: torch.Generator, n: int = 64) -> Draw:
    with torch.no_grad():
        return random_draw(generator, schedule, (0.1, 0.4, 0.8), n, rng)


def log_ratio(generator: MLP, target: GaussianMixture, draw: Draw) -> Tensor:
    """log p_θ^t(x_t) − log p_d^t(x_t) at the linear start, (R,)."""
    scales = draw.noise.alpha, draw.noise.sigma
    student = student_marginal(generator.slope.T, generator.offset, *scales)
    return student.log_prob(draw.x_t) - target_marginal(target, *scales).log_prob(draw.x_t)


class TestPosterior:
    @every_schedule
    @every_latent
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_starts_as_the_exact_one_and_the_bound_without_a_gap(
        self, family: Family, latent: int, schedule: Schedule, rng: torch.Generator
    ) -> None:
        """Row by row the bound's integrand is then the log-ratio itself."""
        generator, axes = start(latent)
        draw, target = of_start(generator, schedule, rng), teacher(schedule)
        q = posterior(family, axes, latent)
        with torch.no_grad():
            log_q = q(draw.x_t, draw.noise.alpha, draw.noise.sigma).log_prob(draw.z)
            bound = VarDiU(target, q).bound(draw)
        torch.testing.assert_close(log_q, exact_log_prob(generator, draw), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bound, log_ratio(generator, target, draw), rtol=1e-9, atol=1e-9)

    @every_latent
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_sees_every_direction_of_the_data(self, family: Family, latent: int, rng: torch.Generator) -> None:
        """A student that bends leaves its axes: what lies off them tells of z, too."""
        q = posterior(family, principal_axes(points(), latent), latent)
        with torch.no_grad():
            for parameter in q.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
        x_t = points(4).requires_grad_()
        z = torch.randn(4, latent, generator=rng)
        q(x_t, torch.ones(4), torch.full((4,), 0.5)).log_prob(z).sum().backward()
        assert x_t.grad is not None
        directions = principal_axes(points(), 3).directions
        assert ((x_t.grad @ directions).abs() > 1e-6).all()  # rounding leaves 1e-15 of a direction that is not seen

    @every_latent
    def test_a_flow_learns_with_all_its_parameters(self, latent: int, rng: torch.Generator) -> None:
        """Layers of zeros hold up the gradient of those below them for the first step alone."""
        generator, axes = start(latent)
        draw, q = of_start(generator, VE(), rng), posterior(NeuralSplineFlow, axes, latent)
        optimiser = torch.optim.Adam(q.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            q(draw.x_t, draw.noise.alpha, draw.noise.sigma).log_prob(draw.z).mean().neg().backward()
            optimiser.step()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in q.parameters())

    @every_latent
    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_integrates_to_one_when_trained(self, family: Family, latent: int, rng: torch.Generator) -> None:
        """By importance sampling from the wider Gaussian N(0, 4 I), 100,000 draws of seed 0, failure rate 1e-4."""
        _, axes = start(latent)
        q = posterior(family, axes, latent)
        with torch.no_grad():
            for parameter in q.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
            ratio = torch.tensor([3.0])
            x_t = points(1)
            proposal = MultivariateNormal(torch.zeros(latent), 4 * torch.eye(latent))
            z = 2 * torch.randn(100_000, 1, latent, generator=rng)
            weight = (q(x_t, torch.ones(1), ratio).log_prob(z) - proposal.log_prob(z)).exp()
        assert z_scores(weight, 1.0).abs() < z_limit(1)

    def test_the_components_of_a_mixture_learn_different_things(self, rng: torch.Generator) -> None:
        """They start equal, so equal weights would keep them equal for ever."""
        generator, axes = start(2)
        q = posterior(MixtureOfGaussians, axes, 2)
        bent = of_start(generator, VE(), rng, 256)
        bent = replace(bent, x=bent.x + (bent.z[:, :1] ** 2) * FACTOR[:, 0])
        VarDiU(teacher(VE()), q, posterior_steps=2).posterior_loss(bent).mean().backward()
        last = list(q.parameters())[-2]
        assert last.grad is not None
        slopes = last.grad.view(q.components, 5, -1)[:, 1:].flatten(1)
        similarity = torch.nn.functional.cosine_similarity(slopes[:, None], slopes, dim=2)
        assert similarity.min() < 0.999  # equal weights leave 1 to rounding
        assert (slopes.norm(dim=1) > 0).all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_axes_come_back_from_a_state_and_must_fit(self, family: Family, rng: torch.Generator) -> None:
        generator, axes = start(2)
        q, other = posterior(family, axes, 2), posterior(family, principal_axes(2 * points(), 2), 2)
        draw = of_start(generator, VP(), rng)
        scales = draw.noise.alpha, draw.noise.sigma
        other.load_state_dict(q.state_dict())
        assert torch.equal(other(draw.x_t, *scales).log_prob(draw.z), q(draw.x_t, *scales).log_prob(draw.z))
        with pytest.raises(UsageError, match="a posterior of 2 latents needs as many axes, but has 3"):
            family(3, 2, 1.0, axes=principal_axes(points(), 3))


def exact_log_prob(generator: MLP, draw: Draw) -> Tensor:
    """log p(z | x_t) of the linear start, by Bayes' rule, (R,)."""
    prior = MultivariateNormal(torch.zeros(draw.z.shape[1]), torch.eye(draw.z.shape[1]))
    scales = draw.noise.alpha, draw.noise.sigma
    noise = MultivariateNormal(draw.noise.alpha[:, None] * draw.x, (scales[1] ** 2)[:, None, None] * torch.eye(3))
    marginal = student_marginal(generator.slope.T, generator.offset, *scales)
    return prior.log_prob(draw.z) + noise.log_prob(draw.x_t) - marginal.log_prob(draw.x_t)
