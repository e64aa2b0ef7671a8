"""VarDiU's posteriors side by side at equal wall clock: `python benchmarks/mog40_posteriors.py`.

The same generator, levels and optimiser; the gap DiU − DiKL of each over training, exact by quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro
from cells import HERE, Cell, history, limited, print_rows, run_cells, write_results
from matplotlib.figure import Figure

from vardistill.config import Config
from vardistill.presets import DEMO, learned_posterior

ROWS: dict[str, Config] = {
    "prior, batch candidates": DEMO,
    "diagonal": learned_posterior("diagonal"),
    "full": learned_posterior("full"),
    "full, 4 candidates": learned_posterior("full", candidates=4),
    "mixture": learned_posterior("mixture"),
    "nsf": learned_posterior("nsf"),
}


@dataclass(frozen=True)
class Arguments:
    """Equal minutes for every posterior."""

    minutes: float = 2.0
    seeds: int = 2
    jobs: int = 2
    threads: int = 1


def main(arguments: Arguments) -> None:
    """Run, print, plot, and write results/mog40_posteriors.json."""
    cells = [
        Cell(row, seed, limited(config, arguments.minutes, seed))
        for row, config in ROWS.items()
        for seed in range(arguments.seeds)
    ]
    rows = run_cells("mog40_posteriors", cells, arguments.jobs, arguments.threads)
    curves = {row: history("mog40_posteriors", next(c for c in cells if c.row == row)) for row in rows}
    metrics = ("log_density_gap", "log_mmd", "modes_found", "mode_tv", "off_mode", "diu", "dikl", "gap")
    print_rows(f"MoG-40, true teacher, {arguments.minutes:g} minutes on {arguments.threads} thread(s)", rows, metrics)
    write_results("mog40_posteriors", rows, arguments.threads, arguments.jobs, minutes=arguments.minutes, curves=curves)
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
