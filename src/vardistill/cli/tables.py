"""Tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vardistill.domains.pictures.config import ImagesConfig
from vardistill.domains.points.problems import Problem
from vardistill.reports.figures import is_finite
from vardistill.reports.verdict import Standard, standards
from vardistill.runs.build import build_problem
from vardistill.runs.config import Config
from vardistill.training import config_files
from vardistill.training.folder import RunFolder


def print_run(folder: RunFolder) -> None:
    """A finished run's metrics and where to look."""
    config = config_files.read((Config, ImagesConfig), folder.config)
    table = json.loads((folder.path / "evaluation.json").read_text())
    if isinstance(config, ImagesConfig):
        print_image_evaluation(table, config)
    else:
        print_evaluation(table, build_problem(config.problem, config.levels.schedule))
    print(f"report:    {folder.path / 'report.html'}")
    print(f"generator: {folder.generator}")


def print_evaluation(values: Mapping[str, Any], problem: Problem) -> None:
    """Metrics beside what a perfect student scores."""
    perfect = perfect_student(problem, values.get("samples", problem.reference.samples))
    table = Table("metric", "student", "perfect student", title=problem.name)
    for name, value in values.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}", perfect.get(name, ""))
    Console().print(table)


def print_image_evaluation(values: Mapping[str, Any], config: ImagesConfig) -> None:
    """A student's metrics beside its teacher's own."""
    theirs = teachers_columns(Path(config.teacher) / "evaluation.json")
    titles = (f"teacher, {name}" if name.endswith("steps") else name for name in theirs)
    table = Table("metric", "student, 1 step", *titles, title="pictures")
    add_rows(table, [values, *theirs.values()])
    Console().print(table)


def teachers_columns(path: Path) -> dict[str, dict[str, float]]:
    """The numbers of a teacher's evaluation by column; nothing of a file that is missing or of another kind."""
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    columns = {name: v for name, v in columns.items() if isinstance(v, dict)} if isinstance(columns, dict) else {}
    return {name: {key: v for key, v in column.items() if is_finite(v)} for name, column in columns.items()}


def print_image_teacher(folder: RunFolder) -> None:
    """A teacher's metrics by its sampler's steps, and where it is."""
    columns: dict[str, Any] = json.loads((folder.path / "evaluation.json").read_text())
    table = Table("metric", *columns, title=f"teacher {folder.path}")
    add_rows(table, list(columns.values()))
    Console().print(table)
    print(f"pipeline: {folder.path / 'pipeline'}")


def add_rows(table: Table, columns: Sequence[Mapping[str, float]]) -> None:
    """A row for each metric of the first column; other columns may lack it."""
    for name in columns[0]:
        values = (column.get(name) for column in columns)
        table.add_row(name, *("" if v is None else f"{v:.4g}" for v in values))


def perfect_student(problem: Problem, n: int) -> dict[str, str]:
    """What `n` true samples score, with the standard deviation of one evaluation."""
    r = problem.reference
    scores = {"energy_distance": Standard(0.0, r.energy_distance_std * r.samples / n), **standards(problem, n)}
    texts = {name: f"{v.mean:.4g} ± {v.std:.1g}" for name, v in scores.items()}
    return texts | {"mmd2_unbiased": "0", "mmd_p_value": "uniform in (0, 1)"}


def print_teacher(path: Path) -> None:
    """A fitted teacher's error at each noise level, of the score or on held-out data."""
    errors = json.loads((path / "evaluation.json").read_text())
    (name,) = errors.keys() - {"ratios"}
    table = Table("σ/α", name.replace("_", " "), title=f"teacher {path}")
    for ratio, error in zip(errors["ratios"], errors[name], strict=True):
        table.add_row(f"{ratio:.3g}", f"{error:.3g}")
    Console().print(table)
