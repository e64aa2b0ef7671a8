r"""Density and coverage (Naeem et al. 2020, arXiv 2002.09797).

Balls B_i around the truth's n points reach to their k-th nearest neighbours in it, as in `precision_recall`. With m
samples y_j (eqs. 4 and 5 there)

    density = 1/(km) Σ_j Σ_i 1[y_j ∈ B_i],   coverage = 1/n Σ_i 1[some y_j ∈ B_i].

Density counts the balls around a sample where precision asks for one, so that a single outlier of the truth with its
wide ball does not make samples precise; it may exceed 1. Coverage has the truth's balls where recall has the samples',
so that outliers among the samples do not cover the truth. Samples of the truth itself have a mean density of 1 and, for
n = m, a coverage of 1 − (n − 1)/(2n − 1) ⋯ (n − k)/(2n − k), which is close to 1 − 2^−k.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vardistill.metrics.manifolds import manifold_metrics


class DensityCoverage(NamedTuple):
    """Both grow as samples get better.

    Attributes:
        density: truth's balls around a sample, over k; at least 0, about 1 for samples of the truth.
        coverage: of the truth, the share with a sample in its ball, in [0, 1].
    """

    density: float
    coverage: float


def density_coverage(samples: Tensor, truth: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage of the samples.

    Args:
        samples: (m, *data).
        truth: (n, *data).
        k: neighbour that a ball reaches, 1 ≤ k < min(n, m).

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    metrics = manifold_metrics(samples, truth, k)
    return DensityCoverage(metrics.density, metrics.coverage)
