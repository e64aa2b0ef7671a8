"""`vardistill demo`: the shortest way to a measured one-step generator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vardistill.cli.arguments import parse
from vardistill.cli.train import run_folder, train
from vardistill.runs.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Distil the 40-mode Gaussian mixture with VarDiU."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/demo-NUMBER."""
    seed: int = 0
    """Fixes initial weights and all draws."""


def main(arguments: list[str]) -> int:
    """Train the preset `mog40-vardiu-demo` and print its table."""
    parsed = parse(Arguments, arguments, "demo", "Distil the 40-mode Gaussian mixture with VarDiU.")
    config = PRESETS["mog40-vardiu-demo"].config
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=parsed.seed))
    with run_folder(parsed.out, "demo") as out:
        return train(config, out)
