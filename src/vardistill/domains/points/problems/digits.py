r"""The 8×8 digits of scikit-learn (the test set of Alpaydin & Kaynak's Optical Recognition of Handwritten Digits).

1,797 pictures as points of R⁶⁴, their values 0..16 scaled to [−1, 1]. A fixed permutation splits them into 1,500 of
training, whose empirical distribution is the target, and 297 held out. There is no density: teachers are empirical
(`denoisers.Empirical` of the training set; a bandwidth of 0.15 blurs a tenth of a grey value's range) or learned.

A perfect student draws training pictures. `benchmarks/references.py` (seed 0) measures what it scores: the floors on
400 comparisons, log-MMD with a standard error of 0.005, and precision, recall and the standard deviation of the energy
distance to the held-out pictures on 100 sets of 10,000, with standard errors of 0.0002, 0.0002 and 0.00005. The mean
of the latter is exact: below 0, as the held-out pictures happen to be a little closer to the training set's than two
of their own are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vardistill.diffusion.schedules import Schedule
from vardistill.domains.points.problems.base import HeldOutReference, Problem, Reference
from vardistill.errors import UsageError

TRAINING = 1500
"""Pictures of the training set."""


class Digits(Problem):
    """Handwritten digits of 8×8 pixels.

    Args:
        schedule: for the call's sake; without an exact teacher nothing depends on it.

    Raises:
        UsageError: without scikit-learn.
    """

    name = "digits"
    data_shape = (64,)
    image_shape = (8, 8)
    bandwidths = (0.5, 1.0, 2.0, 4.0, 8.0)
    reference = Reference(
        log_mmd=-8.769, log_mmd_std=0.092, energy_distance_std=0.00028,
        held_out=HeldOutReference(
            energy_distance=-0.001457, energy_distance_std=0.00087,
            precision=0.9776, precision_std=0.0016, recall=0.9627, recall_std=0.0024,
        ),
    )  # fmt: skip
    data: Tensor
    held_out: Tensor

    def __init__(self, schedule: Schedule | None = None) -> None:
        training, held_out = split()
        self.data, self.held_out = pictures()[training], pictures()[held_out]
        self.data_mean = self.data.mean(0)
        self.data_std = float(self.data.var(0, correction=0).mean().sqrt())

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, 64) pictures of the training set, with replacement."""
        return self.data.to(rng.device)[torch.randint(len(self.data), (n,), generator=rng, device=rng.device)]


@cache
def pictures() -> Tensor:
    """All pictures, (1797, 64) in [−1, 1].

    Raises:
        UsageError: without scikit-learn.
    """
    return torch.from_numpy(_load("data") / 8 - 1).float()


@cache
def labels() -> Tensor:
    """The digit 0..9 that each picture shows, (1797,) int64.

    Raises:
        UsageError: without scikit-learn.
    """
    return torch.from_numpy(_load("target")).long()


def split() -> tuple[Tensor, Tensor]:
    """The indices of the training set (1500,) and of the held-out set (297,)."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(1797))  # its stream never changes
    return order[:TRAINING], order[TRAINING:]


def _load(key: str) -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the digits come with scikit-learn: pip install 'vardistill[digits]'") from error
    return load_digits()[key]
