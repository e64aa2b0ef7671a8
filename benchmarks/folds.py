"""How much of a student's map is folded, by what it started from: `python benchmarks/folds.py`.

Of the runs of `vardistill bench start --out benchmarks/runs/start`. A map whose det ∂g/∂z has both signs turns part of
the plane over, and lays it on other parts. The share of z ~ N(0, I) whose determinant has the rarer sign is 0 for a map
without folds, 1/2 for one that is folded all over.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from measured import HERE, write_results
from torch.func import jacrev, vmap

from vardistill.students.perceptron import MLP
from vardistill.students.student import Student

SAMPLES = 5_000


def folded(generator: Student) -> float:
    """The share of z whose det ∂g/∂z has the rarer sign, in [0, ½]."""
    z = generator.latents(SAMPLES, torch.Generator().manual_seed(0))
    positive = (torch.linalg.det(vmap(jacrev(lambda v: generator(v[None])[0]))(z)) > 0).float().mean()
    return float(torch.minimum(positive, 1 - positive))


def main() -> None:
    """Measure every finished cell and write results/folds.json."""
    runs = HERE / "runs" / "start"
    if not (runs / "results.json").exists():
        sys.exit("folds: first run vardistill bench start --out benchmarks/runs/start")
    results = json.loads((runs / "results.json").read_text())
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for cell in results["cells"]:
        share = folded(MLP.from_pretrained(runs / cell["run"] / "generator"))
        rows[cell["objective"]].append({"seed": cell["seed"], "folded": round(share, 4)})
        print(f"{cell['objective']}, seed {cell['seed']}: {share:.3f}")
    settings = results["settings"]
    facts = {"budget": settings["budget"], "samples": SAMPLES}
    write_results("folds", rows, settings["threads"], settings["jobs"], results["environment"], **facts)


if __name__ == "__main__":
    main()
