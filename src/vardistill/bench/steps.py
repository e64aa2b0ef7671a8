"""Quality against a student's number of steps at equal budget: a figure of the bench `steps`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from vardistill.bench.dimension import curves_over
from vardistill.bench.results import Results
from vardistill.bench.significance import LEVEL, welch
from vardistill.reports.figures import Scale

PANELS: dict[str, Scale] = {"fd": "log", "recall": "linear", "label_accuracy": "linear"}
"""Metrics of pictures, and their axes."""

FOUR, ONE = 4, 1
"""Steps that are compared."""


def figures(results: Results) -> dict[str, Figure]:
    """The metrics against the steps, and in the title whether four steps beat one by their Fréchet distance."""
    found: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(dict)
    for row, of_seeds in results.rows.items():
        if named := re.fullmatch(r"(.*), (\d+) steps?", row.objective):
            found[named[1]][int(named[2])] = [result.values for result in of_seeds]
    if not found:
        return {}
    told = "; ".join(f"{name}, {verdict(by_steps)}" for name, by_steps in found.items())
    return {f"Quality against the number of steps: {told}": curves_over(found, PANELS, "steps per sample")}


def verdict(by_steps: Mapping[int, Sequence[Mapping[str, float]]]) -> str:
    """Whether the Fréchet distance of four steps is below that of one, by Welch's two-sided test over the seeds."""
    four, one = ([values["fd"] for values in by_steps.get(n, ()) if "fd" in values] for n in (FOUR, ONE))
    if not four or not one:
        return "no answer yet"
    p = welch(four, one)
    if p > LEVEL:
        return f"four steps and one are not told apart (p = {p:.2g})"
    return f"four steps {'beat' if fmean(four) < fmean(one) else 'lose to'} one (p = {p:.2g})"
