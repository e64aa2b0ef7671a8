"""Quality against the number of dimensions at equal budget: a figure of the bench `dimension`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure

from vardistill.bench.page import line, shown
from vardistill.bench.results import Results
from vardistill.reports.figures import INK, MUTED, Scale, bare, doublings, legend_beside, ticks

PANELS: dict[str, Scale] = {"mode_tv": "log", "off_mode": "share", "energy_distance": "log"}
"""Metrics of the mixtures, and their axes."""


def figures(results: Results) -> dict[str, Figure]:
    """The mixtures' metrics against d."""
    found: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(dict)
    for row, of_seeds in results.rows.items():
        if mixture := re.fullmatch(r"mixture(\d+)", row.problem):
            found[row.objective][int(mixture[1])] = [result.values for result in of_seeds]
    return {"Quality against the number of dimensions": curves_over(found, PANELS, "dimensions")} if found else {}


def curves_over(
    found: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]], panels: Mapping[str, Scale], axis: str
) -> Figure:
    """Metrics against a number, a panel for each: an objective's mean, and its seeds as dots.

    No value of 0 and less has a place on a logarithmic axis.

    Args:
        found: the values of every seed, by objective and number.
        panels: metrics and their axes.
        axis: what the number is.
    """
    figure = Figure(figsize=(10.8, 3.4), layout="constrained")
    numbers = sorted({number for by_number in found.values() for number in by_number})
    for ax, (metric, scale) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, (objective, by_number) in enumerate(found.items()):
            points = sorted((n, [v[metric] for v in values if metric in v]) for n, values in by_number.items())
            points = [(n, values) for n, values in points if values]
            means = [mean(values) for _, values in points]
            ax.plot([n for n, _ in points], means, **line(i), label=objective, linewidth=1.4, alpha=0.85)
            for n, values in points:
                ax.plot([n] * len(values), values, "o", color=line(i)["color"], ms=2.5, alpha=0.6)
        bare(ax)
        doublings(ax, numbers)
        if scale in ("log", "share"):
            ax.set_yscale("log", nonpositive="mask")
        ax.set_title(shown(metric).title, loc="left", fontsize=9.5, color=INK)
        ax.set_xlabel(axis, fontsize=9, color=MUTED)
        ticks(ax, scale)
    legend_beside(figure)
    return figure
