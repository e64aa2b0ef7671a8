"""Runs many configurations, a few at a time with a thread each, and tables what they reached.

Every cell is an ordinary run folder below `benchmarks/runs/`, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vardistill import config as configs
from vardistill.config import Config
from vardistill.runs import RunFolder

HERE = Path(__file__).parent
METRICS = ("log_density", "log_density_gap", "log_mmd", "mmd_p_value", "modes_found", "mode_tv", "off_mode")


@dataclass(frozen=True)
class Cell:
    """One run of a benchmark."""

    row: str
    seed: int
    config: Config


def limited(config: Config, minutes: float, seed: int) -> Config:
    """The configuration under a wall-clock budget, evaluated a handful of times: that time counts, too."""
    every = 1500 if config.objective.posterior == "prior" else 300
    training = dataclasses.replace(
        config.training, seed=seed, steps=10**6, max_minutes=minutes, eval_every=every, tracker="none"
    )
    return dataclasses.replace(config, training=training)


def run_cells(benchmark: str, cells: Iterable[Cell], jobs: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Run the cells that are not finished, `jobs` at a time, and return each row's results over its seeds."""
    cells = list(cells)
    folder = HERE / "runs" / benchmark
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: _run(folder, cell, threads), cells))
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(_result(_path(folder, cell)) | {"seed": cell.seed})
    return rows


def write_results(benchmark: str, rows: Mapping[str, Any], threads: int, jobs: int, **facts: Any) -> None:
    """Write `results/BENCHMARK.json` with the hardware the rows were measured on."""
    from vardistill.runs import environment

    where = environment() | {"threads": threads, "runs at a time": jobs}
    path = HERE / "results" / f"{benchmark}.json"
    path.write_text(json.dumps({"environment": where, **facts, "rows": rows}, indent=1) + "\n")


def print_rows(title: str, rows: Mapping[str, list[dict[str, Any]]], metrics: Iterable[str] = METRICS) -> None:
    """A table of mean ± standard deviation over seeds."""
    metrics = [*metrics, "step", "seconds"]
    table = Table("", "seeds", *metrics, title=title)
    for row, results in rows.items():
        table.add_row(row, str(len(results)), *(spread([r[m] for r in results]) for m in metrics))
    Console(width=180).print(table)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, to the two digits that the latter allows."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation == 0:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def history(benchmark: str, cell: Cell) -> list[dict[str, Any]]:
    """The evaluations of a cell's run, in order."""
    lines = RunFolder(run_folder(benchmark, cell)).history()
    return [line for line in lines if line["kind"] == "eval"]


def run_folder(benchmark: str, cell: Cell) -> Path:
    """The folder of a cell's run."""
    return _path(HERE / "runs" / benchmark, cell)


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.row.replace(' ', '-').replace('/', '-')}-seed{cell.seed}"


def _run(folder: Path, cell: Cell, threads: int) -> None:
    path = _path(folder, cell)
    if path.exists() and configs.read(Config, path / "config.yaml") != cell.config:
        raise SystemExit(f"{path} is of another configuration: remove it to measure this one")
    if (path / "evaluation.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{path.name}.yaml"
    configs.write(cell.config, source)
    command = [sys.executable, "-m", "vardistill.cli.main", "train"]
    command += ["--resume", str(path)] if path.exists() else ["--config", str(source), "--out", str(path)]
    log = folder / f"{path.name}.log"
    with log.open("a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    print(f"{path.name}: exit {finished.returncode}", flush=True)
    if finished.returncode:
        raise SystemExit(f"{path.name} failed; see {log}")


def _result(path: Path) -> dict[str, Any]:
    """The final metrics of a run, with its steps and seconds."""
    last = [line for line in RunFolder(path).history() if line["kind"] == "eval"][-1]
    final = json.loads((path / "evaluation.json").read_text())
    return {name: v for name, v in last.items() if name != "kind"} | final
