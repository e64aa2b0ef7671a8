"""Mean log-density and its signed gap."""

from __future__ import annotations

import math

import pytest
import torch

from vardistill.denoisers import GaussianMixture
from vardistill.errors import UsageError
from vardistill.metrics import log_density
from vardistill.metrics.density import ROWS

ENTROPY = 1 + math.log(2 * math.pi)
"""Of N(0, I_2), in nats."""


def standard_normal() -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), std=1.0)


def test_is_the_mean_over_all_rows(rng: torch.Generator) -> None:
    samples = torch.randn(2 * ROWS + 17, 2, generator=rng, dtype=torch.float64)
    exact = -math.log(2 * math.pi) - 0.5 * samples.square().sum(1).mean()
    assert log_density(samples, standard_normal()) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("scale", "sign"), [(1.5, -1), (0.5, 1)])
def test_gap_is_signed(scale: float, sign: int, rng: torch.Generator) -> None:
    """For x ~ N(0, c² I_2) the gap is 1 − c². Its standard error is c²/√n; seed 0, 4.5 of them: 7e-6."""
    n = 20_000
    samples = scale * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    gap = log_density(samples, standard_normal()) + ENTROPY
    assert abs(gap - (1 - scale**2)) < 4.5 * scale**2 / math.sqrt(n)
    assert gap * sign > 0


def test_bad_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="samples must be finite"):
        log_density(torch.full((3, 2), math.inf), standard_normal())
