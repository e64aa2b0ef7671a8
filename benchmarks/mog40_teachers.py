"""Empirical and learned teachers: `python benchmarks/mog40_teachers.py`.

The reference's learned-score rows end, after 1,000,000 steps, at −8.132 / −5.649 (VarDiU-Gaussian, ~12,500 s) and
−7.893 / −5.684 (VarDiU-NSF, ~135,000 s), log-density / log-MMD. A learned teacher is fitted once per seed and sample
size, outside of the minutes of the rows that share it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from cells import HERE, Cell, limited, print_rows, run_cells, write_results

from vardistill.config import TeacherConfig
from vardistill.presets import DEMO, TEACHERS, learned_posterior
from vardistill.teach import teach


@dataclass(frozen=True)
class Arguments:
    """Equal minutes for every teacher and objective."""

    minutes: float = 1.5
    seeds: int = 2
    samples: int = 20_480
    jobs: int = 2
    threads: int = 1


def main(arguments: Arguments) -> None:
    """Run, print, and write results/mog40_teachers.json."""
    objectives = {"prior, batch candidates": DEMO, "full": learned_posterior("full")}
    cells = []
    for seed in range(arguments.seeds):
        fitted = fit(arguments.samples, seed)
        kinds: tuple[Literal["empirical", "learned"], ...] = ("empirical", "learned")
        for kind in kinds:
            for name, config in objectives.items():
                teacher = TeacherConfig(kind, fitted if kind == "learned" else None, arguments.samples)
                config = limited(dataclasses.replace(config, teacher=teacher), arguments.minutes, seed)
                cells.append(Cell(f"{kind}: {name}", seed, config))
    rows = run_cells("mog40_teachers", cells, arguments.jobs, arguments.threads)
    print_rows(f"MoG-40, {arguments.minutes:g} minutes on {arguments.threads} thread(s)", rows)
    facts = {"minutes": arguments.minutes, "samples": arguments.samples}
    write_results("mog40_teachers", rows, arguments.threads, arguments.jobs, **facts)


def fit(samples: int, seed: int) -> Path:
    """The folder of the learned teacher of this seed, fitted if it is not there."""
    path = HERE / "runs" / "mog40_teachers" / f"teacher-{samples}-seed{seed}"
    if not (path / "evaluation.json").exists():
        teach(dataclasses.replace(TEACHERS["mog40"].config, samples=samples, seed=seed), path)
    return path


if __name__ == "__main__":
    main(tyro.cli(Arguments))
