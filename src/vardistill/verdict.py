r"""Is a student good? Its metrics beside those of true samples, and a grade.

A metric v is compared with what n true samples score in its place, of mean m and standard deviation s. Its
excess is |v − m| for the gap of the log-density, and v − m (or m − v where more is better) for the others. The
metric

    matches  where the excess is at most 3 s: one evaluation cannot tell the student from the target,
    close    where it is at most the metric's first limit,
    rough    where it is at most its second limit, and
    far      elsewhere.

The whole student has the worst of its metrics' grades; it matches only if a two-sample test, where there is
one, agrees at the level 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch

from vardistill.errors import UsageError
from vardistill.metrics import mode_statistics
from vardistill.problems import Problem

DRAWS = 16
"""Sets of true samples from which the standards are measured."""

MATCHING = 3.0
"""Standard deviations of true samples."""

LEVEL = 0.05
"""Of the two-sample test."""


class Grade(IntEnum):
    """From best to worst."""

    MATCHES = 0
    CLOSE = 1
    ROUGH = 2
    FAR = 3


@dataclass(frozen=True)
class Standard:
    """What n true samples score, in the mean and by its standard deviation."""

    mean: float
    std: float


LIMITS = {
    "log_density_gap": (0.08, 0.6),
    "log_mmd": (1.1, 2.0),
    "modes_found": (0.0, 0.1),
    "off_mode": (0.01, 0.05),
    "mode_tv": (0.05, 0.15),
}
"""Largest excess of a close and of a rough student; of the modes found as a share of all."""


def standards(problem: Problem, n: int) -> dict[str, Standard]:
    """What `n` true samples score in the metrics of `LIMITS` and in `log_density`.

    The biased MMD² of true samples is proportional to 1/n: so the problem's reference serves any n.

    Raises:
        UsageError: unless n is at least 2.
    """
    if n < 2:
        raise UsageError(f"standards need at least 2 samples, but n={n}")
    rng = torch.Generator().manual_seed(0)
    mixture, reference = problem.denoiser, problem.reference
    draws = [problem.sample(n, rng) for _ in range(DRAWS)]
    modes = torch.tensor(
        [mode_statistics(x, mixture.means, problem.std, mixture.weights) for x in draws], dtype=torch.float64
    )
    found, tv, off = (Standard(float(v.mean()), float(v.std())) for v in modes.unbind(1))
    density_std = float(problem.log_prob(draws[0]).std()) / math.sqrt(n)
    return {
        "log_density": Standard(reference.log_density, density_std),
        "log_density_gap": Standard(0.0, density_std),
        "log_mmd": Standard(reference.log_mmd + math.log(reference.samples / n), reference.log_mmd_std),
        "modes_found": found,
        "off_mode": off,
        "mode_tv": tv,
    }


def grade(metric: str, value: float, standard: Standard) -> Grade:
    """The grade of one metric of `LIMITS`; a value that is not a number is far."""
    excess = value - standard.mean
    if metric == "log_density_gap":
        excess = abs(excess)
    allowance = MATCHING * standard.std
    close, rough = LIMITS[metric]
    if metric == "modes_found":
        excess, close, rough = -excess, close * standard.mean, rough * standard.mean
    limits = (allowance, max(close, allowance), max(rough, allowance))
    return next((Grade(i) for i, limit in enumerate(limits) if excess <= limit), Grade.FAR)


def grades(values: Mapping[str, float], standard: Mapping[str, Standard]) -> dict[str, Grade]:
    """The grade of every metric of `LIMITS` that both have."""
    both = [name for name in LIMITS if name in values and name in standard]
    return {name: grade(name, values[name], standard[name]) for name in both}


def overall(values: Mapping[str, float], graded: Mapping[str, Grade]) -> Grade | None:
    """The worst grade, None without any; matching needs the two-sample test's consent."""
    if not graded:
        return None
    worst = max(graded.values())
    rejected = values.get("mmd_p_value", 1.0) < LEVEL
    return Grade.CLOSE if worst is Grade.MATCHES and rejected else worst
