"""VarDiU's posteriors side by side at equal wall clock: `python benchmarks/mog40_posteriors.py`.

The same generator, levels and optimiser; the gap DiU − DiKL of each over training, exact by quadrature.
"""

from __future__ import annotations

from typing import Any

import tyro
from matplotlib.figure import Figure
from measured import HERE, Arguments, keep, run

from vardistill.bench import Bench, Budget, grid
from vardistill.bench.named import evaluated
from vardistill.presets import DEMO, learned_posterior

OBJECTIVES = {
    "prior, batch candidates": evaluated(DEMO, 1500),
    "diagonal": evaluated(learned_posterior("diagonal"), 300),
    "full": evaluated(learned_posterior("full"), 300),
    "full, 4 candidates": evaluated(learned_posterior("full", candidates=4), 300),
    "mixture": evaluated(learned_posterior("mixture"), 300),
    "nsf": evaluated(learned_posterior("nsf"), 300),
}

BENCH = Bench(
    "posteriors",
    "VarDiU's posteriors on MoG-40 with its true teacher",
    lambda seeds: grid(OBJECTIVES, seeds=seeds),
    metrics=("log_density_gap", "log_mmd", "modes_found", "mode_tv", "off_mode", "diu", "dikl", "gap"),
    curves=("gap", "dikl", "log_mmd"),
    seeds=2,
    budget=Budget("wall", 2),
)


def main(arguments: Arguments) -> None:
    """Run, print, plot, and write results/mog40_posteriors.json."""
    results = run(BENCH, arguments)
    curves = {row.objective: found[0].curve for row, found in results.rows.items()}
    keep("mog40_posteriors", results, curves=curves)
    plot(curves).savefig(HERE / "results" / "mog40_posteriors.png", dpi=110)


def plot(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Gap, diffusive KL and log-MMD against seconds, of each row's first seed."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("gap", "dikl", "log_mmd"), strict=True):
        for row, lines in curves.items():
            axes.plot([line["seconds"] for line in lines], [line[name] for line in lines], label=row)
        axes.set(xlabel="seconds", title={"gap": "DiU − DiKL, nats", "dikl": "DiKL, nats"}.get(name, "log-MMD"))
        if name != "log_mmd":
            axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Arguments))
