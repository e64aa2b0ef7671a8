r"""Is a student good? Its metrics beside those of true samples, and a grade.

A metric v is compared with what n true samples score in its place, of mean m and standard deviation s. Its
excess is |v − m| for the gap of the log-density, and v − m (or m − v where more is better) for the others. The
metric

    matches  where the excess is at most 3 s: one evaluation cannot tell the student from the target,
    close    where it is at most the metric's first limit,
    rough    where it is at most its second limit, and
    far      elsewhere.

The limits are multiplied by the metric's scale: the number of modes for the modes found, d/2 for the gap of the
log-density, which adds up over the dimensions, the data's distance E‖x − x′‖ for energy distances, the teacher's for
Fréchet distances, and 1 elsewhere.

The whole student has the worst of its metrics' grades; it matches only if a two-sample test, where there is
one, agrees at the level 0.05. Pictures are compared with what their teacher scores in as many steps as suit it best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch

from vardistill.domains.points.problems import Problem
from vardistill.errors import UsageError
from vardistill.metrics.modes import FOUND_SHARE

MATCHING = 3.0
"""Standard deviations of true samples."""

LEVEL = 0.05
"""Of the two-sample test."""

P_VALUES = ("mmd_p_value", "energy_p_value")
"""Of two-sample tests."""


class Grade(IntEnum):
    """From best to worst."""

    MATCHES = 0
    CLOSE = 1
    ROUGH = 2
    FAR = 3


@dataclass(frozen=True)
class Standard:
    """What n true samples score.

    Attributes:
        mean: in the mean.
        std: standard deviation of one evaluation.
        scale: what the metric's limits are multiplied by.
    """

    mean: float
    std: float
    scale: float = 1.0


LIMITS = {
    "log_density_gap": (0.08, 0.6),
    "log_mmd": (1.1, 2.0),
    "modes_found": (0.0, 0.1),
    "off_mode": (0.01, 0.05),
    "mode_tv": (0.05, 0.15),
    "energy_distance_held_out": (0.0005, 0.005),
    "energy_distance_teacher": (0.0005, 0.005),
    "energy_distance_data": (0.0005, 0.005),
    "fd": (0.5, 2.0),
    "precision": (0.1, 0.3),
    "recall": (0.1, 0.3),
}
"""Largest excess of a close and of a rough student, in units of the metric's scale."""

MORE_IS_BETTER = ("modes_found", "precision", "recall")


def standards(problem: Problem, n: int) -> dict[str, Standard]:
    """What `n` true samples score in the metrics of `LIMITS` that the problem has, and in `log_density`.

    The biased MMD² of true samples is proportional to 1/n: so the problem's reference serves any n. Precision and
    recall are means over sets of the held-out data's size: it serves any n that is not below that. The mode TV is
    proportional to 1/√n, and tends to 1 where there are fewer samples than modes.

    Raises:
        UsageError: unless n is at least 2.
    """
    if n < 2:
        raise UsageError(f"standards need at least 2 samples, but n={n}")
    r = problem.reference
    return {
        **density_standards(problem, n),
        "log_mmd": Standard(r.log_mmd + math.log(r.samples / n), r.log_mmd_std),
        **mode_standards(problem, n),
        **held_out_standards(problem, n),
    }


def perfect_student(problem: Problem, n: int) -> dict[str, str]:
    """What `n` true samples score, with the standard deviation of one evaluation."""
    r = problem.reference
    scores = {"energy_distance": Standard(0.0, r.energy_distance_std * r.samples / n), **standards(problem, n)}
    texts = {name: f"{v.mean:.4g}" + (f" ± {v.std:.1g}" if v.std else "") for name, v in scores.items()}
    return texts | {"mmd2_unbiased": "0", "dikl": "0", "mmd_p_value": "uniform in (0, 1)"}


def density_standards(problem: Problem, n: int) -> dict[str, Standard]:
    """Of the log-density."""
    r = problem.reference
    if r.log_density is None:
        return {}
    std = r.log_density_std * math.sqrt(r.samples / n)
    gap = Standard(0.0, std, scale=math.prod(problem.data_shape) / 2)
    return {"log_density": Standard(r.log_density, std), "log_density_gap": gap}


def mode_standards(problem: Problem, n: int) -> dict[str, Standard]:
    """Of the modes; those found are as of independent Poisson counts, which are nearly the samples' own."""
    m, r = problem.modes, problem.reference
    if m is None or r.modes is None:
        return {}
    expected, ratio = n * m.weights.double(), math.sqrt(r.samples / n)
    found = torch.special.gammainc((FOUND_SHARE * expected).ceil(), (1 - r.modes.off_mode) * expected)
    return {
        "modes_found": Standard(float(found.sum()), float((found * (1 - found)).sum().sqrt()), scale=float(len(m))),
        "off_mode": Standard(r.modes.off_mode, r.modes.off_mode_std * ratio),
        "mode_tv": Standard(min(r.modes.mode_tv * ratio, 1.0), r.modes.mode_tv_std * ratio),
    }


def held_out_standards(problem: Problem, n: int) -> dict[str, Standard]:
    """Of what is measured against held-out data."""
    x, r = problem.held_out, problem.reference
    if x is None or r.held_out is None:
        return {}
    h, ratio = r.held_out, math.sqrt(r.samples / n)
    distance = float(torch.nn.functional.pdist(x).mean())
    return {
        "energy_distance_held_out": Standard(h.energy_distance, h.energy_distance_std * ratio, scale=distance),
        "precision": Standard(h.precision, h.precision_std * ratio),
        "recall": Standard(h.recall, h.recall_std * ratio),
    }


def grade(metric: str, value: float, standard: Standard) -> Grade:
    """The grade of one metric of `LIMITS`; a value that is not a number is far."""
    excess = value - standard.mean
    if metric == "log_density_gap":
        excess = abs(excess)
    if metric in MORE_IS_BETTER:
        excess = -excess
    allowance = MATCHING * standard.std
    limits = (allowance, *(max(standard.scale * limit, allowance) for limit in LIMITS[metric]))
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
    return Grade.CLOSE if worst is Grade.MATCHES and told_apart(values) else worst


def told_apart(values: Mapping[str, float]) -> bool | None:
    """Whether a two-sample test tells the student from what it is compared with; None without a test."""
    p = next((values[name] for name in P_VALUES if name in values), None)
    return None if p is None else p < LEVEL


def of_teachers(columns: Mapping[str, Mapping[str, float]]) -> dict[str, Standard]:
    """What a teacher of pictures scores, of its columns in the one of the least Fréchet distance; {} without any."""
    own = [column for title, column in columns.items() if title.startswith("teacher") and "fd" in column]
    if not own:
        return {}
    best = min(own, key=lambda column: column["fd"])
    scales = {"fd": best["fd"], "precision": 1.0, "recall": 1.0}
    return {name: Standard(best[name], 0.0, scale) for name, scale in scales.items() if name in best}
