"""Keeps what the benchmarks measure as `results/NAME.json`, with the hardware and versions it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vardistill.bench import Bench, Budget, Results, run_bench
from vardistill.bench.cells import Row
from vardistill.bench.results import print_results
from vardistill.training.folder import environment

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arguments:
    """A bench over seeds; its finished runs are not made again."""

    seeds: int | None = None
    """Default: the bench's."""
    minutes: float | None = None
    """Of wall-clock time for every run; default: the bench's own budget."""
    jobs: int = 2
    threads: int = 1


def run(bench: Bench, arguments: Arguments) -> Results:
    """Run the bench below `runs/`, and print its table."""
    budget = None if arguments.minutes is None else Budget("wall", arguments.minutes)
    folder = HERE / "runs" / bench.name
    results = run_bench(bench, folder, arguments.seeds, budget, arguments.jobs, arguments.threads)
    print_results(results)
    return results


def keep(
    benchmark: str, results: Results, label: Callable[[Row], str] = lambda row: row.objective, **facts: Any
) -> None:
    """Write the rows of a bench, a dictionary for every seed, with its budget and further facts."""
    rows = {label(row): [r.values | {"seed": r.cell.seed} for r in found] for row, found in results.rows.items()}
    settings = results.settings
    if settings.budget.amount is not None:
        facts = {settings.budget.unit: settings.budget.amount} | facts
    write_results(benchmark, rows, settings.threads, settings.jobs, results.environment, **facts)


def write_results(
    benchmark: str,
    rows: Mapping[str, Any],
    threads: int,
    jobs: int,
    where: Mapping[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Write `results/BENCHMARK.json`; `where` the rows were measured is this machine by default."""
    measured_on = {**(where or environment()), "threads": threads, "runs at a time": jobs}
    path = HERE / "results" / f"{benchmark}.json"
    path.write_text(json.dumps({"environment": measured_on, **facts, "rows": rows}, indent=1) + "\n")
