r"""Gaussian mixtures, whose noisy marginals are mixtures again: everything is exact.

    p(x)      = Σ_k π_k N(x; μ_k, Σ_k)
    p_t(x_t)  = Σ_k π_k N(x_t; α μ_k, C_k),   C_k = α² Σ_k + σ² I
    E[x|x_t]  = Σ_k γ_k(x_t) [μ_k + α Σ_k C_k⁻¹ (x_t − α μ_k)],   γ_k = responsibility of component k.

Components are visited in blocks with a running log-sum-exp, so 10⁵ components against 10³ queries fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vardistill.diffusion.schedules import VE, Schedule, expand
from vardistill.errors import UsageError

BLOCK_ENTRIES = 2**22
"""Entries of the largest (queries × components × ...) temporary."""


CACHED_ENTRIES = 2**17
"""Entries of a block of weights: half a megabyte in single precision."""

DEVICE_ENTRIES = 2**24
"""The same on accelerators, where a block has to keep all cores busy."""

SMALLEST_LOG_WEIGHT = -80.0
"""Weights below e⁻⁸⁰ of the largest are set to it: they are rounding errors, and slow as denormal numbers."""


class GaussianMixture(nn.Module):
    """The exact denoiser and density of a Gaussian mixture in d dimensions.

    Args:
        means: (K, d) component means.
        std: standard deviation of isotropic components, a number or (K,); 0 makes them points.
        covariances: (K, d, d) full covariances, positive definite; instead of `std`.
        weights: (K,) positive component weights, normalised here; default equal.
        schedule: of the noisy marginals.

    Raises:
        UsageError: for empty or non-finite means, or for not exactly one of `std` and `covariances`.
    """

    means: Tensor
    log_weights: Tensor
    cumulative: Tensor

    def __init__(
        self,
        means: Tensor,
        std: float | Tensor | None = None,
        covariances: Tensor | None = None,
        weights: Tensor | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if means.ndim != 2 or means.numel() == 0:
            raise UsageError(f"means must be a non-empty (K, d) tensor, but have shape {tuple(means.shape)}")
        if not means.isfinite().all():
            raise UsageError("means must be finite, but hold NaN or infinity")
        if (std is None) == (covariances is None):
            raise UsageError("give either std (isotropic components) or covariances (full), not both and not neither")
        self.schedule: Schedule = VE() if schedule is None else schedule
        weights = torch.ones_like(means[:, 0]) if weights is None else weights.to(means)
        if weights.shape != means.shape[:1] or not (weights > 0).all():
            raise UsageError(f"weights must be {len(means)} positive numbers, one per component")
        self.register_buffer("means", means)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("cumulative", (weights.double() / weights.double().sum()).cumsum(0), persistent=False)
        self.components: Isotropic | Full = (
            Isotropic(torch.as_tensor(std, dtype=means.dtype, device=means.device).reshape(-1), len(means))
            if covariances is None
            else Full(covariances.to(means), *means.shape)
        )

    @property
    def std(self) -> Tensor | None:
        """(K,) standard deviations of isotropic components; None for full covariances."""
        return self.components.std.expand(len(self.means)) if isinstance(self.components, Isotropic) else None

    @property
    def weights(self) -> Tensor:
        """(K,) component weights; they sum to 1."""
        return self.log_weights.exp()

    def log_prob(self, x_t: Tensor, t: Tensor | None = None, **condition: Tensor) -> Tensor:
        """log p_t(x_t) in nats, (B,); without t the log-density of the clean mixture."""
        alpha, sigma = self._scales(x_t, t)
        normaliser = None
        for log_joint, _ in self._blocks(x_t, alpha, sigma):
            block = log_joint.logsumexp(1)
            normaliser = block if normaliser is None else torch.logaddexp(normaliser, block)
        assert normaliser is not None
        return normaliser

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t] for x_t (B, d) and t (B,), shape of x_t."""
        alpha, sigma = self._scales(x_t, t)
        normaliser: Tensor | None = None
        mean = torch.zeros_like(x_t)
        for log_joint, part in self._blocks(x_t, alpha, sigma):
            block = log_joint.logsumexp(1)
            total = block if normaliser is None else torch.logaddexp(normaliser, block)
            responsibilities = (log_joint - total[:, None]).exp()
            block_mean = self.components.posterior_mean(responsibilities, x_t, self.means[part], alpha, sigma, part)
            mean = block_mean if normaliser is None else mean * (normaliser - total).exp()[:, None] + block_mean
            normaliser = total
        return mean

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, d) samples of the clean mixture, on its device; `rng` may be on another."""
        device = self.means.device
        u = torch.rand(n, generator=rng, device=rng.device, dtype=self.cumulative.dtype).to(device)
        k = torch.searchsorted(self.cumulative, u, right=True).clamp_(max=len(self.means) - 1)
        eps = torch.randn(n, self.means.shape[1], generator=rng, device=rng.device, dtype=self.means.dtype).to(device)
        return self.means[k] + self.components.colour(eps, k)

    def _scales(self, x_t: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        if x_t.ndim != 2 or x_t.shape[1] != self.means.shape[1]:
            raise UsageError(f"x_t must be (B, {self.means.shape[1]}), but is {tuple(x_t.shape)}")
        if t is None:
            if self.std is not None and (self.std == 0).any():
                raise UsageError("points (std 0) have no density without noise: give a time t")
            return torch.ones_like(x_t[:, 0]), torch.zeros_like(x_t[:, 0])
        return self.schedule(t)

    def _blocks(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """log π_k N(x_t; α μ_k, C_k), (B, block), and the block's slice of the components."""
        size = max(1, BLOCK_ENTRIES // (len(x_t) * self.components.entries_per_pair))
        for start in range(0, len(self.means), size):
            part = slice(start, start + size)
            log_likelihood = self.components.log_likelihood(x_t, self.means[part], alpha, sigma, part)
            yield self.log_weights[part] + log_likelihood, part


class Isotropic(nn.Module):
    """Components N(μ_k, s_k² I)."""

    std: Tensor
    entries_per_pair = 1

    def __init__(self, std: Tensor, components: int) -> None:
        super().__init__()
        if len(std) not in (1, components) or not (std >= 0).all():
            raise UsageError(f"std must be one number or {components}, none negative, but is {std.tolist()[:8]}")
        self.register_buffer("std", std)

    def log_likelihood(self, x_t: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor, part: slice) -> Tensor:
        """log N(x_t; α μ_k, (α² s_k² + σ²) I), (B, K)."""
        variance = self._variance(alpha, sigma, part)
        distance2 = squared_distances(x_t, means, alpha)
        return -0.5 * (distance2 / variance + x_t.shape[1] * (2 * math.pi * variance).log())

    def posterior_mean(
        self, responsibilities: Tensor, x_t: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor, part: slice
    ) -> Tensor:
        """Σ_k γ_k [μ_k + (α s_k²/C_k)(x_t − α μ_k)], (B, d)."""
        gain = expand(alpha, responsibilities) * self._std(part) ** 2 / self._variance(alpha, sigma, part)
        to_means = responsibilities * (1 - expand(alpha, responsibilities) * gain)
        return to_means @ means + (responsibilities * gain).sum(1, keepdim=True) * x_t

    def colour(self, eps: Tensor, k: Tensor) -> Tensor:
        """s_k ε."""
        return (self.std if len(self.std) == 1 else self.std[k])[:, None] * eps

    def _std(self, part: slice) -> Tensor:
        return self.std if len(self.std) == 1 else self.std[part]

    def _variance(self, alpha: Tensor, sigma: Tensor, part: slice) -> Tensor:
        """C_k = α² s_k² + σ², (B, K), or (B, 1) where all components share it."""
        return alpha[:, None] ** 2 * self._std(part) ** 2 + sigma[:, None] ** 2


class Full(nn.Module):
    """Components N(μ_k, Σ_k), Σ_k = U_k diag(λ_k) U_kᵀ: C_k has the same eigenvectors at every noise level."""

    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, covariances: Tensor, components: int, dimension: int) -> None:
        super().__init__()
        shape = (components, dimension, dimension)
        if covariances.shape != shape or not torch.allclose(covariances, covariances.mT):
            raise UsageError(f"covariances must be symmetric and {shape}, but are {tuple(covariances.shape)}")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        if not (eigenvalues > 0).all():
            raise UsageError("covariances must be positive definite, but one has an eigenvalue that is not positive")
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("eigenvectors", eigenvectors)
        self.entries_per_pair = covariances.shape[1]

    def log_likelihood(self, x_t: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor, part: slice) -> Tensor:
        """log N(x_t; α μ_k, C_k), (B, K)."""
        projected, variance = self._project(x_t, means, alpha, sigma, part)
        return -0.5 * (projected**2 / variance + (2 * math.pi * variance).log()).sum(-1)

    def posterior_mean(
        self, responsibilities: Tensor, x_t: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor, part: slice
    ) -> Tensor:
        """Σ_k γ_k [μ_k + α U_k (λ_k/C_k) U_kᵀ (x_t − α μ_k)], (B, d)."""
        projected, variance = self._project(x_t, means, alpha, sigma, part)
        shrunk = alpha[:, None, None] * self.eigenvalues[part] / variance * projected
        moved = torch.einsum("bk,kij,bkj->bi", responsibilities, self.eigenvectors[part], shrunk)
        return responsibilities @ means + moved

    def colour(self, eps: Tensor, k: Tensor) -> Tensor:
        """U_k λ_k^½ ε."""
        return torch.einsum("nij,nj->ni", self.eigenvectors[k], self.eigenvalues[k].sqrt() * eps)

    def _project(self, x_t: Tensor, means: Tensor, alpha: Tensor, sigma: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """U_kᵀ(x_t − α μ_k) and the eigenvalues of C_k, both (B, K, d)."""
        vectors = self.eigenvectors[part]
        means_projected = torch.einsum("kij,ki->kj", vectors, means)
        projected = torch.einsum("kij,bi->bkj", vectors, x_t) - alpha[:, None, None] * means_projected
        return projected, alpha[:, None, None] ** 2 * self.eigenvalues[part] + sigma[:, None, None] ** 2


class Empirical(GaussianMixture):
    """The exact denoiser of a data set: E[x | x_t] is a softmax average of the data.

    At ratio r the noisy marginal is the kernel density of the data with bandwidth r (times α).

    Args:
        data: (n, d) data points.
        bandwidth: standard deviation of a Gaussian put on every point; 0 for the points themselves.
        schedule: of the noisy marginals.

    Raises:
        UsageError: for empty or non-finite data, or a negative bandwidth.
    """

    def __init__(self, data: Tensor, bandwidth: float = 0.0, schedule: Schedule | None = None) -> None:
        check_data(data)
        if not 0 <= bandwidth < math.inf:
            raise UsageError(f"bandwidth must be 0 or positive, but is {bandwidth:g}")
        super().__init__(data, std=bandwidth, schedule=schedule)
        self.bandwidth = bandwidth

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t] for x_t (B, d) and t (B,), shape of x_t: faster than the mixture's, the same to rounding."""
        alpha, sigma = self._scales(x_t, t)
        variance = (alpha * self.bandwidth) ** 2 + sigma**2
        _, average = mixture_of_points(x_t, self.means, alpha, variance.sqrt())
        gain = alpha * self.bandwidth**2 / variance
        return average + gain[:, None] * (x_t - alpha[:, None] * average)


def mixture_of_points(x_t: Tensor, points: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_k exp(ℓ_k), (R,), and the softmax average of the points, (R, d), for ℓ_k = −‖x_t − α x_k‖²/2σ².

    Blocks of rows fit a processor's cache, or fill an accelerator; one product gives the ℓ_k as −p‖x‖² + 2p⟨x, x_k⟩ −
    p‖x_k‖², with x = x_t/α and p = α²/2σ², and one numerator and denominator. Where the expanded square would lose more
    than a fiftieth (its error is the machine's precision times p‖x‖²), up to three dimensions take plain differences.
    """
    centre = points.mean(0)
    x, p = x_t / alpha[:, None] - centre, (0.5 * (alpha / sigma) ** 2)[:, None]
    centred = points - centre
    ones = torch.ones_like(points[:, :1])
    rows = torch.cat([2 * p * x, -p, -p * (x**2).sum(1, keepdim=True)], dim=1)
    columns = torch.cat([centred, (centred**2).sum(1, keepdim=True), ones], dim=1).T.contiguous()
    weighted = torch.cat([points, ones], dim=1)
    on_cpu = x_t.device.type == "cpu"  # elsewhere reading the size of the error would wait for the device
    cancels = not on_cpu or float((p * x**2).sum(1).max()) * torch.finfo(x.dtype).eps > 2e-2
    direct = cancels and x.shape[1] <= 3
    log_sum, averages = torch.empty_like(sigma), torch.empty_like(x_t)
    size = max(8, (CACHED_ENTRIES if on_cpu else DEVICE_ENTRIES) // len(points))
    for start in range(0, len(x_t), size):
        block = slice(start, start + size)
        if direct:
            log_w = squared_distances(x[block], centred, torch.ones_like(x[block, 0])).mul_(-p[block])
        else:
            log_w = rows[block] @ columns
        largest = log_w.amax(1, keepdim=True)
        w = log_w.sub_(largest).clamp_min_(SMALLEST_LOG_WEIGHT).exp_()
        sums = w @ weighted
        averages[block] = sums[:, :-1] / sums[:, -1:]
        log_sum[block] = sums[:, -1].log() + largest.squeeze(1)
    return log_sum, averages


def check_data(data: Tensor) -> None:
    """Raise UsageError for data without entries or with NaN or infinity."""
    if data.numel() == 0:
        raise UsageError(f"the data are empty: shape {tuple(data.shape)}")
    if not data.isfinite().all():
        raise UsageError(f"the data hold NaN or infinity in {int((~data.isfinite()).sum())} of {data.numel()} entries")


def squared_distances(x: Tensor, points: Tensor, alpha: Tensor) -> Tensor:
    """‖x − α x_k‖², (B, K), for x (B, d), points (K, d) and alpha (B,), without a (B, K, d) tensor.

    In one to three dimensions the differences are squared directly, which keeps their precision; above, the
    square is expanded about the mean of `points`.
    """
    if x.shape[1] <= 3:
        distance2 = x.new_zeros(len(x), len(points))
        for i in range(x.shape[1]):
            difference = x[:, i, None] - alpha[:, None] * points[:, i]
            distance2 = torch.addcmul(distance2, difference, difference)
        return distance2
    centre = points.mean(0)
    x, points = x - alpha[:, None] * centre, points - centre
    cross = (alpha[:, None] * x) @ points.T
    squares = (x**2).sum(1, keepdim=True) + (alpha[:, None] ** 2) * (points**2).sum(1)
    return (squares - 2 * cross).clamp_min(0)
