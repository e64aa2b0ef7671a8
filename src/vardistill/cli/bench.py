"""`vardistill bench NAME [--flags]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vardistill.bench.cells import Bench, Budget
from vardistill.bench.named import BENCHES
from vardistill.cli.arguments import parse, take_positional
from vardistill.cli.main import entries
from vardistill.errors import UsageError, unknown

USAGE = "\n".join(
    [
        "usage: vardistill bench NAME [--flags]           NAME --help lists the flags",
        "",
        "benches:",
        *entries({name: bench.about for name, bench in BENCHES.items()}),
    ]
)


@dataclass(frozen=True)
class Arguments:
    """Run a bench, or go on with one."""

    out: Path | None = None
    """The bench's folder, new or to go on in; default: bench/NAME."""
    seeds: int | None = None
    """Seeds of every row; default: the bench's."""
    jobs: int = 1
    """Runs at a time."""
    threads: int = 1
    """Threads of each run."""
    budget: Literal["steps", "wall", "cpu"] | None = None
    """What all runs have the same of: steps, minutes, or minutes of processor time; default: the bench's. A bench that
    measures something else than runs, as `variance`, takes none."""
    minutes: float | None = None
    """Of the budget, where it counts minutes."""
    steps: int | None = None
    """Of the budget, where it counts steps; without, every configuration has its own."""
    data: str | None = None
    """Of a bench of pictures, those to take instead: as `vardistill teach` takes them, FILE.npz for example."""
    only: tuple[str, ...] | None = None
    """Run only cells whose names contain one of these; default: all."""
    report_only: bool = False
    """Run nothing: table what is there."""


def main(arguments: list[str]) -> int:
    """Run the bench, print its table, and say where its page is; 1 where a cell failed."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    name, rest = take_positional(arguments)
    if name is None:
        raise UsageError("bench needs a name before its flags; `vardistill bench` lists them")
    if name not in BENCHES:
        raise unknown("bench", name, BENCHES)
    bench = BENCHES[name]
    parsed = parse(Arguments, rest, f"bench {name}", bench.about)
    return run(bench, parsed, parsed.out or Path("bench") / name)


def run(bench: Bench, parsed: Arguments, out: Path) -> int:
    """The bench in the folder `out`, its results told to the user; returns the exit code."""
    from vardistill.bench.results import print_results
    from vardistill.bench.running import report, run_bench

    if parsed.only == ():
        raise UsageError("--only needs a word of the names of cells, VarFlow for example")
    if parsed.report_only:
        results = report(bench, out)
    else:
        try:
            limit, only = budget(bench, parsed), parsed.only or ()
            results = run_bench(bench, out, parsed.seeds, limit, parsed.jobs, parsed.threads, only, parsed.data)
        except KeyboardInterrupt:
            print("vardistill: interrupted; the same command goes on where this stopped", file=sys.stderr)
            return 130
    print_results(results)
    print(f"report: {out / 'report.html'}")
    if results.failures:
        names = ", ".join(failure.name for failure in results.failures)
        print(f"vardistill: {len(results.failures)} of the bench's cells failed: {names}", file=sys.stderr)
    return int(bool(results.failures))


def budget(bench: Bench, parsed: Arguments) -> Budget:
    """The bench's budget with the user's changes; raises UsageError where these do not fit it or each other."""
    if bench.measure and (parsed.budget, parsed.steps, parsed.minutes) != (None, None, None):
        raise UsageError(
            f"{bench.name} trains nothing that a budget could limit: leave out --budget, --steps, --minutes"
        )
    kind = parsed.budget or bench.budget.kind
    given, other = (parsed.steps, parsed.minutes) if kind == "steps" else (parsed.minutes, parsed.steps)
    unit = "steps" if kind == "steps" else "minutes"
    if other is not None:
        other_way = "--budget wall or --budget cpu" if kind == "steps" else "--budget steps"
        raise UsageError(f"the budget '{kind}' counts {unit}: give --{unit}, or choose {other_way}")
    if given is None and kind == bench.budget.kind:
        return bench.budget
    return Budget(kind, given)
