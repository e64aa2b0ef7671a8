"""MoG-40 is fab-torch's target, and its reference values are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn.functional import softplus

from vardistill.metrics import log_mmd
from vardistill.problems import PROBLEMS, MoG40, Problem
from vardistill.schedules import VP


def fab_target() -> MixtureSameFamily:
    """fab-torch's GMM(dim=2, n_mixes=40, loc_scaling=40, log_var_scaling=1, seed=0)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean = (torch.rand((40, 2)) - 0.5) * 2 * 40
    components = Independent(Normal(mean, softplus(torch.ones(40, 2))), 1)
    return MixtureSameFamily(Categorical(torch.ones(40)), components)


def test_modes_are_those_of_fab() -> None:
    problem, fab = MoG40(), fab_target()
    assert torch.equal(problem.denoiser.means, fab.component_distribution.base_dist.loc)
    torch.testing.assert_close(problem.denoiser.means[0], torch.tensor([-0.2995, 21.4577]), atol=1e-4, rtol=0)
    assert problem.std == pytest.approx(math.log1p(math.e), rel=1e-6)
    torch.testing.assert_close(problem.denoiser.weights, torch.full((40,), 1 / 40))


def test_density_is_that_of_fab(rng: torch.Generator) -> None:
    x = (torch.rand(500, 2, generator=rng) - 0.5) * 100
    torch.testing.assert_close(MoG40().log_prob(x), fab_target().log_prob(x), rtol=1e-4, atol=1e-4)


def test_construction_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    MoG40()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reference_log_density_is_the_integral() -> None:
    """∫ p log p and ∫ p log² p by the trapezoid rule, whose error at a spacing of 0.4 std is below 1e-8."""
    problem, h = MoG40(), 0.5
    problem.denoiser.double()
    axis = torch.arange(-55, 55, h, dtype=torch.float64)
    log_p = problem.log_prob(torch.cartesian_prod(axis, axis))
    mass = log_p.exp() * h**2
    mean = float((mass * log_p).sum())
    std = math.sqrt(float((mass * log_p**2).sum()) - mean**2)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    assert problem.reference.log_density == pytest.approx(mean, abs=1e-5)
    assert problem.reference.log_density_std == pytest.approx(std / math.sqrt(problem.reference.samples), rel=1e-3)


@pytest.mark.slow
def test_reference_floor_of_log_mmd() -> None:
    """Seed 4: the mean of 20 comparisons within 4.5 standard errors of the reference: 7e-6."""
    problem, rng, repeats = MoG40(), torch.Generator().manual_seed(4), 20
    n = problem.reference.samples
    floor = torch.tensor([log_mmd(problem.sample(n, rng), problem.sample(n, rng)) for _ in range(repeats)])
    tolerance = 4.5 * problem.reference.log_mmd_std / math.sqrt(repeats)
    assert float(floor.mean()) == pytest.approx(problem.reference.log_mmd, abs=tolerance)
    assert 0.4 < float(floor.std()) / problem.reference.log_mmd_std < 1.8


def test_scale_of_the_data(rng: torch.Generator) -> None:
    """Over 40,000 samples; the standard error of the std is below 0.3 %."""
    problem = MoG40()
    samples = problem.sample(40_000, rng)
    assert samples.shape == (40_000, *problem.data_shape)
    assert float(samples.var(0).mean().sqrt()) == pytest.approx(problem.data_std, rel=0.0135)


def test_schedule_of_the_teacher_is_chosen(rng: torch.Generator) -> None:
    problem = MoG40(schedule=VP())
    assert problem.denoiser.schedule == VP()
    x = problem.sample(5, rng)
    assert torch.equal(problem.log_prob(x), MoG40().log_prob(x))


@pytest.mark.parametrize("name", PROBLEMS)
def test_registry(name: str, rng: torch.Generator) -> None:
    problem = PROBLEMS[name]()
    assert isinstance(problem, Problem)
    assert problem.name == name
    x = problem.sample(3, rng)
    assert x.shape == (3, *problem.data_shape)
    assert problem.log_prob(x).shape == (3,)
    assert problem.denoiser(x, torch.full((3,), 0.5)).shape == x.shape


def test_data_std_of_unequal_weights() -> None:
    """In one dimension, means 0 and 2 with weights ¼ and ¾: variance 3/4 + std²."""
    problem = Problem(torch.tensor([[0.0], [2.0]]), std=0.5, weights=torch.tensor([1.0, 3.0]))
    assert problem.data_std == pytest.approx(math.sqrt(0.75 + 0.25))
