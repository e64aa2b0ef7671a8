"""Empirical and learned teachers: `python benchmarks/mog40_teachers.py`.

The reference's learned-score rows end, after 1,000,000 steps, at −8.132 / −5.649 (VarDiU-Gaussian, ~12,500 s) and
−7.893 / −5.684 (VarDiU-NSF, ~135,000 s), log-density / log-MMD. A learned teacher is fitted once per seed, outside of
the minutes of the rows that share it.
"""

from __future__ import annotations

import tyro
from measured import Arguments, keep, run

from vardistill.bench import Bench, Budget, grid
from vardistill.bench.named import evaluated
from vardistill.config import TeacherConfig
from vardistill.presets import DEMO, learned_posterior

SAMPLES = 20_480
OBJECTIVES = {"prior, batch candidates": evaluated(DEMO, 1500), "full": evaluated(learned_posterior("full"), 300)}
TEACHERS = {
    "empirical": TeacherConfig("empirical", teacher_samples=SAMPLES),
    "learned": TeacherConfig("learned", teacher_samples=SAMPLES),
}

BENCH = Bench(
    "teachers",
    f"MoG-40 with teachers made from {SAMPLES:,} samples",
    lambda seeds: grid(OBJECTIVES, TEACHERS, seeds=seeds),
    metrics=("log_density", "log_density_gap", "log_mmd", "modes_found", "mode_tv", "off_mode"),
    seeds=2,
    budget=Budget("wall", 1.5),
)


def main(arguments: Arguments) -> None:
    """Run, print, and write results/mog40_teachers.json."""
    keep("mog40_teachers", run(BENCH, arguments), lambda row: f"{row.teacher}: {row.objective}", samples=SAMPLES)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
