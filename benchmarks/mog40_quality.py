"""How close to the target the default preset comes: `python benchmarks/mog40_quality.py`."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass

import tyro
from cells import HERE, Cell, print_rows, run_cells, run_folder, write_results

from vardistill.presets import PRESETS


@dataclass(frozen=True)
class Arguments:
    """The default preset over seeds."""

    presets: tuple[str, ...] = ("mog40-vardiu", "mog40-vardiu-demo")
    seeds: int = 3
    jobs: int = 2
    threads: int = 1


def main(arguments: Arguments) -> None:
    """Run, print, and write results/mog40_quality.json."""
    cells = []
    for name in arguments.presets:
        config = PRESETS[name].config
        for seed in range(arguments.seeds):
            training = dataclasses.replace(config.training, seed=seed)
            cells.append(Cell(name, seed, dataclasses.replace(config, training=training)))
    rows = run_cells("mog40_quality", cells, arguments.jobs, arguments.threads)
    print_rows("MoG-40, true teacher", rows)
    write_results("mog40_quality", rows, arguments.threads, arguments.jobs)
    picture = HERE.parent / "docs" / "_static" / "mog40.png"
    picture.parent.mkdir(exist_ok=True)
    demo = next(cell for cell in cells if cell.row == arguments.presets[-1])
    shutil.copy(run_folder("mog40_quality", demo) / "samples.png", picture)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
