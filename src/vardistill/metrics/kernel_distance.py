r"""Kernel distance of features (Bińkowski et al. 2018, arXiv 1801.01401, who call it KID).

    MMD²(p, q) = E k(x, x′) + E k(y, y′) − 2 E k(x, y),   k(x, y) = (xᵀy/d + 1)³

compares the first three moments of the two. It is estimated by U-statistics, over all pairs and not over subsets: the
pairs i = j are left out of the first two means, so that, unlike the Fréchet distance, it is unbiased at every sample
size and may be a little below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.pairwise import sample_matrix

ROWS = 2**10
"""Samples whose kernel with a whole set is computed at once."""


@torch.no_grad()
def kernel_distance(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of MMD², computed in float64.

    Args:
        x: (n, *data) samples.
        y: (m, *data) samples. Time is O((n + m)² d), memory O((n + m) d).

    Raises:
        UsageError: for samples that are fewer than 2, not finite or of different shape.
    """
    if x.shape[1:] != y.shape[1:]:
        raise UsageError(f"x and y must have the same data shape, but are {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = sample_matrix(x, "x").double(), sample_matrix(y, "y").double().to(x.device)
    across = _kernel_sum(a, b) / (len(a) * len(b))
    return float(_mean_within(a) + _mean_within(b) - 2 * across)


def _mean_within(x: Tensor) -> Tensor:
    """The mean kernel of two different samples."""
    own = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(rows @ y.T, x.shape[1]).sum() for rows in x.split(ROWS)]).sum()


def _kernel(product: Tensor, d: int) -> Tensor:
    return (product / d + 1) ** 3
