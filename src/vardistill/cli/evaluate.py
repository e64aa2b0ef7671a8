"""`vardistill evaluate RUN [--json]`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vardistill.choices import check_choices
from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require
from vardistill.progress import phase


@dataclass(frozen=True)
class Arguments:
    """Measure a run's generator against its target."""

    json: bool = False
    """Print one JSON object instead of a table."""
    num: int = 10_000
    """Number of samples; of points, on each side."""
    seed: int = 3
    """Fixes the samples of both sides."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("num", self.num, self.num >= 2, "at least 2")


def main(arguments: list[str]) -> int:
    """Measure, keep the table as evaluation.json, and print it."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "evaluate RUN", "Measure a run's generator against its target.")
    if run is None:
        raise UsageError("evaluate needs a run folder before its flags: vardistill evaluate RUN")

    with phase("loading PyTorch", kept=False):
        from vardistill.cli.tables import print_evaluation
        from vardistill.runs.experiment import evaluate_run

    with phase(f"drawing and measuring {parsed.num:,} samples", kept=False):
        table, domain = evaluate_run(Path(run), parsed.num, parsed.seed)
    if parsed.json:
        print(json.dumps(table))
    else:
        print_evaluation(table, domain)
    return 0
