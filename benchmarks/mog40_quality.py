"""How close to the target the default preset comes: `python benchmarks/mog40_quality.py`.

Runs the bench `quality` below `benchmarks/runs/`; keeps its rows for the tables and the demo's samples for the README.
"""

from __future__ import annotations

import shutil

import tyro
from measured import HERE, Arguments, keep, run

from vardistill.bench import BENCHES


def main(arguments: Arguments) -> None:
    """Run, print, and write results/mog40_quality.json."""
    results = run(BENCHES["quality"], arguments)
    keep("mog40_quality", results)
    demo = next(r.cell.name for r in results.finished if r.cell.objective == "mog40-vardiu-demo")
    shutil.copy(HERE / "runs" / "quality" / demo / "samples.png", HERE.parent / "docs" / "_static" / "mog40.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
