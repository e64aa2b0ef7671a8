"""Mode statistics of constructed samples."""

from __future__ import annotations

import math

import pytest
import torch

from vardistill.errors import UsageError
from vardistill.metrics import mode_radius, mode_statistics
from vardistill.metrics.modes import ROWS

MEANS = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])


def test_all_modes_at_their_share() -> None:
    statistics = mode_statistics(MEANS.repeat(10, 1), MEANS, 1.0)
    assert statistics == (4, 0.0, 0.0)


def test_lost_and_thin_modes() -> None:
    """Shares .6, .3, .0625 = ¼ · ¼, and .0375 < ¼ · ¼: three are found."""
    counts = torch.tensor([96, 48, 10, 6])
    statistics = mode_statistics(MEANS.repeat_interleave(counts, 0), MEANS, 1.0)
    assert statistics.modes_found == 3
    assert statistics.mode_tv == pytest.approx(0.6 + 0.3 - 0.5)
    assert statistics.off_mode == 0


def test_samples_off_the_modes_have_a_mode_but_do_not_make_it_found() -> None:
    near, off = torch.tensor([3.99, 0.0]), torch.tensor([0.0, 4.01])
    samples = torch.cat([MEANS[:2].repeat(3, 1) + near, MEANS[2:].repeat(3, 1) + off])
    statistics = mode_statistics(samples, MEANS, 1.0)
    assert statistics == (2, 0.0, 0.5)


def test_weights_and_unequal_scales() -> None:
    """A point at 40 is 40 std from a narrow mode at 0 and 3 from a wide one at 100."""
    means, std, weights = (
        torch.tensor([[0.0], [100.0]]),
        torch.tensor([1.0, 20.0]),
        torch.tensor([0.25, 0.75]),
    )
    samples = torch.tensor([[0.5], [40.0], [100.0], [120.0]])
    assert mode_statistics(samples, means, std, weights) == (2, 0.0, 0.0)


def test_the_radius_is_four_in_the_plane() -> None:
    assert mode_radius(2) == 4.0


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 32, 64, 128, 1000])
def test_the_same_share_is_outside_in_every_dimension(d: int) -> None:
    """P(χ_d > r): erfc(r/√2) for d = 1; sums of Poisson terms e^−a aʲ/j!, a = r²/2, j < d/2, for even d."""
    a = mode_radius(d) ** 2 / 2
    closed = {1: math.erfc(math.sqrt(a)), 3: math.erfc(math.sqrt(a)) + 2 * math.sqrt(a / math.pi) * math.exp(-a)}
    poisson = sum(math.exp(j * math.log(a) - a - math.lgamma(j + 1)) for j in range(d // 2))
    assert closed.get(d, poisson) == pytest.approx(math.exp(-8), rel=1e-9)


@pytest.mark.parametrize("d", [8, 128])
def test_true_samples_in_many_dimensions(d: int, rng: torch.Generator) -> None:
    """Off by e^−8 of them, of 50,000: Poisson's 16.8 ± 4.1, within 5 of these: below 1e-5. Seed 0."""
    n, means = 50_000, 100 * torch.eye(4, d)
    samples = means[torch.randint(4, (n,), generator=rng)] + torch.randn(n, d, generator=rng)
    statistics = mode_statistics(samples, means, 1.0)
    assert statistics.modes_found == 4
    assert abs(n * statistics.off_mode - n * math.exp(-8)) < 5 * 4.1


def test_true_samples(rng: torch.Generator) -> None:
    """In the plane e^−8 of the mass is farther than 4 std. Seed 0; 4.5 standard errors: 7e-6."""
    n, off = 50_000, math.exp(-8)
    samples = MEANS[torch.randint(4, (n,), generator=rng)] + torch.randn(n, 2, generator=rng)
    statistics = mode_statistics(samples, MEANS, 1.0)
    assert statistics.modes_found == 4
    assert statistics.mode_tv < 4.5 * 2 * math.sqrt(0.25 * 0.75 / n)
    assert abs(statistics.off_mode - off) < 4.5 * math.sqrt(off / n) + 1 / n


def test_blocks_make_no_difference(rng: torch.Generator) -> None:
    samples = torch.randn(2 * ROWS + 5, 2, generator=rng) * 60
    direct = torch.cdist(samples, MEANS).min(1).values > 4
    assert mode_statistics(samples, MEANS, 1.0).off_mode == float(direct.double().mean())


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the modes have dimension 2, but the samples have shape \(3,\)"):
        mode_statistics(torch.zeros(5, 3), MEANS, 1.0)
    with pytest.raises(UsageError, match="std must be positive"):
        mode_statistics(torch.zeros(5, 2), MEANS, 0.0)
    with pytest.raises(UsageError, match="samples must be finite"):
        mode_statistics(torch.full((5, 2), math.nan), MEANS, 1.0)
