"""The mixtures are what their pages say, and their reference values are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vardistill.domains.points.problems import (
    PROBLEMS,
    Digits,
    Mixture,
    MixtureProblem,
    ModeReference,
    Modes,
    MoG9,
    MoG40,
    Moons,
    Problem,
)
from vardistill.domains.points.problems.mixture import REFERENCES
from vardistill.errors import UsageError
from vardistill.metrics.mmd import gaussian_kernel

MIXTURES = [name for name in PROBLEMS if name != "digits"]
SEPARATED = ["mog9", "mixture8", "mixture32", "mixture128"]
WITH_MODES = [name for name in MIXTURES if name != "moons"]
PLANE = ["mog40", "mog9", "moons", "mixture2"]


def mixture(name: str) -> MixtureProblem:
    problem = PROBLEMS[name]()
    assert isinstance(problem, MixtureProblem)
    return problem


def mean_kernel(problem: MixtureProblem) -> float:
    """E k(x, x′) = mean over h of Σ_kl π_k π_l (h²/v)^(d/2) exp(−‖μ_k − μ_l‖²/2v), v = h² + 2s²."""
    mu, weights = problem.denoiser.means.double(), problem.denoiser.weights.double()
    distance2 = torch.cdist(mu, mu).square()
    terms = []
    for h in problem.bandwidths:
        v = h**2 + 2 * problem.std**2
        terms.append(float(weights @ (-distance2 / (2 * v)).exp() @ weights) * (h**2 / v) ** (mu.shape[1] / 2))
    return sum(terms) / len(terms)


def kernel_moments(k: Tensor) -> tuple[float, float]:
    """E k and √(E k_c²) of the centred kernel, over the pairs of distinct points of a sample."""
    m = len(k)
    k = k.clone().fill_diagonal_(0)
    mean = float(k.sum() / (m * (m - 1)))
    rows = k.sum(1) / (m - 1)
    centred = (k - rows[:, None] - rows + mean).fill_diagonal_(0)
    return mean, math.sqrt(float(centred.square().sum() / (m * (m - 1))))


@pytest.mark.parametrize("name", PLANE)
def test_log_density_is_the_integral(name: str) -> None:
    """The trapezoid rule at a quarter of the std."""
    problem = mixture(name)
    problem.denoiser.double()
    means, h = problem.denoiser.means, problem.std / 4
    low, high = (means.amin(0) - 8 * problem.std).tolist(), (means.amax(0) + 8 * problem.std).tolist()
    axes = [torch.arange(a, b, h, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    log_p = torch.cat([problem.log_prob(x) for x in torch.cartesian_prod(*axes).split(2**14)])
    mass, r = log_p.exp() * h**2, problem.reference
    mean = float((mass * log_p).sum())
    std = math.sqrt(float((mass * log_p**2).sum()) - mean**2)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    assert r.log_density == pytest.approx(mean, abs=2e-6)
    assert r.log_density_std == pytest.approx(std / math.sqrt(r.samples), rel=2e-4)


@pytest.mark.parametrize("name", SEPARATED)
def test_log_density_of_modes_that_do_not_overlap(name: str) -> None:
    """E log p − (−ln K − (d/2) ln 2πe s²) is in [0, mean over k of Σ_l exp(−‖μ_k − μ_l‖²/8s²)]."""
    problem = mixture(name)
    mu, d, r = problem.denoiser.means.double(), problem.data_shape[0], problem.reference
    largest = float(((-torch.cdist(mu, mu).square() / (8 * problem.std**2)).exp().sum(1) - 1).mean())
    alone = -math.log(len(mu)) - 0.5 * d * math.log(2 * math.pi * math.e * problem.std**2)
    assert largest < 2e-5
    assert r.log_density is not None
    assert -1e-6 <= r.log_density - alone <= largest + 1e-6
    assert r.log_density_std == pytest.approx(math.sqrt(d / 2 / r.samples), rel=1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_floor_of_log_mmd_is_the_closed_form(name: str) -> None:
    """E ln MMD² = ln[(2/n)(1 − E k)] − ½ sd² to second order; the constants' standard errors are at most 0.0096."""
    problem, r = mixture(name), PROBLEMS[name]().reference
    closed = math.log(2 / r.samples * (1 - mean_kernel(problem))) - 0.5 * r.log_mmd_std**2
    assert r.log_mmd == pytest.approx(closed, abs=4.5 * 0.0096)


@pytest.mark.parametrize("name", PROBLEMS)
def test_deviations_of_the_floors_are_those_of_their_kernels(name: str, rng: torch.Generator) -> None:
    """√8 ‖k_c‖/n for a degenerate statistic of kernel k; from 1,500 points, and constants good to 8 %: within 20 %."""
    problem = PROBLEMS[name]()
    x = problem.data if problem.data is not None else problem.sample(1500, rng)
    distance2, n = torch.cdist(x, x).double().square(), problem.reference.samples
    mean, norm = kernel_moments(gaussian_kernel(problem.bandwidths)(distance2.clone()))
    log_std = math.sqrt(8) * norm / n / (2 / n * (1 - mean))
    assert problem.reference.log_mmd_std == pytest.approx(log_std, rel=0.2)
    _, energy = kernel_moments(distance2.sqrt())
    assert problem.reference.energy_distance_std == pytest.approx(math.sqrt(8) * energy / n, rel=0.2)


def modes_of(name: str) -> tuple[Modes, ModeReference, int]:
    problem = mixture(name)
    assert problem.modes is not None
    assert problem.reference.modes is not None
    return problem.modes, problem.reference.modes, problem.reference.samples


def spread_over(modes: Modes) -> tuple[Tensor, float]:
    """The share of the samples that belongs to each mode, (K,), and that which is off all.

    In the plane over the radii √(−2 ln u) s and directions at the middles of a grid, outside of 4 s and inside
    alone, around every mode. Above it no two modes overlap.
    """
    k, d = modes.means.shape
    if d > 2:
        return torch.full((k,), 1 / k).double(), math.exp(-8)
    means, middles = modes.means.double(), (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    directions = torch.stack([(2 * math.pi * middles).cos(), (2 * math.pi * middles).sin()], 1)
    mass, off, outside = torch.zeros(k).double(), 0.0, math.exp(-8)
    for share, u in ((outside, outside * middles), (1 - outside, outside + (1 - outside) * middles)):
        rings = modes.std * (-2 * u.log()).sqrt()[:, None, None] * directions
        nearest, owner = torch.cdist((means[:, None] + rings.view(-1, 2)).view(-1, 2), means).min(1)
        mass += share * owner.bincount(minlength=k) / len(owner)
        off += share * float((nearest > 4 * modes.std).double().mean())
    return mass, off


@pytest.mark.parametrize("name", WITH_MODES)
def test_floor_off_the_modes_is_the_closed_form(name: str) -> None:
    """The share outside √χ² = r_d, where no other mode is, and a binomial's deviation.

    Of the constants, which 400 sets measured: within 4.5 of the standard errors that Poisson counts have, 7e-6 each.
    """
    modes, r, n = modes_of(name)
    _, off = spread_over(modes)
    assert r.off_mode == pytest.approx(off, abs=4.5 * math.sqrt(off / (400 * n)))
    error = math.sqrt((2 + 1 / (n * off)) / 1600)
    assert r.off_mode_std == pytest.approx(math.sqrt(off * (1 - off) / n), rel=4.5 * error)


@pytest.mark.parametrize("name", WITH_MODES)
def test_floor_of_the_mode_tv_is_that_of_normal_shares(name: str) -> None:
    """½ Σ E|s_k − 1/K| of normal shares s_k of a multinomial's means and covariance, and its standard deviation.

    Of the constants, which 400 sets measured: within 4.5 standard errors of a normal's, 7e-6 each.
    """
    modes, r, n = modes_of(name)
    mass, _ = spread_over(modes)
    k, s = len(mass), (mass * (1 - mass) / n).sqrt()
    z = (mass - 1 / k) / s
    mean = 0.5 * float((s * (math.sqrt(2 / math.pi) * (-(z**2) / 2).exp() + z * (z / math.sqrt(2)).erf())).sum())
    rho, variance = -1 / (k - 1), (k - 1) / k**2 / n
    covariance = 2 / math.pi * (math.sqrt(1 - rho**2) + rho * math.asin(rho) - 1)
    std = 0.5 * math.sqrt(variance * k * (1 - 2 / math.pi + (k - 1) * covariance))
    assert r.mode_tv == pytest.approx(mean, abs=4.5 * std / 20)
    assert r.mode_tv_std == pytest.approx(std, rel=4.5 / math.sqrt(800))


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_moments_of_the_density(name: str) -> None:
    """Mean, scale and log-density of 20,000 samples, seed 6: 4.5 standard errors, 7e-6 each, the mean's over d."""
    problem, n = mixture(name), 20_000
    x = problem.sample(n, torch.Generator().manual_seed(6))
    assert x.shape == (n, *problem.data_shape)
    error = x.std(0) / math.sqrt(n)
    assert ((x.mean(0) - problem.data_mean).abs() < (4.5 + math.log(x.shape[1]) / 4) * error).all()
    distance2 = (x - problem.data_mean).square().mean(1)
    tolerance = 4.5 * float(distance2.std()) / math.sqrt(n)
    assert float(distance2.mean()) == pytest.approx(problem.data_std**2, abs=tolerance)
    r = problem.reference
    assert float(problem.log_prob(x).double().mean()) == pytest.approx(
        r.log_density, abs=4.5 * r.log_density_std * math.sqrt(r.samples / n) + 1e-4
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_the_teacher_is_that_of_the_density(name: str, rng: torch.Generator, float64: None) -> None:
    """(D(x_t) − x_t)/σ² = ∇ log p_t under the VE schedule, where α = 1."""
    problem = mixture(name)
    problem.denoiser.double()
    x, t = problem.sample(6, rng), torch.linspace(0.1, 0.6, 6)
    _, sigma = problem.denoiser.schedule(t)
    x_t = (x + sigma[:, None] * torch.randn(x.shape, generator=rng)).requires_grad_()
    (score,) = torch.autograd.grad(problem.denoiser.log_prob(x_t, t).sum(), x_t)
    denoised = problem.denoiser(x_t, t)
    torch.testing.assert_close((denoised - x_t) / sigma[:, None] ** 2, score, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("d", REFERENCES)
def test_mixtures_are_separated_alike_in_every_dimension(d: int) -> None:
    problem = Mixture(d)
    nearest = torch.nn.functional.pdist(problem.denoiser.means).min()
    assert problem.name == f"mixture{d}"
    assert float(nearest) == pytest.approx(4 * math.sqrt(2 * d), rel=1e-5)
    assert problem.std == 1
    assert problem.bandwidths == pytest.approx([h * math.sqrt(d / 2) for h in MoG40.bandwidths])
    assert problem.modes is not None
    assert len(problem.modes) == 10


def test_mixtures_of_other_dimensions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"mixtures are there for d in \[2, 8, 32, 128\], but d is 3"):
        Mixture(3)


def test_nine_modes_on_a_grid() -> None:
    means = {tuple(mu) for mu in MoG9().denoiser.means.tolist()}
    assert means == {(a, b) for a in (-5.0, 0.0, 5.0) for b in (-5.0, 0.0, 5.0)}


def test_moons_are_smooth_along_their_arcs() -> None:
    """On a middle quarter of the upper arc, on components and between them.

    That arc's own density ripples by at most 2 exp(−2π²s²/Δ²) < 1e-100 of itself, measured to rounding; with the other
    moon's tail five standard deviations away, and the ends', all of it varies by less than 1e-3.
    """
    problem = Moons()
    theta = math.pi * torch.arange(1, 513, dtype=torch.float64) / 512  # components are at odd multiples of π/256
    arc = torch.stack([theta.cos(), theta.sin()], 1)
    components = math.pi * (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    centres = torch.stack([components.cos(), components.sin()], 1)
    p = (-torch.cdist(arc, centres).square() / (2 * problem.std**2)).exp().sum(1)
    middle = p[192:320]
    assert float(middle.max() / middle.min() - 1) < 1e-11
    bound = 2 * math.exp(-2 * (math.pi * problem.std / (math.pi / 128)) ** 2)
    assert bound < 1e-100
    whole = problem.denoiser.double().log_prob(arc[192:320]).exp()
    assert float(whole.max() / whole.min() - 1) < 1e-3


def test_moons_lie_apart_by_half_and_have_no_modes() -> None:
    problem = Moons()
    upper, lower = problem.denoiser.means.split(128)
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(128))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(128))
    steps = upper.diff(dim=0).norm(dim=1)
    assert float(steps.max()) < 0.25 * problem.std
    assert float(torch.cdist(upper, lower).min()) == pytest.approx(0.5, abs=0.02)
    assert problem.modes is None


@pytest.mark.parametrize("name", PROBLEMS)
def test_registry(name: str, rng: torch.Generator) -> None:
    problem = PROBLEMS[name]()
    assert isinstance(problem, Problem)
    assert problem.name == name
    x = problem.sample(3, rng)
    assert x.shape == (3, *problem.data_shape)
    assert problem.data_mean.shape == problem.data_shape
    assert x.dtype == problem.data_mean.dtype == torch.float32
    wide = problem.bandwidths
    assert all(b == 2 * a for a, b in zip(wide[:-1], wide[1:], strict=True))  # octaves: the fast kernel
    assert (problem.denoiser is None) == (problem.reference.log_density is None)
    assert (problem.held_out is None) == (problem.reference.held_out is None)
    assert (problem.modes is None) == (problem.reference.modes is None)
    if problem.denoiser is not None:
        assert problem.denoiser.log_prob(x).shape == (3,)
        assert problem.denoiser(x, torch.full((3,), 0.5)).shape == x.shape


@pytest.mark.parametrize("kind", [MoG40, MoG9, Moons, lambda **a: Mixture(8, **a), Digits])
def test_construction_is_deterministic_and_leaves_the_global_generator_alone(kind: Any) -> None:
    before = torch.random.get_rng_state()
    a, b = (kind().sample(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.random.get_rng_state(), before)
