r"""Which row is the best, and whether the seeds say so.

Two rows are compared by Welch's t-test, which does not assume equal variances:

    t = (m₁ − m₂) / √(v₁ + v₂),   ν = (v₁ + v₂)² / (v₁²/(n₁ − 1) + v₂²/(n₂ − 1)),   v_i = s_i²/n_i,

with the two-sided p-value P(|T_ν| ≥ |t|) = I_{ν/(ν + t²)}(ν/2, ½), I the regularised incomplete beta function. The
best row is marked only if it is better than *each* other row, by Holm's step-down procedure (1979) over these
comparisons: of m sorted p-values, the i-th (from 0) must be at most `LEVEL` / (m − i).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from vardistill.bench.cells import Direction

LEVEL = 0.05
"""Of the comparisons of a metric, together."""

RULE = (
    f"Mean ± standard deviation over seeds. Bold: better than every other row of the same teacher and problem by "
    f"Welch's two-sided t-test at {LEVEL:g}, with Holm's correction over these comparisons; nothing is bold where the "
    "seeds do not tell the best row from another, or where one of these runs failed or has no finite value."
)

DIRECTIONS: dict[str, Direction] = {
    "log_density_gap": "zero",
    "log_mmd": "lower",
    "energy_distance": "lower",
    "energy_distance_held_out": "lower",
    "modes_found": "higher",
    "mode_tv": "lower",
    "off_mode": "lower",
    "precision": "higher",
    "recall": "higher",
    "fd": "lower",
    "kd": "lower",
    "coverage": "higher",
    "label_accuracy": "higher",
    "prompt_accuracy": "higher",
    "gap": "lower",
    "diu": "lower",
    "dikl": "lower",
}
"""Which values of a metric are good."""

TINY = 1e-300
TERMS = 10_000

K = TypeVar("K", bound=Hashable)


def loss(value: float, direction: Direction) -> float:
    """The value as something of which less is better."""
    return {"lower": value, "higher": -value, "zero": abs(value)}[direction]


def significantly_best(groups: Mapping[K, Sequence[float]]) -> K | None:
    """The group of the least mean, if the others' are significantly larger; None if not, or with a single group.

    A group of a single value, and two without any spread, of which Welch's test says nothing, are not told apart.
    """
    if len(groups) < 2:
        return None
    best = min(groups, key=lambda name: statistics.fmean(groups[name]))
    p_values = [welch(groups[best], values) for name, values in groups.items() if name != best]
    return best if all(holm(p_values)) else None


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, in their order."""
    rejected = [False] * len(p_values)
    for done, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > level / (len(p_values) - done):
            break
        rejected[i] = True
    return rejected


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided p-value of Welch's t-test; 1 where it is not defined."""
    if min(len(a), len(b)) < 2:
        return 1.0
    v, w = (statistics.variance(x) / len(x) for x in (a, b))
    if v + w == 0:
        return 1.0
    t = (statistics.fmean(a) - statistics.fmean(b)) / math.sqrt(v + w)
    share = v / (v + w)
    return two_sided_t(t, 1 / (share**2 / (len(a) - 1) + (1 - share) ** 2 / (len(b) - 1)))


def two_sided_t(t: float, nu: float) -> float:
    """P(|T| ≥ |t|) of Student's t distribution with ν > 0 degrees of freedom."""
    return incomplete_beta(nu / 2, 0.5, nu / (nu + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, for a, b > 0 and x in [0, 1]."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1 + d₁/(1 + d₂/(1 + …)) of I_x(a, b), by Lentz's method (DLMF 8.17.22)."""
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, TERMS):
        m, odd = divmod(n, 2)
        top = -(a + m) * (a + b + m) if odd else m * (b - m)
        term = top * x / ((a + n - 1) * (a + n))
        d = 1 / (1 + term * d or TINY)
        c = 1 + term / c or TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
