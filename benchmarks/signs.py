"""Whether runs that lost modes are told so: `python benchmarks/signs.py`.

Of the samples that the finished cells of three benches left: how far their diversity falls short of the target's, as
the sign `mode-loss` measures it, but of the averaged student. A run has lost modes where its mode TV is 0.2 or more, or
on digits its recall below ½.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measured import HERE, write_results
from torch import Tensor

from vardistill.diffusion.levels import EDM
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.diffusion.schedules import SCHEDULES, VE
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.objectives.diagnostics import diversities
from vardistill.runs.config import Config
from vardistill.training import config_files
from vardistill.training.warning_signs import WINDOW

BENCHES = ("mog40-3min", "start", "dimension")
SAMPLES = 512
"""A step's, as the sign sees them."""


def shortfall(samples: Tensor, problem: Problem) -> float:
    """The median over as many draws as the rule takes lines, in nats."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for x in samples[: WINDOW * SAMPLES].split(SAMPLES):
        noise = NoiseLevels(VE(), EDM()).draw(x.shape[1:], SAMPLES, 0.0, rng)
        draw = Draw(x, x, noise, lambda z: z, real=problem.sample(SAMPLES, rng).view_as(x))
        values = diversities(draw, None, 1.0, rng)
        found.append(float(values["diversity_target"] - values["diversity"]))
    return median(found)


def main() -> None:
    """Measure every finished cell and write results/signs.json."""
    rows: dict[str, list[dict[str, float | str | bool]]] = {}
    for bench in BENCHES:
        folder = HERE / "runs" / bench
        if not (folder / "results.json").exists():
            sys.exit(f"signs: first run the bench that makes {folder.relative_to(HERE)}")
        cells = json.loads((folder / "results.json").read_text())["cells"]
        rows[bench] = [measured(folder / cell["run"]) for cell in cells if (folder / cell["run"]).exists()]
    write_results("signs", rows, 1, 1, samples=SAMPLES)


def measured(path: Path) -> dict[str, float | str | bool]:
    """A run's shortfall, and whether it has lost modes."""
    config: Config = config_files.read(Config, path / "config.yaml")
    table = json.loads((path / "evaluation.json").read_text())
    lost = table["recall"] < 0.5 if "recall" in table else table["mode_tv"] >= 0.2
    samples = torch.from_numpy(np.load(path / "samples.npz")["samples"])
    domain: Any = config.domain
    short = shortfall(samples, PROBLEMS[domain.problem](SCHEDULES[domain.schedule]()))
    print(f"{path.name}: {short:.3f}{', lost modes' if lost else ''}")
    return {"run": path.name, "shortfall": round(short, 4), "lost": bool(lost)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
