"""Models of somebody's own against their own samplers: `python benchmarks/own_models.py`.

The four of `tests/own_models`: each is trained once, as its script says, and distilled by the README's lines for every
seed; points also with noise levels that end at the least level of a teacher that knows its density.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from measured import HERE, write_results

sys.path.insert(0, str(HERE.parent / "tests" / "own_models"))
import digits
import edm
import moons
import rings
import somebody

from vardistill.training.defaults import LEAST_LEVEL, default_levels

POINTS = {"moons, ε": moons, "two rings, v": rings, "spiral, EDM": edm}


@dataclass(frozen=True)
class Arguments:
    """Distil the four models."""

    seeds: int = 3
    teacher_steps: int = 6000
    steps: int = 6000
    picture_teacher_steps: int = 1500
    picture_steps: int = 400
    only: tuple[str, ...] = ()
    """Models whose names contain one of these; default: all."""


def main(arguments: Arguments) -> None:
    """Distil, print, and write results/own_models.json after every model."""
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name in (*POINTS, "digits, diffusers"):
        if not arguments.only or any(word in name for word in arguments.only):
            for row, found in (points(name, arguments) if name in POINTS else pictures(arguments)).items():
                rows[f"{name}{row}"] = found
            write_results("own_models", rows, 1, 1, steps=arguments.steps, picture_steps=arguments.picture_steps)


def points(name: str, arguments: Arguments) -> dict[str, list[dict[str, float]]]:
    """At the default levels, and at the least."""
    teacher = POINTS[name].build(arguments.teacher_steps)
    found: dict[str, list[dict[str, float]]] = {"": [], ", levels to 0.05": []}
    for seed in range(arguments.seeds):
        std = float(somebody.own_samples(teacher, 1000, seed).var(0).mean().sqrt())
        least = default_levels(teacher, std, 2, least=LEAST_LEVEL)
        for (row, figures), levels in zip(found.items(), (None, least), strict=True):
            measured = somebody.distil(teacher, arguments.steps, seed, levels)
            figures.append(vars(measured) | {"seed": seed})
            print(f"{name}{row}, seed {seed}: {measured}", flush=True)
    return found


def pictures(arguments: Arguments) -> dict[str, list[dict[str, float]]]:
    """The diffusers U-Net."""
    folder = digits.build(arguments.picture_teacher_steps, Path(HERE / "runs" / "own_models" / "digits"))
    found = []
    for seed in range(arguments.seeds):
        measured = digits.distil(folder, arguments.picture_steps, seed)
        found.append(vars(measured) | {"seed": seed})
        print(f"digits, seed {seed}: {measured}", flush=True)
    return {"": found}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
