"""MMD against the closed form for Gaussians, and the permutation test's level and power."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics import log_mmd, mmd2, mmd_statistics, mmd_test
from vardistill.metrics.mmd import BANDWIDTHS, gaussian_kernel, log_or_minus_infinity

MOMENTS = {"x": (0.0, 1.0), "y": (0.7, 1.6)}
SIGMAS = 4.5
"""Of a normal estimate: a failure rate of 7e-6 a comparison."""


def normal(n: int, d: int, which: str, rng: torch.Generator) -> Tensor:
    mean, std = MOMENTS[which]
    return mean + std * torch.randn(n, d, generator=rng, dtype=torch.float64)


def mean_kernel(a: str, b: str, d: int, bandwidths: Sequence[float]) -> float:
    """E k(x, y) = mean over h of (h²/(h² + s²))^{d/2} exp(−‖Δ‖²/(2(h² + s²))), s² = s_a² + s_b²."""
    delta2 = d * (MOMENTS[a][0] - MOMENTS[b][0]) ** 2
    s2 = MOMENTS[a][1] ** 2 + MOMENTS[b][1] ** 2
    terms = [(h**2 / (h**2 + s2)) ** (d / 2) * math.exp(-delta2 / (2 * (h**2 + s2))) for h in bandwidths]
    return sum(terms) / len(terms)


def dense_mmd2(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> tuple[float, float]:
    """The two estimates, term by term."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        distance2 = (a[:, None] - b[None]).square().sum(-1)
        return torch.stack([(-distance2 / (2 * h**2)).exp() for h in bandwidths]).mean(0)

    n, m = len(x), len(y)
    xx, yy, xy = k(x, x), k(y, y), k(x, y).mean()
    unbiased = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy
    return float(xx.mean() + yy.mean() - 2 * xy), float(unbiased)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("other", ["x", "y"])
def test_expectations_for_gaussians(d: int, other: str) -> None:
    """Seed 1; fails with probability 2e-5 under any other."""
    rng, n, m, repeats = torch.Generator().manual_seed(1), 40, 25, 1500
    estimates = torch.empty(repeats, 2, dtype=torch.float64)
    for i in range(repeats):
        statistics = mmd_statistics(normal(n, d, "x", rng), normal(m, d, other, rng))
        estimates[i] = torch.tensor([statistics.biased, statistics.unbiased])
    xx, yy, xy = (mean_kernel(a, b, d, BANDWIDTHS) for a, b in (("x", "x"), (other, other), ("x", other)))
    exact = xx + yy - 2 * xy
    expected = torch.tensor([exact + (1 - xx) / n + (1 - yy) / m, exact], dtype=torch.float64)
    error = estimates.std(0) / math.sqrt(repeats)
    assert ((estimates.mean(0) - expected).abs() < SIGMAS * error).all()
    assert (error < 0.03 * expected[0]).all()


@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (1.0,), (0.3, 1.0, 5.0), (4.0, 1.0, 2.0)])
def test_equals_the_dense_double_sum(bandwidths: Sequence[float], rng: torch.Generator) -> None:
    x, y = normal(700, 2, "x", rng), normal(333, 2, "y", rng) + 50
    biased, unbiased = dense_mmd2(x, y, bandwidths)
    assert mmd2(x, y, bandwidths) == pytest.approx(biased, rel=1e-10)
    assert mmd2(x, y, bandwidths, biased=False) == pytest.approx(unbiased, rel=1e-10)
    assert log_mmd(x, y, bandwidths) == pytest.approx(math.log(biased), rel=1e-10)


def test_octaves_equal_an_exponential_for_each_bandwidth(rng: torch.Generator) -> None:
    distance2 = torch.cat([torch.rand(1000, generator=rng) * s for s in (0.1, 10.0, 1e4)])
    kernels = [(distance2.double() * (-0.5 / h**2)).exp() for h in BANDWIDTHS]
    octaves = gaussian_kernel(BANDWIDTHS)(distance2.clone())
    torch.testing.assert_close(octaves.double(), torch.stack(kernels).mean(0), rtol=1e-4, atol=1e-12)


def test_single_precision_resolves_the_floor(rng: torch.Generator) -> None:
    """Samples spread over ±40, and MMD² some 1e-3, of which single precision keeps a ten-thousandth."""
    centres = (torch.rand(40, 2, generator=rng) - 0.5) * 80
    x, y = (centres.repeat(40, 1) + torch.randn(1600, 2, generator=rng) for _ in range(2))
    exact, exact_unbiased = dense_mmd2(x.double(), y.double(), BANDWIDTHS)
    statistics = mmd_statistics(x, y)
    assert statistics.biased == pytest.approx(exact, rel=1e-4)
    assert statistics.unbiased == pytest.approx(exact_unbiased, abs=1e-4 * exact)


@given(st.integers(0, 10**6), st.floats(-100, 100), st.integers(2, 30), st.integers(2, 30))
def test_symmetric_and_invariant_to_translation(seed: int, shift: float, n: int, m: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, y = normal(n, 2, "x", rng), normal(m, 2, "y", rng)
    value = mmd2(x, y)
    assert value >= -1e-12
    assert mmd2(y, x) == pytest.approx(value, rel=1e-8, abs=1e-12)
    assert mmd2(x + shift, y + shift) == pytest.approx(value, rel=1e-8, abs=1e-12)


def test_data_of_any_shape(rng: torch.Generator) -> None:
    x, y = torch.randn(2, 20, 3, 2, 2, generator=rng)
    assert mmd2(x, y) == mmd2(x.flatten(1), y.flatten(1))


def test_equal_samples_have_no_distance(rng: torch.Generator) -> None:
    x = normal(50, 2, "x", rng)
    assert abs(mmd2(x, x)) < 1e-12
    assert log_or_minus_infinity(0.0) == log_or_minus_infinity(-1e-9) == -math.inf
    assert math.isnan(log_or_minus_infinity(math.nan))


def test_p_values_are_uniform_at_equality() -> None:
    """With 19 permutations they are k/20, equally often: χ² with 19 degrees of freedom exceeds 55 by 2e-5."""
    rng, repeats, permutations = torch.Generator().manual_seed(2), 600, 19
    p = torch.tensor(
        [mmd_test(normal(20, 2, "x", rng), normal(12, 2, "x", rng), permutations, rng) for _ in range(repeats)]
    )
    counts = (p * (permutations + 1)).round().long().sub(1).bincount(minlength=permutations + 1)
    expected = repeats / (permutations + 1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 55


def test_p_value_is_smallest_for_different_laws(rng: torch.Generator) -> None:
    assert mmd_test(normal(200, 2, "x", rng), normal(150, 2, "y", rng), 99, rng) == 1 / 100


def test_ties_count_against_a_difference(rng: torch.Generator) -> None:
    point = torch.zeros(5, 2)
    assert mmd_test(point, point, 50, rng) == 1
    x, y = torch.tensor([[0.0], [1 / 3]]), torch.tensor([[0.1], [0.7]])
    few = mmd_test(x, y, 600, rng)
    values = [dense_mmd2(*v, BANDWIDTHS)[0] for v in _splits(torch.cat([x, y]).double())]
    exact = sum(v >= values[0] - 1e-9 for v in values) / len(values)
    assert few == pytest.approx(exact, abs=SIGMAS * math.sqrt(exact * (1 - exact) / 600) + 1e-9)


def _splits(w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All splits of four points into two pairs, the given one first."""
    pairs = [(0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 1, 3), (1, 3, 0, 2), (0, 3, 1, 2), (1, 2, 0, 3)]
    return [(w[list(p[:2])], w[list(p[2:])]) for p in pairs]


def test_test_does_not_touch_the_statistics(rng: torch.Generator) -> None:
    x, y = normal(60, 2, "x", rng), normal(70, 2, "y", rng)
    plain, tested = mmd_statistics(x, y), mmd_statistics(x, y, permutations=9, rng=rng)
    assert (plain.biased, plain.unbiased) == pytest.approx((tested.biased, tested.unbiased), rel=1e-12)
    assert math.isnan(plain.p_value)
    assert 0 < tested.p_value <= 1


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (-1.0,), (math.nan,), (math.inf,)])
def test_bad_bandwidths_are_refused(bandwidths: Sequence[float]) -> None:
    with pytest.raises(UsageError, match="bandwidths must be positive and finite"):
        mmd2(torch.zeros(3, 2), torch.zeros(3, 2), bandwidths)


def test_bad_permutations_are_refused(rng: torch.Generator) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(UsageError, match="positive with an rng, but is -1"):
        mmd_statistics(x, x, permutations=-1, rng=rng)
    with pytest.raises(UsageError, match="positive with an rng, but is 5"):
        mmd_statistics(x, x, permutations=5)


@pytest.mark.slow
def test_memory_is_bounded_at_forty_thousand_samples(rng: torch.Generator) -> None:
    """A dense kernel matrix would take 6 GB."""
    x, y = torch.randn(40_000, 2, generator=rng), torch.randn(1000, 2, generator=rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert mmd_statistics(x, y).biased > 0
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200 * 1024


def test_not_a_number_has_no_p_value(rng: torch.Generator) -> None:
    """Squares that overflow: it would otherwise be the smallest there is."""
    x, y = 1e25 * torch.randn(20, 2, generator=rng), torch.randn(20, 2, generator=rng)
    statistics = mmd_statistics(x, y, permutations=20, rng=rng)
    assert [math.isnan(v) for v in (statistics.biased, statistics.unbiased, statistics.p_value)] == [True] * 3
