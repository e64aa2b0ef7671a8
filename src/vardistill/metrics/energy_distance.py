r"""Energy distance (Székely & Rizzo 2013, J. Stat. Plan. Inference 143, 1249–1272).

    E_β(p, q) = 2 E‖x − y‖^β − E‖x − x′‖^β − E‖y − y′‖^β,   β ∈ (0, 2)

is never negative, and zero only at p = q. It is estimated by U-statistics: the pairs i = j are left out of
the last two means, so the estimate is unbiased, 0 in the mean at p = q, and may be a little below zero.

The permutation test is that of `mmd`, with this distance in the place of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vardistill.metrics.mmd import relabelled
from vardistill.metrics.pairwise import pool, quadratic_forms
from vardistill.objectives.energy import check_beta


@dataclass(frozen=True)
class EnergyTest:
    """The energy distance of two samples.

    Attributes:
        distance: the unbiased estimate.
        std: its standard deviation at p = q, over relabellings.
        p_value: of the permutation test, in (0, 1].
    """

    distance: float
    std: float
    p_value: float


def energy_distance(x: Tensor, y: Tensor, beta: float = 1.0) -> float:
    """The unbiased estimate of E_β, in units of the data to the power β.

    Args:
        x: (n, *data) samples.
        y: (m, *data) samples.
        beta: β, in (0, 2).

    Raises:
        UsageError: for β outside (0, 2), or samples that are fewer than 2, not finite or of different shape.
    """
    return _statistics(x, y, beta, 0, None)[0]


def energy_test(x: Tensor, y: Tensor, permutations: int, rng: torch.Generator, beta: float = 1.0) -> EnergyTest:
    """The distance with its permutation test.

    Args:
        x: (n, *data) samples.
        y: (m, *data) samples.
        permutations: relabellings, at least 2; the p-value's resolution is 1/(permutations + 1).
        rng: draws them.
        beta: β, in (0, 2).

    Raises:
        UsageError: as `energy_distance`.
    """
    distance, observed, others = _statistics(x, y, beta, permutations, rng)
    exceeding = int((others >= observed).sum()) if math.isfinite(observed) else permutations
    return EnergyTest(distance, float(others.std()), (1 + exceeding) / (1 + permutations))


def _statistics(
    x: Tensor, y: Tensor, beta: float, permutations: int, rng: torch.Generator | None
) -> tuple[float, float, Tensor]:
    """The unbiased estimate; and the biased one, of the samples and of their relabellings."""
    check_beta(beta)
    w, v = pool(x, y)
    forms = quadratic_forms(w, relabelled(v, permutations, rng), lambda distance2: distance2.pow_(beta / 2))
    xx, yy, form = forms[:3].tolist()
    unbiased = (xx + yy - form) - xx * len(x) / (len(x) - 1) - yy * len(y) / (len(y) - 1)
    return unbiased, -form, -forms[3:]
