"""The table of metrics of a set of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vardistill.domains.points.problems import Problem
from vardistill.errors import UsageError
from vardistill.metrics.density import log_density
from vardistill.metrics.energy_distance import energy_distance
from vardistill.metrics.mmd import log_or_minus_infinity, mmd_statistics
from vardistill.metrics.modes import mode_statistics
from vardistill.metrics.precision_recall import precision_recall

PERMUTATIONS = 200
"""Of the two-sample test: p-values are multiples of 1/201."""

Table = dict[str, float | int]
"""Metrics by name."""


def evaluate(samples: Tensor, problem: Problem, rng: torch.Generator, p_value: bool = True) -> Table:
    """Compare samples with as many fresh ones of the target, and with its density, modes and held-out data.

    Args:
        samples: (n, *data) of a student.
        problem: the target.
        rng: draws the target's samples and the test's relabellings.
        p_value: whether to run the permutation test, the slower half of the work.

    Returns:
        `log_density` and `log_density_gap` (nats) where the target has a density; `log_mmd` (biased),
        `mmd2_unbiased`, `mmd_p_value` (if asked for), `energy_distance`; `modes_found`, `mode_tv`, `off_mode` where
        it has modes; `energy_distance_held_out`, `precision`, `recall` where it has held-out data.

    Raises:
        UsageError: for samples that are fewer than 2 (6 with held-out data), not finite or not of the problem's
            shape.
    """
    if not isinstance(rng, torch.Generator):
        raise UsageError(f"rng must be a generator, torch.Generator().manual_seed(0), but is {rng!r}")
    shape = tuple(samples.shape[1:])
    if shape != problem.data_shape:
        raise UsageError(f"samples of {problem.name} have shape {problem.data_shape}, but these have {shape}")
    density = against_density(samples, problem)
    truth = problem.sample(len(samples), rng).to(samples)
    mmd = mmd_statistics(samples, truth, problem.bandwidths, permutations=PERMUTATIONS if p_value else 0, rng=rng)
    return {
        **density,
        "log_mmd": log_or_minus_infinity(mmd.biased),
        "mmd2_unbiased": mmd.unbiased,
        **({"mmd_p_value": mmd.p_value} if p_value else {}),
        "energy_distance": energy_distance(samples, truth),
        **against_modes(samples, problem),
        **against_held_out(samples, problem),
    }


def against_density(samples: Tensor, problem: Problem) -> Table:
    """The mean log-density and its gap; nothing without a density."""
    if problem.denoiser is None or problem.reference.log_density is None:
        return {}
    density = log_density(samples, problem.denoiser)
    return {"log_density": density, "log_density_gap": density - problem.reference.log_density}


def against_modes(samples: Tensor, problem: Problem) -> Table:
    """How samples spread over the modes; nothing without modes."""
    if problem.modes is None:
        return {}
    return mode_statistics(samples, problem.modes.means, problem.modes.std, problem.modes.weights)._asdict()


def against_held_out(samples: Tensor, problem: Problem) -> Table:
    """Energy distance, precision and recall against the m held-out points; nothing without them.

    Precision and recall depend on the sets' sizes: they are means over the disjoint sets of m samples, or of one
    smaller set where there are fewer.
    """
    if problem.held_out is None:
        return {}
    held_out = problem.held_out.to(samples)
    sets = [part for part in samples.split(len(held_out)) if len(part) == len(held_out)] or [samples]
    precision, recall = torch.tensor([precision_recall(part, held_out) for part in sets]).double().mean(0).tolist()
    distance = energy_distance(samples, held_out)
    return {"energy_distance_held_out": distance, "precision": precision, "recall": recall}
