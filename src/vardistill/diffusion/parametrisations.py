r"""What networks predict, and how it becomes E[x | x_t].

With x_t = α x + σ ε, each prediction stands for a conditional mean given x_t:

    x          E[x | x_t]
    epsilon    E[ε | x_t] = (x_t − α x)/σ
    v          α ε − σ x               (Salimans & Ho 2022, arXiv 2202.00512)
    velocity   ε − x                   (rectified flow, dx_t/dt)
    score      −ε/σ = ∇ log p_t(x_t)

All are affine in x given x_t; `to_x` and `from_x` are inverse to each other. An error of x is so an error of the
prediction, times a factor of the level alone, whose square is `unit_weight`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vardistill.errors import unknown

Conversion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(prediction or x, x_t, α, σ) → x or prediction; α and σ broadcast against x_t."""

_TO_X: dict[str, Conversion] = {
    "x": lambda x, x_t, alpha, sigma: x,
    "epsilon": lambda eps, x_t, alpha, sigma: (x_t - sigma * eps) / alpha,
    "v": lambda v, x_t, alpha, sigma: (alpha * x_t - sigma * v) / (alpha**2 + sigma**2),
    "velocity": lambda u, x_t, alpha, sigma: (x_t - sigma * u) / (alpha + sigma),
    "score": lambda s, x_t, alpha, sigma: (x_t + sigma**2 * s) / alpha,
}

_FROM_EPSILON_AND_X: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "x": lambda eps, x, alpha, sigma: x,
    "epsilon": lambda eps, x, alpha, sigma: eps,
    "v": lambda eps, x, alpha, sigma: alpha * eps - sigma * x,
    "velocity": lambda eps, x, alpha, sigma: eps - x,
    "score": lambda eps, x, alpha, sigma: -eps / sigma,
}

_UNIT_WEIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x": lambda alpha, sigma: torch.ones_like(sigma),
    "epsilon": lambda alpha, sigma: (alpha / sigma) ** 2,
    "v": lambda alpha, sigma: ((alpha**2 + sigma**2) / sigma) ** 2,
    "velocity": lambda alpha, sigma: ((alpha + sigma) / sigma) ** 2,
    "score": lambda alpha, sigma: (alpha / sigma) ** 2,
}

PREDICTIONS = tuple(_TO_X)


def to_x(predicts: str) -> Conversion:
    """The map (prediction, x_t, α, σ) → E[x | x_t]; raises UsageError for an unknown prediction."""
    if predicts not in _TO_X:
        raise unknown("prediction", predicts, PREDICTIONS)
    return _TO_X[predicts]


def from_x(predicts: str) -> Conversion:
    """The map (E[x | x_t], x_t, α, σ) → prediction; raises UsageError for an unknown prediction."""
    if predicts not in _FROM_EPSILON_AND_X:
        raise unknown("prediction", predicts, PREDICTIONS)
    convert = _FROM_EPSILON_AND_X[predicts]
    return lambda x, x_t, alpha, sigma: convert((x_t - alpha * x) / sigma, x, alpha, sigma)


def unit_weight(predicts: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The w(α, σ) with w ‖D − x‖² = the squared error of the prediction; raises UsageError for an unknown prediction.

    Of a score it is that of σ s, which is −ε: the error of s itself would leave all levels but the lowest unseen.
    """
    if predicts not in _UNIT_WEIGHT:
        raise unknown("prediction", predicts, PREDICTIONS)
    return _UNIT_WEIGHT[predicts]
