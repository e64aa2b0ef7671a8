"""What MoG-40's teachers score themselves, as far as their students should come: `python benchmarks/teachers.py`.

20 steps of Heun's method with the true teacher and with those that were fitted for
`vardistill bench mog40 --out benchmarks/runs/mog40-3min`, and draws from the empirical one's points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from measured import HERE, write_results
from torch import Tensor

from vardistill.domains.points.problems import MoG40
from vardistill.domains.points.teach import load_teacher
from vardistill.metrics import evaluate
from vardistill.training.data import teacher_samples

SEEDS, SAMPLES = 3, 10_000
METRICS = ("log_density", "log_mmd", "modes_found", "mode_tv", "off_mode")


def main() -> None:
    """Sample, measure and write results/teachers.json."""
    fitted = [HERE / "runs" / "mog40-3min" / "teachers" / f"mog40-10000-seed{seed}" for seed in range(SEEDS)]
    if not all((path / "evaluation.json").exists() for path in fitted):
        sys.exit("teachers: first run vardistill bench mog40 --out benchmarks/runs/mog40-3min")
    problem = MoG40()

    def true(seed: int) -> Tensor:
        return teacher_samples(problem.denoiser, (2,), SAMPLES, torch.Generator().manual_seed(seed)).data

    def empirical(seed: int) -> Tensor:
        points = problem.sample(SAMPLES, torch.Generator().manual_seed(seed))
        return points[torch.randint(SAMPLES, (SAMPLES,), generator=torch.Generator().manual_seed(100 + seed))]

    def learned(seed: int) -> Tensor:
        return teacher_samples(load_teacher(fitted[seed]), (2,), SAMPLES, torch.Generator().manual_seed(seed)).data

    rows: dict[str, list[dict[str, float]]] = {}
    teachers: tuple[Callable[[int], Tensor], ...] = (true, empirical, learned)
    for teacher in teachers:
        for seed in range(SEEDS):
            metrics = evaluate(teacher(seed), problem, torch.Generator().manual_seed(200 + seed), p_value=False)
            rows.setdefault(teacher.__name__, []).append({"seed": seed} | {name: metrics[name] for name in METRICS})
        print(teacher.__name__, *rows[teacher.__name__], sep="\n  ")
    write_results("teachers", rows, torch.get_num_threads(), 1, samples=SAMPLES)


if __name__ == "__main__":
    main()
