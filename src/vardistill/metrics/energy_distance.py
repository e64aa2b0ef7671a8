r"""Energy distance (Székely & Rizzo 2013, J. Stat. Plan. Inference 143, 1249–1272).

    E_β(p, q) = 2 E‖x − y‖^β − E‖x − x′‖^β − E‖y − y′‖^β,   β ∈ (0, 2)

is never negative, and zero only at p = q. It is estimated by U-statistics: the pairs i = j are left out of
the last two means, so the estimate is unbiased, 0 in the mean at p = q, and may be a little below zero.
"""

from __future__ import annotations

from torch import Tensor

from vardistill.metrics.pairwise import pool, quadratic_forms
from vardistill.objectives.energy import check_beta


def energy_distance(x: Tensor, y: Tensor, beta: float = 1.0) -> float:
    """The unbiased estimate of E_β, in units of the data to the power β.

    Args:
        x: (n, *data) samples.
        y: (m, *data) samples.
        beta: β, in (0, 2).

    Raises:
        UsageError: for β outside (0, 2), or samples that are fewer than 2, not finite or of different shape.
    """
    check_beta(beta)
    w, v = pool(x, y)
    xx, yy, form = quadratic_forms(w, v, lambda distance2: distance2.pow_(beta / 2)).tolist()
    return float((xx + yy - form) - xx * len(x) / (len(x) - 1) - yy * len(y) / (len(y) - 1))
