"""Tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vardistill.cli.main import program
from vardistill.domains.base import Measures
from vardistill.files import typed
from vardistill.reports.formats import duration
from vardistill.reports.page import compared, verdict
from vardistill.reports.verdict import perfect_student
from vardistill.runs.config import Config
from vardistill.runs.experiment import load_domain
from vardistill.runs.rehearsal import Rehearsal
from vardistill.training import config_files
from vardistill.training.folder import RunFolder


def print_run(folder: RunFolder) -> None:
    """A finished run's metrics and where to look."""
    config: Config = config_files.read(Config, folder.config)
    domain = load_domain(config, folder)
    print_evaluation(json.loads((folder.path / "evaluation.json").read_text()), domain)
    heading, summary = verdict(compared(folder, domain.problem))
    Console().print(f"verdict:   {heading}. {summary}", markup=False, highlight=False)
    print(f"report:    {folder.path / 'report.html'}")
    print(f"generator: {folder.generator}")
    print(f"samples:   {program()} sample {typed(folder.path)} --num 100 --out samples.png")


def print_evaluation(values: Mapping[str, Any], domain: Measures) -> None:
    """A student's metrics beside what a perfect student scores, where the truth is known, or beside its teacher's."""
    columns = {title: {name: f"{v:.4g}" for name, v in column.items()} for title, column in domain.beside().items()}
    if domain.problem is not None:
        columns["perfect student"] = perfect_student(
            domain.problem, values.get("samples", domain.problem.reference.samples)
        )
    steps = domain.student.steps
    table = Table("metric", f"student, {steps} step{'s' if steps > 1 else ''}", *columns)
    for name, value in values.items():
        own = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        table.add_row(name, own, *(column.get(name, "") for column in columns.values()))
    Console().print(table)


def print_rehearsal(found: Rehearsal, steps: int) -> None:
    """What a run would take."""
    trained = ", ".join(f"{name} {n:,}" for name, n in found.trained.items())
    shares = ", ".join(f"{name} {size(n)}" for name, n in found.memory.items())
    print(f"parameters: {sum(found.trained.values()):,} trained ({trained}); {found.parameters:,} in all")
    print(f"memory:     {size(sum(found.memory.values()))} ({shares}), and activations beside")
    if found.peak is not None:
        print(f"peak:       {size(found.peak)} on the accelerator, with activations")
    print(f"pace:       {found.seconds:.3g} s a step, {found.samples:.3g} samples per second")
    print(f"time:       {duration(found.left)} for up to {steps:,} step{'s' if steps > 1 else ''}, and metrics beside")


def size(n: int) -> str:
    """Bytes, for people."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def print_picture_teacher(folder: RunFolder) -> None:
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


def print_teacher(folder: RunFolder) -> None:
    """A fitted teacher's error at each noise level, of the score or on held-out data."""
    errors = json.loads((folder.path / "evaluation.json").read_text())
    (name,) = errors.keys() - {"ratios"}
    table = Table("σ/α", name.replace("_", " "), title=f"teacher {folder.path}")
    for ratio, error in zip(errors["ratios"], errors[name], strict=True):
        table.add_row(f"{ratio:.3g}", f"{error:.3g}")
    Console().print(table)
