"""Diagnostics against closed forms."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from torch import Tensor

import small_runs
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.levels import EDM
from vardistill.diffusion.noise import Draw, Noise, NoiseLevels
from vardistill.diffusion.schedules import VE
from vardistill.domains.points.problems import Mixture
from vardistill.objectives import DiffInstruct, Part, WeightedSum
from vardistill.objectives.diagnostics import FINENESS, diversities, diversity, low_level_share, posterior_information
from vardistill.posteriors.few import Diagonal, Posterior
from vardistill.training.loop import Diverged, Trainer
from vardistill.training.warning_signs import RULES, WINDOW

A = torch.tensor([1.5, 0.3])
"""The generator x = a z of the closed forms, entry by entry."""


class Exact(Posterior):
    """p(z | x_t) of x_t = α a z + σ ε; `ignorant`: the prior, whatever x_t is."""

    def __init__(self, ignorant: bool = False) -> None:
        super().__init__()
        self.ignorant = ignorant

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Diagonal:
        if self.ignorant:
            return Diagonal(torch.zeros_like(x_t), torch.ones_like(x_t))
        alpha, sigma = alpha[:, None], sigma[:, None]
        precision = 1 + (alpha * A / sigma) ** 2
        return Diagonal(alpha * A / sigma**2 / precision * x_t, precision**-0.5)


def linear_draw(n: int, rng: torch.Generator, ratio: float | None = None) -> Draw:
    z = torch.randn(n, 2, generator=rng)
    noise = NoiseLevels(VE(), EDM()).draw((2,), n, 0.0, rng)
    if ratio is not None:
        noise = Noise(*(torch.full((n,), v) for v in (0.5, 1.0, ratio, 1.0)), noise.eps, n)
    return Draw(z, A * z, noise, lambda z: A * z)


class TestPosteriorInformation:
    def test_of_an_exact_posterior_it_is_the_mutual_information(self, rng: torch.Generator) -> None:
        draw = linear_draw(40_000, rng, ratio=0.4)
        values = posterior_information(Exact(), draw)
        exact = 0.5 * float(torch.log1p((A / 0.4) ** 2).sum())
        # log q − log p is a sum over the two latents of ½(z² − η²) plus constants, with a standard deviation below 1:
        # the mean of 40,000 has one below 0.006, and 5 of them are passed less than once in a million (seed 0)
        assert float(values["posterior_information"]) == pytest.approx(exact, abs=0.03)
        # a sample covariance of 1,024 has relative errors of √(2/1024); two of them, halved: 0.03 nats, 5 times
        assert float(values["posterior_capacity"]) == pytest.approx(exact, abs=0.16)

    def test_of_a_posterior_that_ignores_x_t_it_is_zero(self, rng: torch.Generator) -> None:
        values = posterior_information(Exact(ignorant=True), linear_draw(64, rng))
        assert float(values["posterior_information"]) == pytest.approx(0.0, abs=1e-5)

    def test_a_wrong_posterior_tells_less(self, rng: torch.Generator) -> None:
        class Wrong(Exact):
            def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Diagonal:
                q = super().forward(x_t, alpha, sigma)
                return Diagonal(q.loc + 0.5, q.scale)

        draw = linear_draw(4000, rng, ratio=0.4)
        exact, wrong = (posterior_information(q, draw)["posterior_information"] for q in (Exact(), Wrong()))
        lost = 0.5 * float((0.5**2 * (1 + (A / 0.4) ** 2)).sum())  # KL of two Gaussians that differ in the mean
        # the difference is lost + a Gaussian of standard deviation √(2 lost/4000) < 0.04: 5 times (seed 0)
        assert float(exact - wrong) == pytest.approx(lost, abs=0.2)

    def test_the_capacity_is_that_of_the_samples_covariance(self, rng: torch.Generator) -> None:
        draw = linear_draw(50, rng)
        capacity = posterior_information(Exact(), draw)["posterior_capacity"]
        covariance = torch.cov(draw.x.T, correction=0)
        determinants = [torch.linalg.det(torch.eye(2) + covariance / s**2) for s in draw.noise.sigma]
        torch.testing.assert_close(capacity, 0.5 * torch.stack(determinants).log().mean(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_samples_that_are_not_finite_there_is_no_capacity(self, value: float, rng: torch.Generator) -> None:
        draw = linear_draw(64, rng)
        draw.x[3, 1] = value
        assert posterior_information(Exact(), draw)["posterior_capacity"].isnan()


class TestDiversity:
    @pytest.mark.parametrize("ratio", [0.5, 1.0])
    def test_of_gaussian_samples_it_is_the_information_that_noise_leaves(
        self, ratio: float, rng: torch.Generator
    ) -> None:
        x, eps = torch.randn(2, 2000, 2, generator=rng)
        exact = math.log(1 + ratio**-2)  # ½ log(1 + 1/r²) for either axis
        # the summands' standard deviation is below 1.2, and they are nearly independent: 0.027 for the mean, four of
        # them with the bias of below (1 + 1/r²)/N = 0.0025 (failure rate below 1e-4, seed 0)
        assert float(diversity(x, eps, ratio)) == pytest.approx(exact, abs=0.11)

    def test_it_counts_far_points(self, rng: torch.Generator) -> None:
        points = 100 * torch.arange(4.0)[:, None] * torch.ones(3)
        x, eps = points.repeat(16, 1), torch.randn(64, 3, generator=rng)
        assert float(diversity(x, eps, 0.1)) == pytest.approx(math.log(4), abs=1e-4)
        assert float(diversity(x[::4], eps[::4], 0.1)) == pytest.approx(0.0, abs=1e-4)
        assert float(diversity(points, eps[:4], 0.1)) == pytest.approx(math.log(4), abs=1e-4)

    def test_losing_half_of_the_modes_costs_log_2(self, rng: torch.Generator) -> None:
        modes = 50 * torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0))
        x = modes[torch.arange(1024) % 8] + torch.randn(1024, 2, generator=rng)
        left = modes[torch.arange(1024) % 4] + torch.randn(1024, 2, generator=rng)
        eps = torch.randn(1024, 2, generator=rng)
        lost = float(diversity(x, eps, 5.0) - diversity(left, eps, 5.0))
        # within a mode both have the same information, with errors of 0.01 (failure rate below 1e-4, seed 0)
        assert lost == pytest.approx(math.log(2), abs=0.05)

    def test_the_targets_own_samples_set_the_scale(self, rng: torch.Generator) -> None:
        draw = linear_draw(64, rng)
        teacher = GaussianMixture(torch.tensor([[0.0, 0.0], [8.0, 0.0]]), std=1.0)
        values = diversities(draw, teacher, 1.0, torch.Generator().manual_seed(3))
        target = teacher.sample(64, torch.Generator().manual_seed(3))
        ratio = FINENESS * math.sqrt(2 * float(target.var(0, correction=0).sum()))
        torch.testing.assert_close(values["diversity_target"], diversity(target, draw.noise.eps, ratio))
        torch.testing.assert_close(values["diversity"], diversity(draw.x, draw.noise.eps, ratio))
        alone = diversities(draw, None, 3.0, rng)
        assert list(alone) == ["diversity"]
        torch.testing.assert_close(alone["diversity"], diversity(draw.x, draw.noise.eps, 2 * 3.0 * FINENESS))

    @pytest.mark.parametrize("d", [2, 8, 32, 128])
    def test_lost_modes_are_a_sign_in_any_dimension(self, d: int, rng: torch.Generator) -> None:
        """By samples of all ten modes, and of five, which are about ln 2 short; 256 a line."""
        problem = Mixture(d)
        (rule,) = (rule for rule in RULES if rule.name == "mode-loss" and "target" in rule.meaning)

        def shortfall(modes: int) -> float:
            teacher = problem.denoiser
            x = GaussianMixture(teacher.means[:modes], std=1.0).sample(256, rng)
            noise = NoiseLevels(VE(), EDM()).draw((d,), 256, 0.0, rng)
            values = diversities(Draw(x, x, noise, lambda z: z), teacher, 1.0, rng)
            return float(values["diversity_target"] - values["diversity"])

        # of sixty lines each, the means are 0.00 to 0.02 and 0.54 to 0.70, the standard deviations at most 0.1: for
        # medians of five at most 0.055, and the threshold is 3.8 or more of them away (failure rate below 1e-4, seed 0)
        complete, half = (median(shortfall(modes) for _ in range(WINDOW)) for modes in (10, 5))
        assert complete < rule.threshold < half


class TestCriticLag:
    @staticmethod
    def lag(critic_std: float, rng: torch.Generator, n: int = 40_000, ratio: float = 1.0) -> float:
        """For samples of N(0, I), a teacher of N(0, 4 I) and a critic that is exact for N(0, s² I)."""
        critic = GaussianMixture(torch.zeros(1, 2), std=critic_std)
        critic.unused = torch.nn.Parameter(torch.zeros(()))
        objective = DiffInstruct(GaussianMixture(torch.zeros(1, 2), std=2.0), critic)
        x, eps = torch.randn(2, n, 2, generator=rng)
        noise = Noise(*(torch.full((n,), v) for v in (0.0, 1.0, ratio, 1.0)), eps, n)
        noise = Noise(critic.schedule.time(noise.sigma), *(noise.alpha, noise.sigma, noise.weight), eps, n)
        return float(objective.measure(Draw(x, x, noise, lambda z: z))["critic_lag"])

    def test_it_compares_the_denoising_errors(self, rng: torch.Generator) -> None:
        def error(std: float) -> float:
            """E (D x_t − x)² of an axis, D = s²/(s² + 1), x and the noise of variance 1."""
            gain = std**2 / (std**2 + 1)
            return (gain - 1) ** 2 + gain**2

        for std in (0.5, 1.0, 2.0, 3.0):
            # the ratio of means of squares over 80,000 entries has a standard deviation below 0.01 (seed 0)
            assert self.lag(std, rng) == pytest.approx(error(std) / error(2.0), abs=0.04)

    def test_a_critic_that_is_the_teachers_copy_has_1(self, rng: torch.Generator) -> None:
        assert self.lag(2.0, rng, n=64) == 1.0

    def test_the_exact_critic_has_the_least(self, rng: torch.Generator) -> None:
        state = rng.get_state()
        lags = [self.lag(std, rng.set_state(state)) for std in (0.9, 1.0, 1.1)]
        assert lags[1] == min(lags)


class TestLowLevelShare:
    def test_by_hand(self) -> None:
        sigma = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
        slopes = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0, 5.0])
        one = torch.ones(6)
        draw = Draw(torch.zeros(6, 1), torch.ones(6, 2), Noise(one, one, sigma, one, torch.zeros(6, 2), 6), torch.abs)
        with torch.no_grad():
            share = low_level_share(lambda draw: slopes * draw.x.sum(1), draw)
        assert float(share) == pytest.approx((1 + 4) / (9 + 1 + 4 + 1 + 25))  # σ = 1 and 2
        assert not share.requires_grad

    @pytest.mark.parametrize("levels", [1, 2, 4, 16])
    def test_it_is_of_a_third_of_the_rows_where_levels_are_shared(self, levels: int) -> None:
        """Rows of equal gradients have it in proportion."""
        sigma = torch.arange(1.0, levels + 1).repeat(48 // levels)
        one = torch.ones(48)
        zeros = torch.zeros(48, 2)
        draw = Draw(torch.zeros(48, 1), zeros + 1, Noise(one, one, sigma, one, zeros, 48, levels), torch.abs)
        assert float(low_level_share(lambda draw: draw.x.sum(1), draw)) == pytest.approx(1 / 3)

    def test_no_gradient_reaches_the_networks(self, rng: torch.Generator) -> None:
        objective, g = small_runs.objective("drawn"), small_runs.generator()
        noise = small_runs.levels().draw((2,), 4, 0.5, rng, torch.float64)
        z = noise.rows(g.latents(4, rng))
        eta = torch.randn(3, 8, 2, generator=rng, dtype=torch.float64)
        share = low_level_share(objective.generator_loss, Draw(z, g(z), noise, g, eta))
        assert 0 < float(share) < 1
        assert all(p.grad is None for p in [*g.parameters(), *objective.networks["posterior"].parameters()])

    def test_a_sum_has_one_for_every_part(self) -> None:
        first, second = small_runs.objective("batch"), small_runs.objective("learned")
        second.teacher = first.teacher
        objective = WeightedSum([Part(first, name="a"), Part(second, 0.5, small_runs.levels(), name="b")])
        trainer = Trainer(small_runs.generator(), objective, small_runs.levels(), small_runs.config(steps=2))
        line = trainer.run().history[-1]
        assert 0 < line["a/low_level_share"] < 1
        assert 0 < line["b/low_level_share"] < 1
        assert "low_level_share" not in line


@pytest.mark.parametrize("kind", [*small_runs.KINDS, *small_runs.FEW])
def test_they_do_not_change_a_run(kind: str) -> None:
    watched, plain = (small_runs.trainer(kind, steps=6, log_every=n, eval_every=0) for n in (1, 1000))
    for trainer in (watched, plain):
        trainer.run()
    expected = {"diversity", "diversity_target"}
    expected |= {f"{term.prefix}low_level_share" for term in watched.objective.terms(watched.diagnostic_draw(0.0))}
    information = {"posterior_information", "posterior_capacity"}
    if any(name in kind for name in ("learned", "drawn", "sum")):
        if kind in small_runs.FEW:  # of later steps' latents the prior is not known
            assert not information & watched.history[0].keys()
        else:
            expected |= information
    assert expected <= watched.history[0].keys()
    assert all(math.isfinite(watched.history[0][name]) for name in expected)
    small_runs.assert_equal(small_runs.state(watched), small_runs.state(plain))


@pytest.mark.parametrize("kind", [*small_runs.KINDS, *small_runs.FEW])
def test_a_generator_that_overflows_ends_its_run_as_diverged(kind: str) -> None:
    trainer = small_runs.trainer(kind, lr=1e200, warmup=0.0, max_skipped=3)
    with pytest.raises(Diverged, match="gradients that are not finite"):
        trainer.run()
    assert not trainer.student.sample(8, seed=0).isfinite().all()
    assert trainer.history[-1]["kind"] == "train"
    assert trainer.history[-1]["skipped"] > 3
