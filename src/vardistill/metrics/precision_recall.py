r"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

The manifold of a set Φ is the union of the balls around its points that reach to their k-th nearest neighbours in
Φ (eq. 1 there),

    f(φ, Φ) = 1 if ‖φ − φ′‖ ≤ ‖φ′ − NN_k(φ′, Φ)‖ for some φ′ ∈ Φ, else 0,
    precision = mean over φ ∈ samples of f(φ, truth),   recall = mean over φ ∈ truth of f(φ, samples).

Precision falls with samples that are unlike the truth, recall with truth that the samples leave out. Balls shrink as
sets grow, so both depend on n and m: compare values of equal sizes alone. `manifolds` has the distances.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vardistill.metrics.manifolds import manifold_metrics


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: of the samples, those within the truth's manifold.
        recall: of the truth, that within the samples' manifold.
    """

    precision: float
    recall: float


def precision_recall(samples: Tensor, truth: Tensor, k: int = 5) -> PrecisionRecall:
    """Precision and recall of the samples.

    Args:
        samples: (n, *data).
        truth: (m, *data).
        k: neighbour that a ball reaches, 1 ≤ k < min(n, m).

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    metrics = manifold_metrics(samples, truth, k)
    return PrecisionRecall(metrics.precision, metrics.recall)
