"""`vardistill evaluate RUN [--json]`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require
from vardistill.runs.config import check_choices
from vardistill.training.config_files import is_image_run


@dataclass(frozen=True)
class Arguments:
    """Measure a run's generator against its problem."""

    json: bool = False
    """Print one JSON object instead of a table."""
    num: int = 10_000
    """Number of samples; of points, on each side."""
    seed: int = 3
    """Fixes the samples of both sides."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("num", self.num, self.num >= 1, "at least 1")


def main(arguments: list[str]) -> int:
    """Measure, keep the table as evaluation.json, and print it."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "evaluate RUN", "Measure a run's generator against its problem.")
    if run is None:
        raise UsageError("evaluate needs a run folder before its flags: vardistill evaluate RUN")

    if is_image_run(Path(run)):
        _pictures(Path(run), parsed)
    else:
        _points(Path(run), parsed)
    return 0


def _points(run: Path, parsed: Arguments) -> None:
    from vardistill.cli.tables import print_evaluation
    from vardistill.runs.build import build_problem
    from vardistill.runs.experiment import load_run, write_evaluation

    folder, config, generator = load_run(run)
    problem = build_problem(config.problem, config.levels.schedule)
    samples = generator.sample(parsed.num, seed=parsed.seed)
    table = write_evaluation(folder, samples, problem, parsed.seed + 1)
    if parsed.json:
        print(json.dumps(table))
    else:
        print_evaluation(table, problem)


def _pictures(run: Path, parsed: Arguments) -> None:
    from vardistill.cli.tables import print_image_evaluation
    from vardistill.domains.pictures.experiment import evaluate_run

    table, config = evaluate_run(run, parsed.num, parsed.seed)
    if parsed.json:
        print(json.dumps(table))
    else:
        print_image_evaluation(table, config)
