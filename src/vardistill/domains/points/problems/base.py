"""What a target is: samples always; an exact teacher, modes or held-out data where it has them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import Schedule


@dataclass(frozen=True)
class HeldOutReference:
    """What a perfect student scores against held-out data: see `metrics.evaluate`.

    Attributes:
        energy_distance: the mean, which is not 0 because the training set is not the held-out one.
        energy_distance_std: its standard deviation.
        precision: the mean.
        precision_std: its standard deviation.
        recall: the mean.
        recall_std: its standard deviation.
    """

    energy_distance: float
    energy_distance_std: float
    precision: float
    precision_std: float
    recall: float
    recall_std: float


@dataclass(frozen=True)
class ModeReference:
    """How a perfect student spreads over the modes: see `metrics.modes`.

    Attributes:
        mode_tv: the mean, which is not 0 as the modes' shares are of a finite sample.
        mode_tv_std: its standard deviation.
        off_mode: the mean.
        off_mode_std: its standard deviation.
    """

    mode_tv: float
    mode_tv_std: float
    off_mode: float
    off_mode_std: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a perfect student scores: means and standard deviations over evaluations of `samples` true samples.

    Attributes:
        log_mmd: the floor, against as many other true samples.
        log_mmd_std: of one such comparison.
        energy_distance_std: of one such comparison, whose mean is 0.
        log_density: E log p_d(x), nats; None without a density.
        log_density_std: of a mean over `samples`.
        modes: over the modes, where there are any.
        held_out: against the held-out data, where there are any.
        samples: number of samples.
    """

    log_mmd: float
    log_mmd_std: float
    energy_distance_std: float
    log_density: float | None = None
    log_density_std: float = 0.0
    modes: ModeReference | None = None
    held_out: HeldOutReference | None = None
    samples: int = 10_000


@dataclass(frozen=True)
class Modes:
    """Isotropic modes N(μ_k, s² I) of weights π_k.

    Attributes:
        means: (K, d) μ_k.
        std: s > 0.
        weights: (K,) π_k, which sum to 1.
    """

    means: Tensor
    std: float
    weights: Tensor

    def __len__(self) -> int:
        return len(self.means)


class Problem(ABC):
    """A target.

    Attributes:
        name: in `PROBLEMS`.
        data_shape: (d,).
        data_mean: (d,) the mean.
        data_std: root mean square over the coordinates of their standard deviations.
        bandwidths: of the MMD, in units of the data, octaves.
        reference: what a perfect student scores.
        denoiser: the exact teacher and, without a time, the exact density; None where there are data alone.
        modes: the modes that samples are counted in; None where there are none.
        data: (n, d) the training set, where the target is known by data alone.
        held_out: (m, d) data that training never sees.
        image_shape: rows and columns, where a point is a picture of values in [−1, 1].
    """

    name: str
    data_shape: tuple[int]
    data_mean: Tensor
    data_std: float
    bandwidths: tuple[float, ...]
    reference: Reference
    denoiser: GaussianMixture | None = None
    modes: Modes | None = None
    data: Tensor | None = None
    held_out: Tensor | None = None
    image_shape: tuple[int, int] | None = None

    @abstractmethod
    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, d) samples of the target."""


class MixtureProblem(Problem):
    """A mixture of equal isotropic Gaussians as a target: everything is exact.

    Args:
        means: (K, d) of the components.
        std: of every component, > 0.
        weights: (K,) of the components; default equal.
        schedule: of the teacher; default VE.

    Attributes:
        denoiser: the exact teacher and density.
        std: of every component.
        modes: the components.
    """

    denoiser: GaussianMixture

    def __init__(
        self, means: Tensor, std: float, weights: Tensor | None = None, schedule: Schedule | None = None
    ) -> None:
        self.denoiser = GaussianMixture(means, std=std, weights=weights, schedule=schedule)
        self.std = std
        self.modes = Modes(means, std, self.denoiser.weights)
        self.data_shape = (means.shape[1],)
        weights = self.denoiser.weights[:, None]
        self.data_mean = (weights * means).sum(0)
        spread = weights * (means - self.data_mean) ** 2
        self.data_std = float((spread.sum(0) + std**2).mean().sqrt())

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, d) samples of the target."""
        return self.denoiser.sample(n, rng)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density log p_d(x) in nats, (B,)."""
        return self.denoiser.log_prob(x)
