"""One-step students of pictures by objective, at equal processor time, beside their teacher.

    vardistill teach digits --out benchmarks/runs/digits-teacher
    python benchmarks/images.py digits --minutes 3 --seeds 3

Runs lie in `runs/images-NAME-MINUTESmin`; finished ones are not made again, and one that was stopped goes on.
`results/images_NAME_MINUTESmin.json` keeps every seed's metrics, the teacher's own, and those of its first step: a
student before any training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from measured import HERE, write_results

from vardistill.domains.pictures.build import build_setting, build_student
from vardistill.domains.pictures.evaluate import build_reference, measured
from vardistill.domains.pictures.experiment import draw, even_labels
from vardistill.domains.pictures.features import load_features
from vardistill.domains.pictures.presets import IMAGE_PRESETS, VARDIU

ROWS = {
    "VarDiU": ("images-vardiu",),
    "VarDiU, levels to 0.7": ("images-vardiu", "--base-end", "0.7"),
    "VarDiU, no head start": ("images-vardiu", "--head-start", "0"),
    "VarDiU, rank 16": ("images-vardiu", "--rank", "16"),
    "VarDiU, coupling flow": ("images-vardiu", "--posterior", "coupling"),
    "VarDiU, 4 candidates": ("images-vardiu", "--candidates", "4"),
    "VarFlow": ("images-varflow",),
    "VarFlow, classifier's features": ("images-varflow", "--space", "classifier"),
    "VarDiU + VarFlow": ("images-vardiu-varflow",),
    "Diff-Instruct": ("images-diff-instruct",),
    "Diff-Instruct + VarFlow": ("images-diff-instruct-varflow",),
    "Diff-Instruct + VarFlow, λ = 6": ("images-diff-instruct-varflow", "--varflow-weight-end", "6"),
}
"""Preset and flags of every row."""


@dataclass(frozen=True)
class Arguments:
    """Students of one teacher."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the results; the teacher is runs/NAME-teacher."""
    minutes: float = 3.0
    """Processor time of every student."""
    seeds: int = 1
    jobs: int = 1
    only: tuple[str, ...] = ()
    """Rows to run; default all."""


def main(arguments: Arguments) -> None:
    """Run what is missing, print, and write the results."""
    teacher = HERE / "runs" / f"{arguments.name}-teacher"
    cells = [(row, seed) for seed in range(arguments.seeds) for row in ROWS]
    wanted = [cell for cell in cells if not arguments.only or cell[0] in arguments.only]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda cell: run(arguments, teacher, *cell), wanted))
    rows: dict[str, list[dict[str, Any]]] = {}
    for row, seed in cells:
        if (found := folder_of(arguments, row, seed) / "evaluation.json").exists():
            rows.setdefault(row, []).append(
                json.loads(found.read_text()) | {"seed": seed, "curve": curve(found.parent)}
            )
    facts = {"minutes": arguments.minutes, "teacher": json.loads((teacher / "evaluation.json").read_text())}
    facts["first step"] = first_step(teacher, facts["teacher"]["18 steps"]["samples"])
    write_results(f"images_{arguments.name}_{arguments.minutes:g}min", rows, 1, arguments.jobs, **facts)
    for row, found in {**{f"teacher, {k}": [v] for k, v in facts["teacher"].items()}, **rows}.items():
        print(row, *(f"{name} {found[0][name]:.3g}" for name in ("fd", "precision", "recall") if name in found[0]))


def folder_of(arguments: Arguments, row: str, seed: int) -> Path:
    """The run of a row and a seed."""
    bench = f"images-{arguments.name}-{arguments.minutes:g}min"
    return HERE / "runs" / bench / f"{row.replace(' ', '-').replace(',', '')}_seed{seed}"


def curve(folder: Path) -> list[dict[str, float]]:
    """Processor seconds and Fréchet distance of a run's evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"cpu_seconds": line["cpu_seconds"], "fd": line["fd"]} for line in lines if line["kind"] == "eval"]


def run(arguments: Arguments, teacher: Path, row: str, seed: int) -> None:
    """Train a student in a process of one thread, or go on with it, unless it is there."""
    folder = folder_of(arguments, row, seed)
    if (folder / "evaluation.json").exists():
        return
    flags = ["--teacher", str(teacher), "--max-minutes", str(arguments.minutes), "--clock", "cpu"]
    flags += ["--steps", str(10**6), "--seed", str(seed), "--tracker", "none", "--out", str(folder)]
    words = ["--resume", str(folder)] if (folder / "config.yaml").exists() else [*ROWS[row], *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        command = [sys.executable, "-m", "vardistill", "train", *words]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(f"{row}, seed {seed}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def first_step(teacher: Path, n: int) -> dict[str, float]:
    """Metrics of the student before training: one evaluation of the teacher at t_init."""
    setting = build_setting(replace(VARDIU, teacher=str(teacher)))
    student = build_student(setting).eval()
    labels = even_labels(n, student.classes)
    assert setting.data is not None
    reference = build_reference(setting.data, load_features(teacher / "classifier"))
    return measured(draw(student, n, 1, labels), reference, labels)


if __name__ == "__main__":
    assert {preset for preset, *_ in ROWS.values()} <= IMAGE_PRESETS.keys()
    torch.set_num_threads(1)
    main(tyro.cli(Arguments))
