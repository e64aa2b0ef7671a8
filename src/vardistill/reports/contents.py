"""What a run folder holds, and what follows from it, for the page of the run.

Beyond what training writes (`runs`) it looks for `evaluation.json` (final metrics), `samples.npz` (array `samples`) and
`bound.json` (the fields of `metrics.BoundGap`). Every file may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from vardistill.domains.own import SOURCES
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.errors import UsageError, first_line
from vardistill.reports.figures import LARGEST, is_finite
from vardistill.reports.verdict import Standard, standards
from vardistill.training import identity
from vardistill.training.folder import UNREADABLE, RunFolder

SAMPLES = 10_000
"""Per evaluation, where neither the samples nor the configuration tell."""

BOUND_FIELDS = ("ratio", "diu", "dikl", "gap", "diu_error", "dikl_error", "gap_error")

FEW = 1000
"""Samples that the data's distance is measured between."""

LINE = ("kind", "step", "seconds")
"""What every line of metrics has."""

BESIDE = {
    "teacher": "Teacher, same noise",
    "nearest": "Nearest in the training set",
    "teacher_samples": "Teacher's sampler",
    "data_samples": "Data",
}
"""Further arrays in `samples.npz`, and their titles."""

COSTS = ("cpu_seconds", "network_evaluations")
"""What lines say of the run's cost so far."""


@dataclass(frozen=True)
class Contents:
    """What a run folder holds, and what follows from it.

    Attributes:
        name: of the folder.
        train: lines of metrics.
        evals: lines of metrics.
        config_text: the configuration as written, "" without.
        config: the same, parsed; {} without.
        environment: versions and hardware.
        final: metrics at the end.
        measured: whether `final` comes from `evaluation.json`, not from the last evaluation during training.
        samples: (n, *data) or None.
        beside: those to show beside them, by title: see `BESIDE`.
        bound: the fields of `metrics.BoundGap`, or None.
        problem: the target, or None.
        truth: what as many true samples score or, without a problem, the teacher.
        columns: the metrics of others, by title, of a run on pictures.
    """

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    final: dict[str, float]
    measured: bool
    samples: Tensor | None
    beside: dict[str, Tensor]
    bound: dict[str, NDArray[np.float64]] | None
    problem: Problem | None
    truth: dict[str, Standard]
    columns: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """What the student is compared with, in words."""
        return (
            "the data set" if "energy_distance_data" in self.truth else "the target" if self.problem else "its teacher"
        )

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return self.train + self.evals

    @property
    def steps(self) -> int:
        """Updates done."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Time spent."""
        return max((float(line["seconds"]) for line in self.lines), default=0.0)

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read(run: RunFolder, problem: Problem | None = None, evaluation: Mapping[str, object] | None = None) -> Contents:
    """Everything that the page of a run shows.

    Args:
        run: the folder; every file in it is optional.
        problem: the target; default the one that the configuration names.
        evaluation: final metrics; default those of `evaluation.json`.

    Raises:
        UsageError: for files that cannot be read.
    """
    lines = metrics_lines(run)
    config_text = _read(run.config, lambda path: path.read_text(encoding="utf-8"), "")
    config = _mapping(_read(run.config, lambda path: yaml.safe_load(path.read_text(encoding="utf-8")), {}))
    if not config and (config := identity.read(run)):
        config_text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    domain = _mapping(config.get("domain"))
    if problem is None and domain.get("problem") in list(PROBLEMS):
        problem = PROBLEMS[domain["problem"]]()
    samples = read_samples(run)
    beside = {title: read_samples(run, name) for name, title in BESIDE.items()}
    if evaluation is None:
        evaluation = _read(run.path / "evaluation.json", _json, {})
    measured = _mapping(evaluation)
    evals = [line for line in lines if line.get("kind") == "eval"]
    last = {key: v for key, v in evals[-1].items() if key not in LINE} if evals else {}
    drawn = len(samples) if samples is not None else _mapping(config.get("training")).get("eval_samples")
    n = measured.pop("samples", None) or drawn
    final = {name: float(v) for name, v in (measured or last).items() if is_finite(v)}
    own_std = final.pop("energy_distance_std", 0.0)
    n = n if isinstance(n, int) and 2 <= n <= 10**6 else SAMPLES
    return Contents(
        name=run.path.resolve().name,
        train=[line for line in lines if line.get("kind") == "train"],
        evals=evals,
        config_text=config_text,
        config=config,
        environment=_mapping(_read(run.environment, _json, {})),
        final=final,
        measured=bool(measured),
        samples=samples,
        beside={
            title: v
            for title, v in beside.items()
            if v is not None and v.numel() and samples is not None and is_beside(v, samples)
        },
        bound=_bound(_read(run.path / "bound.json", _json, None)),
        problem=problem,
        truth=own_standards(beside, own_std) if problem is None else standards(problem, n),
    )


def read_samples(run: RunFolder, name: str = "samples") -> Tensor | None:
    """A set of the run's samples (n, *data), None where there is none; raises UsageError for a damaged file."""
    samples: Tensor | None = _read(run.path / "samples.npz", partial(_samples, name=name), None)
    return samples


def is_beside(v: Tensor, samples: Tensor) -> bool:
    """Whether both are pictures, or samples of one shape."""
    return v.ndim == samples.ndim and (v.ndim == 4 or v.shape[1:] == samples.shape[1:])


def own_standards(beside: Mapping[str, Tensor | None], std: float) -> dict[str, Standard]:
    """What as many further samples of the teacher, or of the data, score, for a run in Python."""
    found = {}
    for name in SOURCES:
        x = beside[BESIDE[f"{name}_samples"]]
        if x is not None and len(x) > 1:
            scale = float(torch.nn.functional.pdist(x[:FEW].flatten(1)).mean())
            found[f"energy_distance_{name}"] = Standard(0.0, std, scale)
    return found


def metrics_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run's metrics that are lines; raises UsageError for a file that cannot be read."""
    return [line for line in run.history() if _is_line(line)]


def steps_per_second(train: Iterable[Mapping[str, Any]]) -> float | None:
    """The median over the stretches between lines of metrics; None with fewer than two lines."""
    marks = np.array([(line["step"], line["seconds"]) for line in train], dtype=np.float64).reshape(-1, 2)
    steps, seconds = np.diff(marks, axis=0).T
    kept = (seconds > 0) & (steps > 0)
    return float(np.median(steps[kept] / seconds[kept])) if kept.any() else None


def _read(path: Path, reader: Callable[[Path], Any], default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return reader(path)
    except UNREADABLE as error:
        reason = first_line(error)
        raise UsageError(f"cannot read {path}: {reason}") from error


def _samples(path: Path, name: str = "samples") -> Tensor | None:
    with path.open("rb") as file, np.load(file) as arrays:
        if name != "samples" and name not in arrays:
            return None
        samples = torch.from_numpy(arrays[name]).float()
    if samples.ndim < 2:
        raise ValueError(f"samples must have shape (n, *data), but have {tuple(samples.shape)}")
    return samples


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mapping(v: object) -> dict[str, Any]:
    return {str(key): value for key, value in v.items()} if isinstance(v, dict) else {}


def _is_line(line: object) -> bool:
    return isinstance(line, dict) and is_finite(line.get("step")) and is_finite(line.get("seconds"))


def _bound(table: object) -> dict[str, NDArray[np.float64]] | None:
    """The fields of a gap's table, (L,) each; None where one is missing or makes no sense."""
    try:
        columns = np.stack([np.array(_mapping(table)[name], dtype=np.float64) for name in BOUND_FIELDS])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    sensible = columns.ndim == 2 and columns.size and (np.abs(columns) <= LARGEST).all()
    if not sensible or (columns[0] <= 0).any() or (columns[4:] < 0).any():
        return None
    return dict(zip(BOUND_FIELDS, columns, strict=True))
