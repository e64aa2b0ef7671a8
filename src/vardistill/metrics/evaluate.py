"""The table of metrics of a set of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.density import log_density
from vardistill.metrics.energy_distance import energy_distance
from vardistill.metrics.mmd import log_or_minus_infinity, mmd_statistics
from vardistill.metrics.modes import mode_statistics
from vardistill.problems import Problem

PERMUTATIONS = 200
"""Of the two-sample test: p-values are multiples of 1/201."""


def evaluate(samples: Tensor, problem: Problem, rng: torch.Generator, p_value: bool = True) -> dict[str, float | int]:
    """Compare samples with as many fresh ones of the target.

    Args:
        samples: (n, *data) of a student.
        problem: the target.
        rng: draws the target's samples and the test's relabellings.
        p_value: whether to run the permutation test, the slower half of the work.

    Returns:
        `log_density` and `log_density_gap` (nats), `log_mmd` (biased), `mmd2_unbiased`, `mmd_p_value` (if
        asked for), `energy_distance`, `modes_found`, `mode_tv`, `off_mode`.

    Raises:
        UsageError: for samples that are fewer than 2, not finite or not of the problem's shape.
    """
    shape = tuple(samples.shape[1:])
    if shape != problem.data_shape:
        raise UsageError(f"samples of {problem.name} have shape {problem.data_shape}, but these have {shape}")
    density = log_density(samples, problem)
    truth = problem.sample(len(samples), rng).to(samples)
    mmd = mmd_statistics(samples, truth, permutations=PERMUTATIONS if p_value else 0, rng=rng)
    modes = mode_statistics(samples, problem.denoiser.means, problem.std, problem.denoiser.weights)
    return {
        "log_density": density,
        "log_density_gap": density - problem.reference.log_density,
        "log_mmd": log_or_minus_infinity(mmd.biased),
        "mmd2_unbiased": mmd.unbiased,
        **({"mmd_p_value": mmd.p_value} if p_value else {}),
        "energy_distance": energy_distance(samples, truth),
        **modes._asdict(),
    }
