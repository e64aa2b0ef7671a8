r"""Maximum mean discrepancy (Gretton et al. 2012, JMLR 13, 723–773).

    MMD²(p, q) = E k(x, x′) + E k(y, y′) − 2 E k(x, y),   k(x, y) = mean over h of exp(−‖x − y‖²/(2h²))

The *biased* estimate (V-statistic, eq. 5 there) averages over all pairs, i = j included: it is never
negative, and (1/n + 1/m)(1 − E k) in the mean at p = q. The *unbiased* one (U-statistic, eq. 3) leaves the
pairs i = j out: its mean is MMD² itself.

The permutation test's p-value is the share of relabellings of the pooled sample, the observed one among
them, whose biased estimate is at least as large as the observed: at p = q it is at most u with probability
at most u, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.pairwise import Kernel, pool, quadratic_forms

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""h of the VarDiU reference."""

LARGEST_EXPONENT = 80.0
"""e^−80 stands for all smaller values: it is below rounding, and denormal numbers are slow."""

SMALLEST_ROOT = 1e-9
"""Its fourth power is still a normal number in float32."""

TIE = 1e-6
"""Statistics that differ by less than this share of the mean kernel count as equal: rounding orders them."""


@dataclass(frozen=True)
class MMD:
    """The MMD of two samples.

    Attributes:
        biased: V-statistic of MMD², ≥ 0 up to rounding.
        unbiased: U-statistic of MMD², of either sign.
        p_value: of the permutation test, in (0, 1]; NaN without permutations, or for a biased estimate of NaN.
    """

    biased: float
    unbiased: float
    p_value: float


def mmd_statistics(
    x: Tensor,
    y: Tensor,
    bandwidths: Sequence[float] = BANDWIDTHS,
    permutations: int = 0,
    rng: torch.Generator | None = None,
) -> MMD:
    """All statistics of one pass over the pairs.

    Args:
        x: (n, *data) samples.
        y: (m, *data) samples.
        bandwidths: h, in units of the data, averaged over. Octaves (each twice the one before) are fastest.
        permutations: relabellings for the p-value, whose resolution is 1/(permutations + 1); 0 for none.
        rng: draws the relabellings.

    Raises:
        UsageError: for samples that are fewer than 2, not finite or of different shape; for bandwidths that
            are not positive; for permutations without an rng.
    """
    if permutations < 0 or (permutations and rng is None):
        raise UsageError(f"permutations must be 0, or positive with an rng, but is {permutations}")
    w, v = pool(x, y)
    n, m = len(x), len(y)
    forms = quadratic_forms(w, relabelled(v, permutations, rng), gaussian_kernel(bandwidths))
    xx, yy, biased = forms[:3].tolist()
    exceeding = int((forms[3:] >= biased - TIE * (xx + yy)).sum()) if math.isfinite(biased) else math.nan
    return MMD(
        biased=biased,
        unbiased=(n * xx - 1) / (n - 1) + (m * yy - 1) / (m - 1) - (xx + yy - biased),
        p_value=(1 + exceeding) / (1 + permutations) if permutations else math.nan,
    )


def relabelled(v: Tensor, permutations: int, rng: torch.Generator | None) -> Tensor:
    """The coefficients of `pool`, (3, N), and those of a − b under so many relabellings."""
    if rng is None or not permutations:
        return v
    orders = [torch.randperm(v.shape[1], generator=rng, device=rng.device) for _ in range(permutations)]
    return torch.cat([v, v[2, torch.stack(orders).to(v.device)]])


def mmd2(x: Tensor, y: Tensor, bandwidths: Sequence[float] = BANDWIDTHS, biased: bool = True) -> float:
    """MMD² of x (n, *data) and y (m, *data), biased or unbiased; see `mmd_statistics`."""
    statistics = mmd_statistics(x, y, bandwidths)
    return statistics.biased if biased else statistics.unbiased


def log_mmd(x: Tensor, y: Tensor, bandwidths: Sequence[float] = BANDWIDTHS) -> float:
    """The logarithm of the biased MMD², as the VarDiU reference reports it; −∞ where that is 0."""
    return log_or_minus_infinity(mmd2(x, y, bandwidths))


def mmd_test(
    x: Tensor,
    y: Tensor,
    permutations: int,
    rng: torch.Generator,
    bandwidths: Sequence[float] = BANDWIDTHS,
) -> float:
    """p-value of the permutation test of p = q; see `mmd_statistics`."""
    return mmd_statistics(x, y, bandwidths, permutations, rng).p_value


def log_or_minus_infinity(v: float) -> float:
    """The logarithm of v; −∞ for v ≤ 0, NaN for NaN."""
    return -math.inf if v <= 0 else math.log(v)


def gaussian_kernel(bandwidths: Sequence[float]) -> Kernel:
    """The mean over h of exp(−d²/(2h²)), of squared distances d².

    In octaves every kernel is the fourth power of the one of twice its bandwidth: one exponential serves all.

    Raises:
        UsageError: for no bandwidths, or one that is not positive and finite.
    """
    if not bandwidths or not all(0 < h < math.inf for h in bandwidths):
        raise UsageError(f"bandwidths must be positive and finite, at least one, but are {tuple(bandwidths)}")
    widest_first = sorted(bandwidths, reverse=True)

    def exponential(distance2: Tensor, h: float) -> Tensor:
        return distance2.mul(-0.5 / h**2).clamp_(min=-LARGEST_EXPONENT).exp_()

    def octaves(distance2: Tensor) -> Tensor:
        k = exponential(distance2, widest_first[0])
        total = k.clone()
        for _ in widest_first[1:]:
            total += k.clamp_(min=SMALLEST_ROOT).square_().square_()
        return total.div_(len(widest_first))

    def general(distance2: Tensor) -> Tensor:
        total = exponential(distance2, widest_first[0])
        for h in widest_first[1:]:
            total += exponential(distance2, h)
        return total.div_(len(widest_first))

    in_octaves = all(2 * narrow == wide for wide, narrow in pairwise(widest_first))
    return octaves if in_octaves else general
