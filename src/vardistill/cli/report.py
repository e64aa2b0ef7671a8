"""`vardistill report RUN|BENCH`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, unknown


@dataclass(frozen=True)
class Arguments:
    """Write a run's or a bench's report.html anew."""


def main(arguments: list[str]) -> int:
    """Write the page and say where it is."""
    run, rest = take_positional(arguments)
    parse(Arguments, rest, "report RUN|BENCH", "Write a run's or a bench's report.html anew.")
    if run is None:
        raise UsageError("report needs a run folder: vardistill report RUN")
    if (Path(run) / "bench.json").is_file():
        return _report_bench(Path(run))

    from vardistill.reports.page import write_report
    from vardistill.training.folder import RunFolder, open_run

    folder = RunFolder(Path(run))  # a run that was started from Python has no configuration file
    print(write_report(folder if folder.metrics.is_file() else open_run(folder.path)))
    return 0


def _report_bench(folder: Path) -> int:
    from vardistill.bench import BENCHES
    from vardistill.bench.running import read_settings, report

    name = read_settings(folder).bench
    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    report(BENCHES[name], folder)
    print(folder / "report.html")
    return 0
