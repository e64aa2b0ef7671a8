"""How close to the target the default preset comes: `python benchmarks/mog40_quality.py`.

Runs the bench `quality` below `benchmarks/runs/`; keeps its rows for the tables and the demo's samples for the README.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from vardistill.bench import BENCHES, run_bench
from vardistill.bench.results import print_results

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arguments:
    """The default preset over seeds."""

    seeds: int = 3
    jobs: int = 2
    threads: int = 1


def main(arguments: Arguments) -> None:
    """Run, print, and write results/mog40_quality.json."""
    folder = HERE / "runs" / "quality"
    results = run_bench(BENCHES["quality"], folder, arguments.seeds, jobs=arguments.jobs, threads=arguments.threads)
    print_results(results)
    rows = {row.objective: [r.values | {"seed": r.cell.seed} for r in found] for row, found in results.rows.items()}
    where = results.environment | {"threads": results.settings.threads, "runs at a time": results.settings.jobs}
    table = {"environment": where, "rows": rows}
    (HERE / "results" / "mog40_quality.json").write_text(json.dumps(table, indent=1) + "\n")
    demo = next(r.cell.name for r in results.finished if r.cell.objective == "mog40-vardiu-demo")
    shutil.copy(folder / demo / "samples.png", HERE.parent / "docs" / "_static" / "mog40.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
