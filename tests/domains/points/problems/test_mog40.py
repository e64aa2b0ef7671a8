"""MoG-40 is fab-torch's target, and its reference values are right."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn.functional import softplus

from vardistill.diffusion.schedules import VP
from vardistill.domains.points.problems import MixtureProblem, MoG40
from vardistill.metrics import log_mmd
from vardistill.metrics.mmd import BANDWIDTHS


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
    assert problem.bandwidths == BANDWIDTHS
    torch.testing.assert_close(problem.denoiser.weights, torch.full((40,), 1 / 40))


def test_density_is_that_of_fab(rng: torch.Generator) -> None:
    x = (torch.rand(500, 2, generator=rng) - 0.5) * 100
    torch.testing.assert_close(MoG40().log_prob(x), fab_target().log_prob(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_reference_floor_of_log_mmd() -> None:
    """Seed 4: the mean of 10 comparisons within 4.5 standard errors, 7e-6; their spread by χ², 6e-5."""
    problem, rng, repeats = MoG40(), torch.Generator().manual_seed(4), 10
    n = problem.reference.samples
    floor = torch.tensor([log_mmd(problem.sample(n, rng), problem.sample(n, rng)) for _ in range(repeats)])
    tolerance = 4.5 * problem.reference.log_mmd_std / math.sqrt(repeats)
    assert float(floor.mean()) == pytest.approx(problem.reference.log_mmd, abs=tolerance)
    assert 0.25 < float(floor.std()) / problem.reference.log_mmd_std < 2.1


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


def test_mean_and_std_of_unequal_weights() -> None:
    """In one dimension, means 0 and 2 with weights ¼ and ¾: mean 3/2, variance 3/4 + std²."""
    problem = MixtureProblem(torch.tensor([[0.0], [2.0]]), std=0.5, weights=torch.tensor([1.0, 3.0]))
    assert problem.data_std == pytest.approx(math.sqrt(0.75 + 0.25))
    assert problem.data_mean.tolist() == [1.5]
