r"""Balls around the points of two sets, and what of each is in the other's: four metrics of one set of distances.

The ball of a point of Φ reaches to its k-th nearest neighbour in Φ, of squared radius ρ² = ‖φ − NN_k(φ, Φ)‖².
`precision_recall` and `density_coverage` say what is counted; the distances within the samples, within the truth and
between the two are computed once for all four.

Squared distances are products of matrices in double precision, about the mean of the truth. Their rounding errors stay
below δ (‖x‖² + ‖y‖²), by which two points of different sets count as nearer: so a point is in every ball that ends
at it, and copies in those of no radius. Distances are those of the data themselves, not of a network's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.pairwise import sample_matrix

ROWS = 2**10
"""Points whose distances to a whole set are computed at once."""

ROUNDING = 2.0**-44
"""δ."""


class ManifoldMetrics(NamedTuple):
    """How two sets cover each other.

    Attributes:
        precision: of the samples, those within some ball of the truth, in [0, 1].
        recall: of the truth, that within some ball of the samples, in [0, 1].
        density: truth's balls around a sample, over k; at least 0, about 1 for samples of the truth.
        coverage: of the truth, the share with a sample in its ball, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def manifold_metrics(samples: Tensor, truth: Tensor, k: int = 5) -> ManifoldMetrics:
    """Precision, recall, density and coverage of the samples.

    Args:
        samples: (m, *data).
        truth: (n, *data).
        k: neighbour that a ball reaches, 1 ≤ k < min(n, m).

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    y, x = comparable(samples, truth, k)
    of_samples, of_truth = squared_radii(y, k), squared_radii(x, k)
    precise, balls, start = 0, 0, 0
    recalled, covered = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for _ in range(2))
    for distance2 in squared_distances(y, x, 1 - ROUNDING):
        in_truth = distance2 <= of_truth
        in_samples = distance2 <= of_samples[start : start + len(distance2), None]
        precise, balls = precise + int(in_truth.any(1).sum()), balls + int(in_truth.sum())
        recalled, covered = recalled | in_samples.any(0), covered | in_truth.any(0)
        start += len(distance2)
    return ManifoldMetrics(
        precision=precise / len(y),
        recall=float(recalled.double().mean()),
        density=balls / (k * len(y)),
        coverage=float(covered.double().mean()),
    )


def comparable(samples: Tensor, truth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Samples and truth as matrices (m, d) and (n, d) of double precision, about the truth's mean.

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    if samples.shape[1:] != truth.shape[1:]:
        shapes = f"{tuple(samples.shape)} and {tuple(truth.shape)}"
        raise UsageError(f"samples and truth must have the same data shape, but are {shapes}")
    y, x = (sample_matrix(v, name).to(samples.device).double() for v, name in ((samples, "samples"), (truth, "truth")))
    if not 1 <= k < min(len(y), len(x)):
        raise UsageError(f"k must be at least 1 and less than both sets' sizes, {len(y)} and {len(x)}, but is {k}")
    centre = x.mean(0)
    return y - centre, x - centre


def squared_radii(points: Tensor, k: int) -> Tensor:
    """ρ² (n,), squared distances of points (n, d) to their k-th nearest neighbours among the others."""
    radii, start = [], 0
    for distance2 in squared_distances(points, points):
        distance2.diagonal(start).fill_(torch.inf)
        radii.append(distance2.topk(k, largest=False).values.amax(1))  # kthvalue takes ten times as long
        start += len(distance2)
    return torch.cat(radii).clamp_min_(0)


def squared_distances(x: Tensor, y: Tensor, share: float = 1.0) -> Iterator[Tensor]:
    """share (‖x_i‖² + ‖y_j‖²) − 2⟨x_i, y_j⟩, (rows, m) at a time."""
    x2, y2 = (share * v.square().sum(1, keepdim=True) for v in (x, y))
    left = torch.cat([-2 * x, x2, torch.ones_like(x2)], 1)
    right = torch.cat([y, torch.ones_like(y2), y2], 1).T.contiguous()
    return (rows @ right for rows in left.split(ROWS))
