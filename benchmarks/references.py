"""What true samples score on every problem: `python benchmarks/references.py [NAME ...] [--repeats 400] [--seed 0]`.

The density's values are integrals by the trapezoid rule in the plane, and those of modes that do not overlap above it.
Floors are measured on `repeats` comparisons of 2,000 true samples with 2,000 others: at p = q the laws of n MMD² and of
n times the energy distance depend on n by O(1/n) alone, so the values are given for 10,000. The modes' are measured on
`repeats` sets of 10,000, and those against held-out data on a quarter as many.

Prints each value, its standard error and the constant in the code, and exits with 1 where they differ by more than 4.5
standard errors of their difference, the constant having been measured by this script, too.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass

import torch

from vardistill.domains.points.problems import PROBLEMS, MixtureProblem, Problem
from vardistill.metrics import energy_distance, log_mmd, mode_statistics
from vardistill.metrics.evaluate import against_held_out

N = 2_000
"""Samples of a floor's comparison."""

TOLERANCE = 4.5

ROUNDING = 2e-5
"""Relative, of the constants that are exact."""


@dataclass(frozen=True)
class Measured:
    """A value, its standard error (0 where it is exact) and the constant in the code."""

    value: float
    error: float
    constant: float

    @property
    def agrees(self) -> bool:
        """Within the error of a difference of two such measurements, or rounding."""
        return abs(self.value - self.constant) <= max(
            TOLERANCE * math.sqrt(2) * self.error, ROUNDING * abs(self.value), 1e-6
        )


def density_moments(problem: MixtureProblem) -> tuple[float, float]:
    """E log p_d and the standard deviation of log p_d, in nats."""
    (d,) = problem.data_shape
    mixture = copy.deepcopy(problem.denoiser).double()
    if d > 2:
        return -math.log(len(mixture.means)) - 0.5 * d * math.log(2 * math.pi * math.e * problem.std**2), (d / 2) ** 0.5
    h, margin = 0.2 * problem.std, 10 * problem.std
    low, high = mixture.means.amin(0) - margin, mixture.means.amax(0) + margin
    axes = [torch.arange(a, b, h, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    log_p = torch.cat([mixture.log_prob(points) for points in torch.cartesian_prod(*axes).split(10_000)])
    mass = log_p.exp() * h**2
    mean = float((mass * log_p).sum())
    return mean, math.sqrt(float((mass * log_p**2).sum()) - mean**2)


def density(problem: MixtureProblem) -> dict[str, Measured]:
    """The rows of the density."""
    mean, std = density_moments(problem)
    r = problem.reference
    assert r.log_density is not None
    return {
        "log_density": Measured(mean, 0.0, r.log_density),
        "log_density_std": Measured(std / math.sqrt(r.samples), 0.0, r.log_density_std),
    }


def floors(problem: Problem, repeats: int, rng: torch.Generator) -> dict[str, Measured]:
    """The rows of the comparisons with other true samples."""
    mmd, energy = [], []
    for _ in range(repeats):
        x, y = problem.sample(N, rng), problem.sample(N, rng)
        mmd.append(log_mmd(x, y, problem.bandwidths))
        energy.append(energy_distance(x, y))
    r = problem.reference
    scale = N / r.samples
    log_mmd_mean, log_mmd_std = mean_and_std([v + math.log(scale) for v in mmd])
    _, energy_std = mean_and_std([v * scale for v in energy])
    return {
        "log_mmd": Measured(*log_mmd_mean, r.log_mmd),
        "log_mmd_std": Measured(*log_mmd_std, r.log_mmd_std),
        "energy_distance_std": Measured(*energy_std, r.energy_distance_std),
    }


def modes(problem: Problem, repeats: int, seed: int) -> dict[str, Measured]:
    """The rows of the modes, whose samples do not depend on the other rows."""
    m, r, rng = problem.modes, problem.reference, torch.Generator().manual_seed(seed)
    assert m is not None
    assert r.modes is not None
    draws = [mode_statistics(problem.sample(r.samples, rng), m.means, m.std, m.weights) for _ in range(repeats)]
    rows = {}
    for name in ("mode_tv", "off_mode"):
        mean, std = mean_and_std([getattr(draw, name) for draw in draws])
        rows[name] = Measured(*mean, getattr(r.modes, name))
        rows[f"{name}_std"] = Measured(*std, getattr(r.modes, f"{name}_std"))
    return rows


def held_out(problem: Problem, repeats: int, rng: torch.Generator) -> dict[str, Measured]:
    """The rows of the comparisons with held-out data."""
    r = problem.reference
    assert r.held_out is not None
    tables = [against_held_out(problem.sample(r.samples, rng), problem) for _ in range(repeats)]
    rows = {}
    for name, constant in (("energy_distance", "energy_distance_held_out"), ("precision",) * 2, ("recall",) * 2):
        mean, std = mean_and_std([table[constant] for table in tables])
        rows[constant] = Measured(*mean, getattr(r.held_out, name))
        rows[f"{constant}_std"] = Measured(*std, getattr(r.held_out, f"{name}_std"))
    return rows


def mean_and_std(values: list[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The mean and the standard deviation, each with its standard error; the latter's from the fourth moment."""
    v = torch.tensor(values, dtype=torch.float64)
    std, n = float(v.std()), len(v)
    kurtosis = float(((v - v.mean()) ** 4).mean()) / std**4
    return (float(v.mean()), std / math.sqrt(n)), (std, std * math.sqrt((kurtosis - 1) / (4 * n)))


def main() -> int:
    """Measure and compare; 1 where a constant is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all of {', '.join(PROBLEMS)}")
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    agree = True
    for name in arguments.names or PROBLEMS:
        problem, rng = PROBLEMS[name](), torch.Generator().manual_seed(arguments.seed)
        rows = density(problem) if isinstance(problem, MixtureProblem) else {}
        rows |= floors(problem, arguments.repeats, rng)
        rows |= modes(problem, arguments.repeats, arguments.seed) if problem.modes is not None else {}
        rows |= held_out(problem, arguments.repeats // 4, rng) if problem.held_out is not None else {}
        for row, v in rows.items():
            print(f"{name:<12}{row:<30}{v.value:>13.6f} ± {v.error:.6f}   in the code {v.constant:>13.6f}"
                  f"{'' if v.agrees else '   DIFFERS'}", flush=True)  # fmt: skip
        agree &= all(v.agrees for v in rows.values())
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
