"""Density and coverage: the definition, known cases, and their means for samples of the truth."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import density_coverage, precision_recall
from vardistill.metrics.manifolds import ROWS


def by_definition(samples: Tensor, truth: Tensor, k: int) -> tuple[float, float]:
    """Loops over points, as equations 4 and 5 of the paper."""
    radii = [sorted((x - other).norm().item() for other in truth)[k] for x in truth]
    inside = [[(y - x).norm().item() <= r for y in samples] for x, r in zip(truth, radii, strict=True)]
    return sum(map(sum, inside)) / (k * len(samples)), sum(map(any, inside)) / len(truth)


@pytest.mark.parametrize(("m", "n", "d", "k"), [(30, 30, 2, 5), (25, 40, 5, 3), (40, 25, 64, 1), (7, 6, 1, 5)])
def test_it_is_the_definition(m: int, n: int, d: int, k: int, rng: torch.Generator, float64: None) -> None:
    samples, truth = torch.randn(m, d, generator=rng), 0.7 * torch.randn(n, d, generator=rng) + 0.5
    assert density_coverage(samples, truth, k) == pytest.approx(by_definition(samples, truth, k))


def test_points_on_a_line() -> None:
    """k = 1: balls of radius 1 around 0..9. 0.5 and 1.5 are in two each, 20.5 and 21.5 in none; three balls are hit."""
    truth, samples = torch.arange(10.0)[:, None], torch.tensor([[0.5], [1.5], [20.5], [21.5]])
    assert density_coverage(samples, truth, k=1) == (1.0, pytest.approx(0.3))


def test_an_outlier_makes_samples_precise_but_not_dense() -> None:
    """The outlier's ball reaches to the cluster: samples on the way are in it and in no other."""
    truth = torch.cat([torch.arange(10.0) / 10, torch.tensor([100.0])])[:, None]
    samples = torch.linspace(30, 90, 6)[:, None]
    assert precision_recall(samples, truth, k=5).precision == 1
    assert density_coverage(samples, truth, k=5) == (pytest.approx(1 / 5), pytest.approx(1 / 11))


def test_means_for_samples_of_the_truth() -> None:
    """Density 1, coverage 1 − Π (n − i)/(n + m − i), of 400 draws; 4.5 standard errors: failure rate 1.4e-5, seed 1."""
    rng, n, m, k = torch.Generator().manual_seed(1), 24, 16, 3
    draws = torch.randn(400, n + m, 2, generator=rng, dtype=torch.float64)
    values = torch.tensor([density_coverage(x[n:], x[:n], k) for x in draws], dtype=torch.float64)
    expected = torch.tensor([1, 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))])
    error = values.std(0) / 400**0.5
    assert ((values.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.02).all()


def test_blocks_make_no_difference(rng: torch.Generator) -> None:
    samples, truth = torch.randn(ROWS + 7, 1, generator=rng) + 2, torch.randn(ROWS + 3, 1, generator=rng)
    radius = (truth - truth.T).abs().sort(1).values[:, 5]
    within = (samples - truth.T).abs() <= radius
    expected = (float(within.double().sum()) / (5 * len(samples)), float(within.any(0).double().mean()))
    assert density_coverage(samples, truth) == pytest.approx(expected)


def test_order_rotation_shift_and_scale_change_nothing(rng: torch.Generator, float64: None) -> None:
    x, y = torch.randn(40, 6, generator=rng), 0.8 * torch.randn(50, 6, generator=rng)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=rng))
    moved = [7 * v[torch.randperm(len(v), generator=rng)] @ rotation + 3 for v in (x, y)]
    assert density_coverage(*moved) == density_coverage(x, y)


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(10, 2)
    with pytest.raises(UsageError, match="less than both sets' sizes, 10 and 5, but is 5"):
        density_coverage(x, x[:5], 5)
    with pytest.raises(UsageError, match="same data shape"):
        density_coverage(x, torch.zeros(10, 3))
