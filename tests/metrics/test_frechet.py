"""Fréchet distance: closed forms of Gaussians, whose moments are built exactly, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import frechet_distance
from vardistill.metrics.frechet import gaussian_distance, moments


def with_moments(mean: Tensor, covariance: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n points of exactly this mean and covariance."""
    points = torch.randn(n, len(mean), generator=rng)
    orthonormal, _ = torch.linalg.qr(points - points.mean(0))
    return mean + (n - 1) ** 0.5 * orthonormal @ torch.linalg.cholesky(covariance).T


def random_covariance(d: int, rng: torch.Generator) -> Tensor:
    root = torch.randn(d, d, generator=rng)
    return root @ root.T + 0.1 * torch.eye(d)


@pytest.mark.parametrize(("n", "d"), [(50, 3), (200, 64), (10, 64), (2, 1)])
def test_a_set_is_no_distance_from_itself(n: int, d: int, rng: torch.Generator, float64: None) -> None:
    x = 5 + torch.randn(n, d, generator=rng) * torch.logspace(-4, 2, d)
    assert frechet_distance(x, x.clone()) <= 1e-9 * float(x.var(0).sum())
    assert frechet_distance(x, x[torch.randperm(n, generator=rng)]) <= 1e-9 * float(x.var(0).sum())


def test_one_dimension(rng: torch.Generator, float64: None) -> None:
    """(μ₁ − μ₂)² + (σ₁ − σ₂)²."""
    x = with_moments(torch.tensor([1.0]), torch.tensor([[4.0]]), 20, rng)
    y = with_moments(torch.tensor([-2.0]), torch.tensor([[0.25]]), 9, rng)
    assert frechet_distance(x, y) == pytest.approx(9 + 1.5**2, rel=1e-12)


def test_commuting_covariances(rng: torch.Generator, float64: None) -> None:
    """Σ (√λ_i − √κ_i)² in the common axes."""
    axes, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))
    first, second = torch.rand(2, 6, generator=rng) + 0.1
    x, y = (with_moments(torch.zeros(6), axes * v @ axes.T, 30, rng) for v in (first, second))
    assert frechet_distance(x, y) == pytest.approx(float((first.sqrt() - second.sqrt()).square().sum()), rel=1e-10)


def test_two_dimensions(rng: torch.Generator, float64: None) -> None:
    """tr (C₁C₂)^{1/2} = √(tr C₁C₂ + 2 √(det C₁C₂)) by Cayley and Hamilton, though the two do not commute."""
    c1, c2 = random_covariance(2, rng), random_covariance(2, rng)
    assert (c1 @ c2 - c2 @ c1).abs().max() > 0.1
    x, y = with_moments(torch.ones(2), c1, 15, rng), with_moments(torch.zeros(2), c2, 40, rng)
    root = math.sqrt((c1 @ c2).trace() + 2 * math.sqrt(torch.linalg.det(c1 @ c2)))
    assert frechet_distance(x, y) == pytest.approx(2 + float(c1.trace() + c2.trace()) - 2 * root, rel=1e-11)


def test_the_root_s_trace_is_that_of_the_eigenvalues(rng: torch.Generator, float64: None) -> None:
    c1, c2 = random_covariance(9, rng), random_covariance(9, rng)
    x, y = with_moments(torch.zeros(9), c1, 15, rng), with_moments(torch.zeros(9), c2, 40, rng)
    root = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx(float((c1 + c2).trace() - 2 * root), rel=1e-10)


def test_sets_without_full_rank(rng: torch.Generator, float64: None) -> None:
    """On two perpendicular lines tr (C₁C₂)^{1/2} = 0; two points on each, and four in 50 dimensions."""
    x, y = torch.zeros(2, 50), torch.zeros(2, 50)
    x[:, 0], y[:, 1] = torch.tensor([1.0, -1.0]), torch.tensor([3.0, -3.0])
    assert frechet_distance(x, y) == pytest.approx(2 + 18)
    assert frechet_distance(x, 2 * x) == pytest.approx((2 * 2**0.5 - 2**0.5) ** 2)
    few, many = torch.randn(4, 50, generator=rng), torch.randn(100, 50, generator=rng)
    root = torch.linalg.eigvals(few.T.cov() @ many.T.cov()).real.clamp(min=0).sort().values[-3:].sqrt().sum()
    traces = few.var(0).sum() + many.var(0).sum() + (few.mean(0) - many.mean(0)).square().sum()
    assert frechet_distance(few, many) == pytest.approx(float(traces - 2 * root), rel=1e-9)


def test_rotation_shift_and_exchange_change_nothing_and_scale_its_square(rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(30, 7, generator=rng), 0.5 * torch.randn(40, 7, generator=rng) + 0.3
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=rng))
    value = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(x @ rotation + 3, y @ rotation + 3) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-12)


def test_single_precision_and_any_shape_are_accepted(rng: torch.Generator) -> None:
    x, y = torch.randn(30, 2, 3, generator=rng), torch.randn(40, 2, 3, generator=rng)
    assert frechet_distance(x, y) == frechet_distance(x.double().flatten(1), y.double().flatten(1))


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(10, 2)
    with pytest.raises(UsageError, match="n at least 2"):
        frechet_distance(x, x[:1])
    with pytest.raises(UsageError, match="same data shape"):
        frechet_distance(x, torch.zeros(10, 3))
    with pytest.raises(UsageError, match="finite"):
        frechet_distance(x, torch.full((10, 2), math.nan))
    with pytest.raises(UsageError, match="2 and 3"):
        gaussian_distance(moments(x), moments(torch.zeros(10, 3)))


def test_not_a_number_stays_one() -> None:
    """Rounding below 0 is 0, but moments that overflowed are no perfect score."""
    a = moments(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert gaussian_distance(a, a) >= 0
    assert math.isnan(gaussian_distance(a._replace(mean=a.mean * math.nan), a))
