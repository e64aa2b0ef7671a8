"""Real samples: stored sets, a teacher's own, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from vardistill.data import BLOCK, StoredSamples, check_samples, teacher_samples
from vardistill.denoisers import GaussianMixture
from vardistill.errors import UsageError
from vardistill.objectives import VarFlow
from vardistill.schedules import VE, VP, Schedule
from vardistill.training import distill


def test_a_stored_set_is_drawn_from_evenly_with_replacement(rng: torch.Generator) -> None:
    """Seed 0; each of 5 counts of 20,000 is within 4.9 standard deviations but for 1e-6."""
    data = torch.arange(10.0).view(5, 2)
    drawn = StoredSamples(data)(20_000, rng)
    rows, counts = drawn.unique(dim=0, return_counts=True)
    assert torch.equal(rows, data)
    assert ((counts - 4000).abs() < 4.9 * math.sqrt(20_000 * 0.2 * 0.8)).all()
    again = StoredSamples(data)(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.zeros(0, 2), r"must be \(n, \*data\) with n at least 1, but has shape \(0, 2\)"),
        (torch.zeros(3, 0), r"but has shape \(3, 0\)"),
        (torch.zeros(4), r"but has shape \(4,\)"),
        (torch.tensor([[1.0, math.nan], [1.0, 2.0], [math.inf, 0.0]]), "2 of 3 samples hold NaN or infinity"),
    ],
)
def test_sets_that_are_none_are_refused(data: Tensor, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        StoredSamples(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", [VE(), VP()], ids=lambda s: type(s).__name__)
def test_a_teachers_samples_have_its_moments(schedule: Schedule, rng: torch.Generator) -> None:
    """Within what the sampler's 40 steps leave, 0.02, and 4.5 standard errors of 20,000: failure rate 4e-5, seed 0."""
    mean, n = torch.tensor([[0.5, -0.3, 0.2]], dtype=torch.float64), 20_000
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    covariance = factor @ factor.T
    teacher = GaussianMixture(mean, covariances=covariance[None], schedule=schedule)
    assert n > 2 * BLOCK

    class Double:
        """A denoiser that is fed in double precision."""

        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
            return teacher(x_t.double(), t.double()).to(x_t)

    x = teacher_samples(Double(), (3,), n, rng, steps=40).data.double()
    assert x.shape == (n, 3)
    spread = covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean[0]).abs() < 0.02 + 4.5 * spread / math.sqrt(n)).all()
    of_pairs = (spread[:, None] ** 2 * spread**2 + covariance**2).sqrt()
    assert ((x.T.cov() - covariance).abs() < 0.02 + 4.5 * of_pairs / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (lambda n, rng: torch.zeros(n, 3), r"data have shape \(3,\), samples \(2,\)"),
        (lambda n, rng: torch.zeros(1, 2), "data and generator differ"),
        (lambda n, rng: torch.full((n, 2), math.nan), "the data hold NaN or infinity"),
    ],
)
def test_samples_that_do_not_fit_the_generator_are_refused(samples: Callable[..., Tensor], match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        check_samples(samples, (2,), torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [torch.zeros(5, 3), torch.full((5, 2), math.inf), None])
def test_runs_are_refused_before_a_step(data: Any) -> None:
    with pytest.raises(UsageError, match="data"):
        distill(small_runs.generator(), objective=VarFlow(), data=data, training=small_runs.config(steps=1))


def test_data_for_an_objective_that_needs_none_are_left_alone() -> None:
    """The run is the same, whatever they are."""
    runs = [
        distill(small_runs.generator(), teacher=small_runs.teacher(), training=small_runs.config(steps=2), data=data)
        for data in (None, torch.zeros(5, 9))
    ]
    for p, q in zip(*(run.generator.parameters() for run in runs), strict=True):
        assert torch.equal(p, q)
