"""`vardistill sample RUN --num N --out FILE.npz|FILE.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError


@dataclass(frozen=True)
class Arguments:
    """Draw samples of a run's generator."""

    out: Path = Path("samples.npz")
    """Where to write: .npz (array `samples`) or .png (a picture)."""
    num: int = 10_000
    """Number of samples."""
    seed: int = 0
    """Fixes the samples."""


def main(arguments: list[str]) -> int:
    """Draw, write, and say where."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "sample RUN", "Draw samples of a run's generator.")
    if run is None:
        raise UsageError("sample needs a run folder before its flags: vardistill sample RUN")
    if parsed.out.suffix not in (".npz", ".png"):
        raise UsageError(f"samples are written as .npz or .png, but --out is {parsed.out}")

    import numpy as np

    from vardistill.build import build_problem
    from vardistill.experiments import load_run
    from vardistill.figures import samples_figure

    _, config, generator = load_run(Path(run))
    samples = generator.sample(parsed.num, seed=parsed.seed)
    try:
        if parsed.out.suffix == ".npz":
            np.savez_compressed(parsed.out, samples=samples.numpy())
        else:
            samples_figure(samples, build_problem(config.problem, config.levels.schedule)).savefig(parsed.out, dpi=120)
    except OSError as error:
        raise UsageError(f"cannot write {parsed.out}: {error.strerror}") from error
    print(f"{parsed.num} samples in {parsed.out}")
    return 0
