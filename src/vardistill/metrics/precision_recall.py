r"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

The manifold of a set Φ is the union of the balls around its points that reach to their k-th nearest neighbours in
Φ (eq. 1 there),

    f(φ, Φ) = 1 if ‖φ − φ′‖ ≤ ‖φ′ − NN_k(φ′, Φ)‖ for some φ′ ∈ Φ, else 0,
    precision = mean over φ ∈ samples of f(φ, truth),   recall = mean over φ ∈ truth of f(φ, samples).

Precision falls with samples that are unlike the truth, recall with truth that the samples leave out. Balls shrink as
sets grow, so both depend on n and m: compare values of equal sizes alone. Distances are those of the data themselves,
not of a network's features; they are computed in blocks, as differences, so that both directions of a pair agree.
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


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        precision: of the samples, those within the truth's manifold.
        recall: of the truth, that within the samples' manifold.
    """

    precision: float
    recall: float


@torch.no_grad()
def precision_recall(samples: Tensor, truth: Tensor, k: int = 5) -> PrecisionRecall:
    """Precision and recall of the samples.

    Args:
        samples: (n, *data).
        truth: (m, *data).
        k: neighbour that a ball reaches, 1 ≤ k < min(n, m).

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    x, y = comparable(samples, truth, k)
    return PrecisionRecall(precision=_share_within(x, y, k), recall=_share_within(y, x, k))


def comparable(samples: Tensor, truth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Samples and truth as matrices (n, d) and (m, d).

    Raises:
        UsageError: for k out of range, or samples that are not finite or of different shape.
    """
    if samples.shape[1:] != truth.shape[1:]:
        shapes = f"{tuple(samples.shape)} and {tuple(truth.shape)}"
        raise UsageError(f"samples and truth must have the same data shape, but are {shapes}")
    dtype = torch.promote_types(samples.dtype, torch.float32)
    x, y = (sample_matrix(v, name).to(samples.device, dtype) for v, name in ((samples, "samples"), (truth, "truth")))
    if not 1 <= k < min(len(x), len(y)):
        raise UsageError(f"k must be at least 1 and less than both sets' sizes, {len(x)} and {len(y)}, but is {k}")
    return x, y


def radii(points: Tensor, k: int) -> Tensor:
    """Distances (n,) of points (n, d) to their k-th nearest neighbours among them."""
    return torch.cat([rows.kthvalue(k + 1).values for rows in distances(points, points)])  # itself is the first


def distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """‖x_i − y_j‖, (rows, m) at a time."""
    for rows in torch.split(x, ROWS):
        yield torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")


def _share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    """The share of the points that are within the manifold."""
    radius = radii(manifold, k)
    within = torch.cat([(rows <= radius).any(1) for rows in distances(points, manifold)])
    return float(within.double().mean())
