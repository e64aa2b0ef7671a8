"""Named targets with samples, an exact density and an exact teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vardistill.denoisers import GaussianMixture
from vardistill.schedules import Schedule


@dataclass(frozen=True)
class Reference:
    """What a perfect student scores: mean and standard deviation over evaluations of `samples` true samples.

    Attributes:
        log_density: E log p_d(x), nats.
        log_density_std: of a mean over `samples`.
        log_mmd: the floor, against as many other true samples.
        log_mmd_std: of one such comparison.
        samples: number of samples.
    """

    log_density: float
    log_density_std: float
    log_mmd: float
    log_mmd_std: float
    samples: int


class Problem:
    """A mixture of isotropic Gaussians as a target.

    Args:
        means: (K, d) of the modes.
        std: of every mode, > 0.
        weights: (K,) of the modes; default equal.
        schedule: of the teacher; default VE.

    Attributes:
        name: in `PROBLEMS`.
        reference: what a perfect student scores.
        denoiser: the exact teacher.
        std: of every mode.
        data_shape: (d,).
        data_std: root mean square over the coordinates of their standard deviations.
    """

    name: ClassVar[str]
    reference: ClassVar[Reference]

    def __init__(
        self, means: Tensor, std: float, weights: Tensor | None = None, schedule: Schedule | None = None
    ) -> None:
        self.denoiser = GaussianMixture(means, std=std, weights=weights, schedule=schedule)
        self.std = std
        self.data_shape = (means.shape[1],)
        weights = self.denoiser.weights[:, None]
        spread = weights * (means - (weights * means).sum(0)) ** 2
        self.data_std = float((spread.sum(0) + std**2).mean().sqrt())

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, *data) samples of the target."""
        return self.denoiser.sample(n, rng)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density log p_d(x) in nats, (B,)."""
        return self.denoiser.log_prob(x)
