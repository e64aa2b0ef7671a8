"""What a bench's runs reached: as an object, as plain data and lines of a file, and as a table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from vardistill.bench.cells import Bench, Cell, Row, Settings
from vardistill.bench.significance import DIRECTIONS, RULE, loss, significantly_best
from vardistill.training.folder import RunFolder

COSTS = ("step", "cpu_seconds", "seconds", "network_evaluations")
"""What a cell spent; columns of every table where they are known."""

FEW = 6
"""Names of unfinished cells that are told; `results.json` has all."""

EACH = ("mmd_p_value",)
"""Metrics of which every seed's value is shown: their mean says nothing."""


@dataclass(frozen=True)
class Result:
    """What a finished cell reached.

    Attributes:
        cell: which.
        values: final metrics and costs, finite numbers by name.
        curve: the evaluations over training, with `step`, `seconds` and, where known, the other costs.
        lost: metrics that ended as no finite number.
    """

    cell: Cell
    values: dict[str, float]
    curve: list[dict[str, Any]]
    lost: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Failure:
    """Why a cell, or a shared teacher, has no result.

    Attributes:
        name: of its folder.
        exit: code of its process; None where none ran.
        reason: the last line that it said.
        row: of the table.
    """

    name: str
    exit: int | None
    reason: str
    row: Row


@dataclass(frozen=True)
class Results:
    """What a bench reached so far.

    Attributes:
        bench: which.
        settings: what was asked for.
        environment: versions and hardware of the runs; values that differ between runs are joined.
        finished: results, in the order of the cells.
        failures: cells that failed.
        missing: names of cells that were not run, or not to their end.
        teachers: what the evaluations of shared teachers tell, by their folders' names.
    """

    bench: Bench
    settings: Settings
    environment: dict[str, Any]
    finished: list[Result]
    failures: list[Failure]
    missing: list[str]
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[Row, list[Result]]:
        """Results by what their seeds share."""
        rows: dict[Row, list[Result]] = {}
        for result in self.finished:
            rows.setdefault(result.cell.row, []).append(result)
        return rows

    def values(self, row: Row, metric: str) -> list[float]:
        """A metric of a row, of every seed that has it."""
        return [result.values[metric] for result in self.rows[row] if metric in result.values]

    def columns(self) -> list[str]:
        """The bench's metrics and the costs, as far as any cell has them."""
        known = {name for result in self.finished for name in result.values}
        return [name for name in (*self.bench.metrics, *COSTS) if name in known]

    def best(self) -> set[tuple[Row, str]]:
        """The rows and metrics of the table that are significantly best, see `significance.RULE`."""
        found = set()
        directions = DIRECTIONS | dict(self.bench.better)
        for metric in set(self.bench.metrics) & directions.keys():
            rivals: dict[tuple[str, str], dict[Row, list[float]]] = {}
            for row in self.rows:
                if values := [loss(v, directions[metric]) for v in self.values(row, metric)]:
                    rivals.setdefault((row.teacher, row.problem), {})[row] = values
            lacking = self._lacking(metric)
            winners = (significantly_best(group) for where, group in rivals.items() if where not in lacking)
            found |= {(winner, metric) for winner in winners if winner is not None}
        return found

    def _lacking(self, metric: str) -> set[tuple[str, str]]:
        """Teachers and problems of which a run failed or lost the metric: the others are no fair sample."""
        rows = [failure.row for failure in self.failures]
        rows += [result.cell.row for result in self.finished if metric in result.lost]
        return {(row.teacher, row.problem) for row in rows}


@dataclass(frozen=True)
class Entry:
    """A field of the table: its text, and whether it is significantly best."""

    text: str
    best: bool = False


def collect(folder: Path, bench: Bench, cells: Sequence[Cell], settings: Settings) -> Results:
    """Read what the cells left in the bench's folder; what is not there is missing."""
    finished, failures, missing = [], [], []
    for cell in cells:
        path = folder / cell.name
        final, failure = read_json(path / "evaluation.json"), read_json(failure_file(path))
        if final is not None:
            finished.append(_result(cell, RunFolder(path), final))
        elif failure is not None:
            failures.append(Failure(cell.name, failure.get("exit"), str(failure.get("reason")), cell.row))
        else:
            missing.append(cell.name)
    places = [read_json(RunFolder(folder / result.cell.name).environment) or {} for result in finished]
    fits = {path.parent.name: read_json(path) or {} for path in sorted(folder.glob("teachers/*/evaluation.json"))}
    return Results(bench, settings, _common(places), finished, failures, missing, fits)


def _result(cell: Cell, run: RunFolder, final: Mapping[str, Any]) -> Result:
    from vardistill.reports.contents import metrics_lines  # imports torch, which who runs cells does without
    from vardistill.reports.figures import is_finite

    curve = [line for line in metrics_lines(run) if line.get("kind") == "eval"]
    values = {**(curve[-1] if curve else {}), **final}
    finite = {name: v for name, v in values.items() if is_finite(v)}
    return Result(cell, finite, curve, frozenset(values) - frozenset(finite))


def _common(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One value of each fact, or all that there are."""
    common: dict[str, Any] = {}
    for name in dict.fromkeys(name for place in places for name in place):
        values = list({str(place.get(name)): place.get(name) for place in places}.values())
        common[name] = values[0] if len(values) == 1 else "; ".join(map(str, values))
    return common


def failure_file(path: Path) -> Path:
    """Where the reason of a failure is kept, beside the folder of the run."""
    return path.with_name(f"{path.name}.failed")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is none or it was cut short."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def to_dict(results: Results) -> dict[str, Any]:
    """Everything, as plain data."""
    best = results.best()
    return {
        "bench": results.bench.name,
        "about": results.bench.about,
        "settings": asdict(results.settings),
        "environment": results.environment,
        "rows": [
            {
                **row._asdict(),
                "seeds": [result.cell.seed for result in found],
                "best": [metric for metric in results.bench.metrics if (row, metric) in best],
            }
            for row, found in results.rows.items()
        ],
        "cells": [
            {**_labels(result.cell), "values": result.values, "curve": result.curve} for result in results.finished
        ],
        "failures": [{"name": f.name, "exit": f.exit, "reason": f.reason} for f in results.failures],
        "missing": results.missing,
        "teachers": results.teachers,
    }


def to_csv(results: Results) -> str:
    """A line for every finished cell."""
    out = io.StringIO()
    names = list(dict.fromkeys(name for result in results.finished for name in result.values))
    table = csv.DictWriter(out, ["objective", "teacher", "problem", "seed", "run", *names], lineterminator="\n")
    table.writeheader()
    table.writerows({**_labels(result.cell), **result.values} for result in results.finished)
    return out.getvalue()


def _labels(cell: Cell) -> dict[str, Any]:
    return {**cell.row._asdict(), "seed": cell.seed, "run": cell.name}


def table(results: Results) -> tuple[list[str], dict[Row, list[Entry]]]:
    """Headings and rows; labels that all rows share are left out, but for the objective's."""
    labels = [i for i in range(len(Row._fields)) if i == 0 or len({row[i] for row in results.rows}) > 1]
    metrics, best = results.columns(), results.best()
    rows = {
        row: [Entry(row[i]) for i in labels]
        + [Entry(str(len(found)))]
        + [Entry(_text(metric, results.values(row, metric), len(found)), (row, metric) in best) for metric in metrics]
        for row, found in results.rows.items()
    }
    return [*(Row._fields[i] for i in labels), "seeds", *metrics], rows


def _text(metric: str, values: Sequence[float], seeds: int) -> str:
    if not values:
        return "–"
    if len(values) < seeds:
        return f"{_text(metric, values, len(values))} ({len(values)} of {seeds})"
    if metric in EACH:
        return ", ".join(f"{v:.2g}" for v in values)
    if metric in COSTS:
        mean = statistics.fmean(values)
        return f"{mean:,.0f}" if 10 <= mean < 1e6 else f"{mean:.3g}"
    return spread(values)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, to the two digits that the latter allows."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation == 0:
        return f"{mean:.4g}".replace("-", "−")
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}".replace("-", "−")


def _parts(console: Console, headings: list[str], rows: list[list[Entry]]) -> list[RichTable]:
    """The table, cut between columns into as many as the console's width needs; each begins with the labels."""
    labels, parts, shown = headings.index("seeds"), [], list(range(len(headings)))
    while rows and shown:
        for last in range(len(shown), 0, -1):
            part = _rich(headings, rows, shown[:last])
            if last <= labels + 1 or _width(console, part) <= console.width:
                break
        parts.append(part)
        shown = [*range(labels), *shown[last:]] if shown[last:] else []
    return parts


def _width(console: Console, part: RichTable) -> int:
    return console.measure(part, options=console.options.update(max_width=10**6)).maximum


def _rich(headings: list[str], rows: list[list[Entry]], columns: list[int]) -> RichTable:
    shown = RichTable(*(headings[i] for i in columns))
    for entries in rows:
        shown.add_row(*(Text(entries[i].text, "bold" if entries[i].best else "") for i in columns))
    return shown


def print_results(results: Results) -> None:
    """The table, the rule of its bold figures, and what is not in it."""
    headings, rows = table(results)
    console = Console()
    console.print(f"{results.bench.name}: {results.bench.about}", markup=False)
    for part in _parts(console, headings, list(rows.values())):
        console.print(part)
    console.print(RULE if rows else "no cell is finished yet")
    for failure in results.failures:
        console.print(f"failed: {failure.name} (exit code {failure.exit}): {failure.reason}", markup=False)
    if results.missing:
        console.print(f"not finished: {first_few(results.missing)}", markup=False)


def first_few(names: Sequence[str]) -> str:
    """The first names in a line, and how many more there are."""
    more = len(names) - FEW
    return ", ".join(names[:FEW]) + (f" and {more:,} more" if more > 0 else "")
