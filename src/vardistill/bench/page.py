"""The page of a bench: one HTML file with its table, curves and samples inside, which opens without a network.

The pages of the single runs are linked, at their places beside it. `results.json` holds everything, `results.csv` a
line for every cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from vardistill.bench.cells import Cell, Row, load
from vardistill.bench.results import COSTS, Result, Results, first_few, table, to_csv, to_dict
from vardistill.bench.significance import RULE
from vardistill.domains.pictures.figures import grid as picture_grid
from vardistill.domains.points.config import PointsConfig
from vardistill.domains.points.problems import PROBLEMS
from vardistill.files import write_whole
from vardistill.reports import figures
from vardistill.reports.contents import read_samples
from vardistill.reports.formats import Metric, metric_of
from vardistill.reports.pages import card, document, grid, masthead, pairs, scroll_table
from vardistill.reports.verdict import perfect_student
from vardistill.training.folder import RunFolder

PALETTE = (
    figures.STUDENT, figures.ASTRAY, figures.TRUTH, "#8a4fc2", "#b8336a", "#8a7a1f", "#3a8fa8", "#6d6d6d", "#c98a00",
    "#4d6b1f", "#5b5bd6", "#a0522d",
)  # fmt: skip
"""Of the objectives; further ones begin anew with other marks."""

MARKS = "osv^"

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
"""Of the seeds, in turn."""

SHOWN = 64
"""Pictures of a row, a square number."""

POSITIVE = ("gap", "diu", "dikl")
"""Metrics that span decades over training."""

COST_TITLES = {
    "step": "Steps",
    "cpu_seconds": "Processor seconds",
    "seconds": "Seconds",
    "network_evaluations": "Network evaluations",
}

STYLE = """
main { max-width: 1240px; }
a { color: var(--student); }
td b { font-weight: 700; } td.number { font-weight: 400; }
.card + .card { margin-top: 1rem; } .grid > .card { margin-top: 0; }
"""

FOOTER = "Made by vardistill from the files of the bench; this page loads nothing."


def write(results: Results, folder: Path) -> Path:
    """Write results.json, results.csv and then report.html, each whole or not at all; returns the page's path.

    Raises:
        UsageError: for a folder that cannot be written.
    """
    write_whole(folder / "results.json", json.dumps(to_dict(results), indent=1) + "\n")
    write_whole(folder / "results.csv", to_csv(results))
    write_whole(folder / "report.html", page(results, folder))
    return folder / "report.html"


def page(results: Results, folder: Path) -> str:
    """The page of these results, which lie in `folder`."""
    sections = [header(results), quality(results, folder), teachers(results), failures(results), curves(results)]
    sections += [extra(results), samples(results, folder), settings(results)]
    body = "\n".join(section for section in sections if section)
    return document(results.bench.name, body, FOOTER, STYLE)


def header(results: Results) -> str:
    """What was measured, and on what."""
    total = len(results.finished) + len(results.failures) + len(results.missing)
    facts = {
        "runs": f"{len(results.finished)} of {total}",
        "seeds": results.settings.seeds,
        "every run has": budget(results),
        "runs at a time": results.settings.jobs,
        "threads of each": results.settings.threads,
        "processor": results.environment.get("accelerator") or results.environment.get("processor"),
    }
    return masthead("Bench", results.bench.name, facts, results.bench.about)


def budget(results: Results) -> str | None:
    """What every run was trained with, in words; None where none was."""
    return None if results.bench.measure else results.settings.budget.about


def shown(name: str) -> Metric:
    """How a metric or a cost is shown."""
    return metric_of(name, COST_TITLES.get(name, ""))


def quality(results: Results, folder: Path) -> str:
    """The tables of metrics, with links to the runs and what true samples score, and of costs."""
    headings, rows = table(results)
    if not rows:
        return '<div class="card"><p class="note">No cell is finished yet.</p></div>'
    first = headings.index("seeds")
    metrics = [i for i, name in enumerate(headings) if i > first and name not in COSTS]
    costs = [i for i, name in enumerate(headings) if name in COSTS]
    lines: dict[str, list[str]] = {"metrics": [], "costs": []}
    for row, entries in rows.items():
        labels = [escape(entry.text) for entry in entries[:first]]
        links = " ".join(link(result, folder) for result in results.rows[row])
        texts = [f"<b>{escape(e.text)}</b>" if e.best else escape(e.text) for e in entries]
        lines["metrics"].append(line_of([*labels, links], [texts[i] for i in metrics]))
        lines["costs"].append(line_of(labels, [texts[i] for i in costs]))
    for problem, scores in truth(results).items():
        known = {"objective": "true samples", "problem": problem}
        labels = [escape(known.get(name, "–")) for name in headings[:first]]
        lines["metrics"].append(
            line_of([*labels, ""], [escape(scores.get(headings[i], "–")).replace("-", "−") for i in metrics])
        )
    titles = [name if i <= first else shown(name).title for i, name in enumerate(headings)]
    quality = scroll_table(lines["metrics"], titles[: first + 1] + [titles[i] for i in metrics])
    spent = scroll_table(lines["costs"], titles[:first] + [titles[i] for i in costs])
    note = f"A seed leads to its run. {RULE}"
    cards = [f'<div class="card">{quality}<p class="note">{escape(note)}</p></div>']
    cards += [f'<div class="card"><h3>Costs</h3>{spent}</div>'] if costs else []
    return "<h2>Results</h2>\n" + "\n".join(cards)


def line_of(labels: list[str], values: list[str]) -> str:
    """A row of a table, of HTML."""
    head, *others = labels
    cells = [f'<td class="plain">{label}</td>' for label in others] + [f'<td class="number">{v}</td>' for v in values]
    return f'<tr><th scope="row">{head}</th>{"".join(cells)}</tr>'


def truth(results: Results) -> dict[str, dict[str, str]]:
    """What true samples score, as many as a run's, of every problem whose truth is known."""
    found: dict[str, dict[str, str]] = {}
    for result in results.finished:
        domain = result.cell.config.domain
        if isinstance(domain, PointsConfig) and results.bench.measure is None:
            problem = PROBLEMS[domain.problem]()
            n = int(result.values.get("samples", problem.reference.samples))
            found.setdefault(result.cell.problem, perfect_student(problem, n))
    return found


def link(result: Result, folder: Path) -> str:
    """A run's seed, leading to its page where it has one."""
    seed, name = str(result.cell.seed), result.cell.name
    if not (folder / name / "report.html").exists():
        return seed
    return f'<a href="{escape(name)}/report.html">{seed}</a>'


def teachers(results: Results) -> str:
    """What shared teachers reach by their own samplers, in the table's metrics; nothing where that was not measured."""
    rows = {
        f"{name}, {sampler}": values
        for name, evaluation in results.teachers.items()
        for sampler, values in evaluation.items()
        if isinstance(values, dict)
    }
    known = [name for name in results.bench.metrics if any(figures.is_finite(v.get(name)) for v in rows.values())]
    if not known:
        return ""
    lines = []
    for label, values in rows.items():
        texts = [shown(name).show(values[name]) if figures.is_finite(values.get(name)) else "–" for name in known]
        fields = "".join(f'<td class="number">{escape(text)}</td>' for text in texts)
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{fields}</tr>')
    titles = ["teacher", *(shown(name).title for name in known)]
    return f'<h2>Teachers</h2>\n<div class="card">{scroll_table(lines, titles)}</div>'


def failures(results: Results) -> str:
    """What failed, and why; what is not there."""
    parts = []
    if results.failures:
        told = [(f.name, f"exit code {f.exit}: {f.reason}") for f in results.failures]
        parts.append(f'<h2>Failures</h2>\n<div class="card">{pairs(told)}</div>')
    if results.missing:
        parts.append(f'<p class="note">Not finished: {escape(first_few(results.missing))}.</p>')
    return "\n".join(parts)


def curves(results: Results) -> str:
    """Quality over time and over network evaluations, for each teacher and problem."""
    groups: dict[tuple[str, str], dict[Row, list[Result]]] = {}
    for row, found in results.rows.items():
        groups.setdefault((row.teacher, row.problem), {})[row] = found
    colours = list(dict.fromkeys(row.objective for row in results.rows))
    cards = []
    for metric in results.bench.curves:
        for group, rows in groups.items():
            if (figure := curve_figure(metric, rows, colours, axes_of(results))) is not None:
                where = f"{', '.join(group)}: " if len(groups) > 1 else ""
                cards.append(card("", figure, caption(where, metric), f"{where}{shown(metric).title}"))
    return "<h2>Quality over training</h2>\n" + "\n".join(cards) if cards else ""


def caption(where: str, metric: str) -> str:
    """A figure's, as HTML."""
    known = shown(metric)
    meaning = f" ({known.meaning})" if known.meaning else ""
    left_out = " Values of 0 and less have no place on its axis." if is_log(metric) else ""
    told = "a line for every seed, the first one's whole, the others' in dashes"
    return f"{escape(where)}<b>{escape(known.title)}</b>{escape(meaning)}; {told}.{left_out}"


def is_log(metric: str) -> bool:
    """Whether the axis of a metric is logarithmic."""
    return metric in POSITIVE or shown(metric).scale in ("log", "share")


def axes_of(results: Results) -> list[str]:
    """The costs that curves are drawn against: the time that the budget counts, and network evaluations."""
    wall = results.settings.budget.kind == "wall"
    return ["seconds" if wall else "cpu_seconds", "network_evaluations"]


def curve_figure(
    metric: str, rows: Mapping[Row, Iterable[Result]], objectives: list[str], costs: list[str]
) -> Figure | None:
    """A metric against each cost, a line for every run; None where nothing was logged."""
    lines = [(result.cell, points(result, metric, cost), cost) for r in rows.values() for result in r for cost in costs]
    present = [cost for cost in costs if any(len(xy) for _, xy, of in lines if of == cost)]
    if not present:
        return None
    figure = Figure(figsize=(10.8, 3.4), layout="constrained")
    axes = dict(zip(present, figure.subplots(1, len(present), squeeze=False)[0], strict=True))
    named = set()
    for cell, xy, cost in lines:
        if len(xy):
            look = line(objectives.index(cell.objective), cell.seed)
            label = None if (cell.objective, cost) in named else cell.objective
            named.add((cell.objective, cost))
            every = max(1, len(xy) // 20)
            axes[cost].plot(*xy.T, **look, label=label, linewidth=1.4, alpha=0.85, markersize=3, markevery=every)
    for cost, ax in axes.items():
        figures.bare(ax)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(FuncFormatter(figures.plain))
        ax.set_xlabel(COST_TITLES[cost].lower(), fontsize=9, color=figures.MUTED)
        if is_log(metric):
            ax.set_yscale("log")
        figures.ticks(ax, "log" if is_log(metric) else shown(metric).scale)
    figures.legend_beside(figure)
    return figure


def line(i: int, seed: int = 0) -> dict[str, Any]:
    """Colour and mark of the i-th objective, and the dashes of a seed."""
    mark = MARKS[i // len(PALETTE) % len(MARKS)]
    return {"linestyle": DASHES[seed % len(DASHES)], "color": PALETTE[i % len(PALETTE)], "marker": mark}


def points(result: Result, metric: str, cost: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The curve of a metric against a cost, (n, 2); on a logarithmic axis, its positive values."""
    pairs = [(line.get(cost), line.get(metric)) for line in result.curve]
    kept = [p for p in pairs if all(figures.is_finite(v) for v in p)]
    xy = np.array(kept, dtype=np.float64).reshape(-1, 2)
    return xy[xy[:, 1] > 0] if is_log(metric) else xy


def extra(results: Results) -> str:
    """The bench's own figures."""
    if results.bench.figures is None or not results.finished:
        return ""
    drawn: Mapping[str, Figure] = load(results.bench.figures)(results)
    return "\n".join(f"<h2>{escape(title)}</h2>\n{card('', figure, '', title)}" for title, figure in drawn.items())


def samples(results: Results, folder: Path) -> str:
    """Those of each row's first seed after the true ones; a link that leads out of the folder is not followed."""
    cards: dict[str, str] = {}
    for row, (first, *_) in results.rows.items():
        run = RunFolder(folder / first.cell.name)
        kept = run.path / "samples.npz"
        if kept.is_file() and kept.resolve().is_relative_to(folder.resolve()):
            label = " · ".join(row)
            for title, draw in sets(run, first.cell, label).items():
                note = f"Seed {link(first, folder)}." if title == label else ""
                cards[title] = cards.get(title) or card(title, draw(), note)
    return f"<h2>Samples</h2>\n{grid(cards.values())}" if cards else ""


def sets(run: RunFolder, cell: Cell, label: str) -> dict[str, Callable[[], Figure]]:
    """What to show of a run by title: true samples or a teacher's, which other runs share, and its own."""
    own, domain = read_samples(run), cell.config.domain
    assert own is not None
    if isinstance(domain, PointsConfig):
        problem = PROBLEMS[domain.problem]()
        true = problem.sample(max(2, min(len(own), figures.SHOWN)), torch.Generator().manual_seed(0))
        return {
            f"True samples · {cell.problem}": partial(figures.small_figure, true, true, problem),
            label: partial(figures.small_figure, own, true, problem),
        }
    teacher = read_samples(run, "teacher")
    shown = {} if teacher is None else {f"Teacher · {cell.teacher} · {cell.problem}": partial(pictures, teacher)}
    return {**shown, label: partial(pictures, own)}


def pictures(shown: Tensor) -> Figure:
    """The first of them in a square."""
    figure = Figure(figsize=(3.9, 3.9), layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(picture_grid(shown[:SHOWN], columns=math.isqrt(SHOWN)), interpolation="nearest")
    ax.set_axis_off()
    return figure


def settings(results: Results) -> str:
    """What was asked for, and the versions and hardware of the runs."""
    asked = asdict(results.settings) | {"budget": budget(results)}
    tables = {
        "Settings": {name: v for name, v in asked.items() if v is not None},
        "Versions and hardware": results.environment,
    }
    cards = [
        f'<div class="card"><h3>{title}</h3>{pairs([(name, str(v)) for name, v in facts.items()])}</div>'
        for title, facts in tables.items()
        if facts
    ]
    return f'<h2>How it was made</h2>\n<div class="grid columns">{"".join(cards)}</div>'
