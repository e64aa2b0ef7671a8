"""Keeps what `vardistill bench NAME --out benchmarks/runs/NAME` measured as `results/bench-NAME.json`.

Of benches of pictures with the metrics of their teachers' first step: a student before any training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measured import HERE

from vardistill.domains.pictures.config import PicturesConfig
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain


def main() -> None:
    """Copy the results of every bench below `runs/`, rounded to six digits."""
    for path in sorted((HERE / "runs").glob("*/results.json")):
        results = json.loads(path.read_text())
        for name, evaluation in results.get("teachers", {}).items():
            if (folder := path.parent / "teachers" / name / "pipeline").is_dir():
                evaluation["1 step"] = first_step(folder.parent, evaluation["18 steps"]["samples"])
        results = json.loads(json.dumps(results), parse_float=lambda digits: float(f"{float(digits):.6g}"))
        kept = HERE / "results" / f"bench-{path.parent.name}.json"
        kept.write_text(json.dumps(results, separators=(",", ":")).replace('{"objective"', '\n{"objective"') + "\n")
        print(f"{kept.name}: {len(results['cells'])} cells, {len(results['missing'])} missing")


def first_step(teacher: Path, n: int) -> dict[str, Any]:
    """Metrics of n pictures of the untrained student."""
    domain = build_domain(Config(PicturesConfig(str(teacher))))
    domain.load(None)
    return domain.evaluate(domain.student.eval(), n, 1)


if __name__ == "__main__":
    main()
