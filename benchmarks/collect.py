"""Keeps what `vardistill bench NAME --out benchmarks/runs/NAME` measured as `results/bench-NAME.json`."""

from __future__ import annotations

import json

from measured import HERE


def main() -> None:
    """Copy the results of every bench below `runs/`, rounded to six digits."""
    for path in sorted((HERE / "runs").glob("*/results.json")):
        results = json.loads(path.read_text(), parse_float=lambda digits: float(f"{float(digits):.6g}"))
        kept = HERE / "results" / f"bench-{path.parent.name}.json"
        kept.write_text(json.dumps(results, separators=(",", ":")).replace('{"objective"', '\n{"objective"') + "\n")
        print(f"{kept.name}: {len(results['cells'])} cells, {len(results['missing'])} missing")


if __name__ == "__main__":
    main()
