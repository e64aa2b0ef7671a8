"""Draws the figures of docs/results.md as docs/_static/bench-*.png: `python benchmarks/figures.py`.

They are those of the benches' own pages, from `results/*.json` alone.
"""

from __future__ import annotations

import json

from measured import HERE

from vardistill.bench import BENCHES, Budget, Cell, Results, dimension, steps, variance
from vardistill.bench.cells import Settings
from vardistill.bench.page import axes_of, curve_figure
from vardistill.bench.results import Result
from vardistill.runs.config import Config


def main() -> None:
    """Draw all of them."""
    mog40 = results_of("mog40-3min")
    rows = {row: found for row, found in mog40.rows.items() if row.teacher == "true"}
    objectives = [row.objective for row in rows]
    curves = curve_figure("log_mmd", rows, objectives, axes_of(mog40))
    capacity = results_of("posterior-capacity")
    gaps = curve_figure("gap", capacity.rows, [row.objective for row in capacity.rows], axes_of(capacity)[:1])
    (dimensions,) = dimension.figures(results_of("dimension")).values()
    (noise,) = variance.figures(results_of("variance")).values()
    drawn = {"mog40": curves, "capacity": gaps, "dimension": dimensions, "variance": noise}
    if (HERE / "results" / "bench-steps.json").exists():
        (drawn["steps"],) = steps.figures(results_of("steps")).values()
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(HERE.parent / "docs" / "_static" / f"bench-{name}.png", dpi=110)


def results_of(name: str) -> Results:
    """What a bench reached, less the configurations of its cells."""
    kept = json.loads((HERE / "results" / f"bench-{name}.json").read_text())
    settings = Settings(**kept["settings"] | {"budget": Budget(**kept["settings"]["budget"])})
    finished = [
        Result(
            Cell(cell["objective"], cell["teacher"], cell["problem"], cell["seed"], Config()),
            cell["values"],
            cell["curve"],
        )
        for cell in kept["cells"]
    ]
    return Results(BENCHES[kept["bench"]], settings, kept["environment"], finished, [], [])


if __name__ == "__main__":
    main()
