"""Steps per second of four presets, of this tree and of others, in turns: `python benchmarks/speed.py [OTHER/src ...]`.

OTHER is a checkout of another commit, whose `src` the processes import instead; the trees take turns, so that what else
slows the machine slows all. Steps are counted over processor time of training alone, after a first quarter that is
left out. The teacher of the pictures is fitted once, to `runs/digits-teacher`, and read as a diffusers pipeline.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from measured import HERE, write_results

TEACHER = HERE / "runs" / "digits-teacher"

PRESETS = {
    "mog40-vardiu": ("mog40-vardiu",),
    "mog40-varflow": ("mog40-varflow",),
    "mog40-diff-instruct": ("mog40-diff-instruct",),
    "digits-diff-instruct": ("images-diff-instruct", "--teacher", str(TEACHER / "pipeline"), "--data", "digits"),
}
"""Preset and flags."""

QUIET = ("--tracker", "none", "--eval-every", "0", "--eval-samples", "50", "--checkpoint-every", "1000000")


@dataclass(frozen=True)
class Arguments:
    """Steps per second."""

    others: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The src of other checkouts."""
    turns: int = 3
    steps: int = 200
    threads: int = 1


def main(arguments: Arguments) -> None:
    """Run, print, and write results/speed.json."""
    sources = {"this": HERE.parent / "src"} | {str(path): path for path in arguments.others}
    if not (TEACHER / "evaluation.json").exists():
        vardistill(sources["this"], arguments.threads, "teach", "digits", "--out", str(TEACHER))
    rows: dict[str, dict[str, list[float]]] = {}
    for preset, words in PRESETS.items():
        found: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(arguments.turns):
            for name, source in sources.items():
                found[name].append(steps_per_second(source, words, arguments))
        rows[preset] = found
        told = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in found.items())
        ratios = [
            f"{statistics.median(a / b for a, b in zip(found['this'], found[name], strict=True)):.3f}"
            for name in [*sources][1:]
        ]
        print(f"{preset}: {told} steps/s{f'; this / other {ratios}' if ratios else ''}", flush=True)
    write_results("speed", rows, arguments.threads, 1, steps=arguments.steps)


def steps_per_second(source: Path, words: tuple[str, ...], arguments: Arguments) -> float:
    """Of a run's last three quarters."""
    with tempfile.TemporaryDirectory() as folder:
        run, log_every = Path(folder) / "run", max(1, arguments.steps // 4)
        flags = ("--steps", str(arguments.steps), "--log-every", str(log_every), "--out", str(run), *QUIET)
        vardistill(source, arguments.threads, "train", *words, *flags)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["kind"] == "train"]
    return float((last["step"] - first["step"]) / (last["cpu_seconds"] - first["cpu_seconds"]))


def vardistill(source: Path, threads: int, *words: str) -> None:
    """Run a command of the package in `source`; ends this script where it fails."""
    environment = os.environ | {"PYTHONPATH": str(source.resolve()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "vardistill", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"speed: {' '.join(words)} of {source} failed: {done.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
