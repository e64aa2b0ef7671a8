"""Quality against the number of dimensions at equal budget: a figure of the bench `dimension`."""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import mean

from matplotlib.figure import Figure

from vardistill.bench.page import line, shown
from vardistill.bench.results import Results
from vardistill.reports.figures import INK, MUTED, Scale, bare, doublings, legend_beside, ticks

PANELS: dict[str, Scale] = {"mode_tv": "log", "off_mode": "share", "energy_distance": "log"}
"""Metrics of the mixtures, and their axes."""


def figures(results: Results) -> dict[str, Figure]:
    """The mixtures' metrics against d: each objective's mean, and its seeds as dots; no value below 0 has a place."""
    found: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(dict)
    for row, of_seeds in results.rows.items():
        if mixture := re.fullmatch(r"mixture(\d+)", row.problem):
            found[row.objective][int(mixture[1])] = [result.values for result in of_seeds]
    if not found:
        return {}
    figure = Figure(figsize=(10.8, 3.4), layout="constrained")
    for ax, (metric, scale) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for i, (objective, by_dimension) in enumerate(found.items()):
            points = sorted((d, [v[metric] for v in values if metric in v]) for d, values in by_dimension.items())
            points = [(d, values) for d, values in points if values]
            means = [mean(values) for _, values in points]
            ax.plot([d for d, _ in points], means, **line(i), label=objective, linewidth=1.4, alpha=0.85)
            for d, values in points:
                ax.plot([d] * len(values), values, "o", color=line(i)["color"], ms=2.5, alpha=0.6)
        bare(ax)
        doublings(ax, sorted({d for by_dimension in found.values() for d in by_dimension}))
        ax.set_yscale("log", nonpositive="mask")
        ax.set_title(shown(metric).title, loc="left", fontsize=9.5, color=INK)
        ax.set_xlabel("dimensions", fontsize=9, color=MUTED)
        ticks(ax, scale)
    legend_beside(figure)
    return {"Quality against the number of dimensions": figure}
