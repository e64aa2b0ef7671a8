r"""Fréchet distance between Gaussians fitted to two samples (Dowson & Landau 1982, J. Multivar. Anal. 12, 450–455).

    FD = ‖μ₁ − μ₂‖² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^{1/2}

is the squared 2-Wasserstein distance of N(μ₁, C₁) and N(μ₂, C₂); of a network's features it is what Heusel et al. 2017
(arXiv 1706.08500, eq. 6) call FID. With any roots C_i = R_iᵀR_i the last trace is the sum of the singular values of
R₁R₂ᵀ: no root of a matrix is taken, and covariances without full rank need no care. R_i is the triangle of the QR
decomposition of the centred sample over √(n − 1), which is never squared.

The fitted moments' noise adds to FD, about as 1/n + 1/m: compare values of equal sizes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.pairwise import sample_matrix


class Moments(NamedTuple):
    """Mean and covariance of a sample, in float64.

    Attributes:
        mean: μ (d,).
        root: R (min(n, d), d), with RᵀR the covariance, of n − 1 degrees of freedom.
    """

    mean: Tensor
    root: Tensor


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """The moments of x (n, *data).

    Raises:
        UsageError: for samples that are fewer than 2 or not finite.
    """
    v = sample_matrix(x, "samples").double()
    mean = v.mean(0)
    return Moments(mean, torch.linalg.qr((v - mean) / (len(v) - 1) ** 0.5, mode="r").R)


@torch.no_grad()
def gaussian_distance(a: Moments, b: Moments) -> float:
    """FD of two Gaussians, in units of the data squared.

    Raises:
        UsageError: for moments of different dimension.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"moments must have the same dimension, but have {len(a.mean)} and {len(b.mean)}")
    overlap = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return float(distance.clamp_min(0))  # which keeps NaN, as Python's max does not


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FD of x (n, *data) and y (m, *data), in units of the data squared; computed in float64.

    Raises:
        UsageError: for samples that are fewer than 2, not finite or of different shape.
    """
    if x.shape[1:] != y.shape[1:]:
        raise UsageError(f"x and y must have the same data shape, but are {tuple(x.shape)} and {tuple(y.shape)}")
    return gaussian_distance(moments(x), moments(y))
