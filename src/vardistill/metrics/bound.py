r"""How tight a bound on the diffusive KL is, for generators with few latents.

At a noise level with ratio r = σ_t/α_t, over x = g_θ(z), z ~ N(0, I_k), and x_t = α_t x + σ_t ε,

    DiKL_t = E[ log p_θ^t(x_t) − log p_d^t(x_t) ], DiU_t = E[ objective.bound ], gap_t = DiU_t − DiKL_t ≥ 0.

All three are means over the same draws, so the gap's own error is that of the paired differences. `diffusive_kl`
measures DiKL_t alone. The student's noisy density is an integral over the latents,

    p_θ^t(x_t) = ∫ p(z) N(x_t; α_t g_θ(z), σ_t² I) dz ≈ Σ_m w_m N(x_t; α_t g_θ(z_m), σ_t² I),

taken by the midpoint rule in u ∈ (0, 1)^k with z = 2 Φ⁻¹(u), so w_m ∝ p(z_m)/N(z_m; 0, 4 I). The stretch by
2 makes the integrand vanish at the ends of (0, 1) and puts nodes beyond |z| = 5. (Without it the weights
are equal, but the outermost of 256 cells reach from |z| = 2.7 to infinity, and their one node misses the
density there by many nats at small σ.) The rule is accurate while the α_t g_θ(z_m) of neighbouring nodes
lie within about σ_t; `quadrature_error` watches that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser, DensityDenoiser
from vardistill.diffusion.noise import Draw, Noise
from vardistill.diffusion.schedules import Schedule
from vardistill.errors import UsageError, require
from vardistill.objectives.base import Needs
from vardistill.students.student import Student

STRETCH = 2.0
"""z = STRETCH · Φ⁻¹(u)."""

LARGEST_LATENT = 3
"""Dimensions of z that the quadrature takes."""

LARGEST_GRID = 2**24
"""Nodes in all dimensions together."""

GRID_ROWS = 2**16
"""Nodes that the generator maps at once."""

ROWS, COLUMNS = 256, 512
"""Samples × nodes of a block."""

DEVICE_ROWS, DEVICE_COLUMNS = 2048, 4096
"""The same on accelerators, where a block has to keep all cores busy."""

SMALLEST_TERM = -80.0
"""Logarithm, relative to a block's largest term, that stands for all smaller ones."""


class BoundedObjective(Protocol):
    """What `bound_gap` needs of an objective."""

    teacher: Denoiser

    @property
    def needs(self) -> Needs:
        """The candidates that it takes."""
        ...

    def bound(self, draw: Draw) -> Tensor:
        """The integrand of DiU_t in nats, (R,)."""
        ...


@dataclass(frozen=True)
class BoundGap:
    """DiU, DiKL and their gap in nats, per noise level; all fields are (L,), float64.

    Attributes:
        ratio: r = σ_t/α_t.
        diu: the bound.
        dikl: the diffusive KL.
        gap: diu − dikl.
        diu_error: Monte-Carlo standard error of diu.
        dikl_error: Monte-Carlo standard error of dikl.
        gap_error: Monte-Carlo standard error of the gap.
        quadrature_error: |change of dikl| from half the nodes to all; the error that is left is smaller.
    """

    ratio: Tensor
    diu: Tensor
    dikl: Tensor
    gap: Tensor
    diu_error: Tensor
    dikl_error: Tensor
    gap_error: Tensor
    quadrature_error: Tensor


@torch.no_grad()
def bound_gap(
    objective: BoundedObjective,
    generator: Student,
    ratios: Iterable[float],
    rng: torch.Generator,
    n: int = 2048,
    nodes: int = 256,
    batches: int = 1,
) -> BoundGap:
    """Measure the bound, the diffusive KL and the gap at each of `ratios`.

    Args:
        objective: whose bound it is, and whose teacher has the density p_d^t. Where candidates are shared
            across the batch there are n − 1 of them.
        generator: g_θ, with one to three latent dimensions.
        ratios: noise-to-signal ratios σ_t/α_t, > 0.
        rng: draws z and ε.
        n: draws of a batch, at least 2.
        nodes: of the quadrature, per latent dimension, at least 2. Time is O(batches n nodes^k), memory O(nodes^k).
        batches: per level, at least 1, which share no candidates; the errors take all rows as independent.

    Raises:
        UsageError: for a teacher without a density, more than three latent dimensions, nodes^k above 2^24,
            ratios that are not positive, or too few n, nodes or batches.
    """
    require("batches", batches, batches >= 1, "at least 1")
    teacher = with_density(objective.teacher)
    ratio = checked_ratios(ratios, n, nodes)
    fine, coarse = Quadrature(generator, nodes, rng.device), Quadrature(generator, nodes // 2, rng.device)
    rows = []
    for r in ratio.tolist():
        draws = [draw_level(objective, generator, r, n, rng) for _ in range(batches)]
        diu = torch.cat([objective.bound(draw) for draw in draws]).double()
        noise = [(draw.x_t, draw.noise.t, draw.noise.alpha, draw.noise.sigma) for draw in draws]
        x_t, t, *scales = (torch.cat(parts) for parts in zip(*noise, strict=True))
        log_student = fine.log_density(x_t, *scales)
        dikl = log_student - teacher.log_prob(x_t, t).double()
        values = torch.stack([diu, dikl, diu - dikl, log_student - coarse.log_density(x_t, *scales)])
        means, errors = values.mean(1), values.std(1) / math.sqrt(n * batches)
        rows.append(torch.cat([means[:3], errors[:3], means[3:].abs()]).cpu())
    return BoundGap(ratio, *torch.stack(rows, 1))


@torch.no_grad()
def diffusive_kl(
    teacher: Denoiser,
    generator: Student,
    ratios: Iterable[float],
    rng: torch.Generator,
    n: int = 2048,
    nodes: int = 256,
) -> Tensor:
    """DiKL_t in nats at each of `ratios`, (L,) float64, whatever trained the generator; see `bound_gap`."""
    ratio, teacher = checked_ratios(ratios, n, nodes), with_density(teacher)
    student = Quadrature(generator, nodes, rng.device)
    values = []
    for r in ratio.tolist():
        x = generator(generator.latents(n, rng))
        noise = noise_level(teacher.schedule, r, x, rng)
        x_t = noise.x_t(x)
        log_ratio = student.log_density(x_t, noise.alpha, noise.sigma) - teacher.log_prob(x_t, noise.t).double()
        values.append(log_ratio.mean())
    return torch.stack(values).cpu()


def with_density(teacher: Denoiser) -> DensityDenoiser:
    """The teacher; raises UsageError for one without a density."""
    if not isinstance(teacher, DensityDenoiser):
        raise UsageError(f"the exact gap needs a teacher with log_prob, but {type(teacher).__name__} has none")
    return teacher


def checked_ratios(ratios: Iterable[float], n: int, nodes: int) -> Tensor:
    """The ratios, (L,) float64; raises UsageError for some that are not positive, or too few draws or nodes."""
    ratio = torch.tensor(list(ratios), dtype=torch.float64)
    if len(ratio) == 0 or not (ratio > 0).all() or not ratio.isfinite().all():
        raise UsageError(f"ratios must be positive and finite, at least one, but are {ratio.tolist()}")
    for name, number in (("n", n), ("nodes", nodes)):
        if number < 2:
            raise UsageError(f"{name} must be at least 2, but is {number}")
    return ratio


def noise_level(schedule: Schedule, ratio: float, x: Tensor, rng: torch.Generator) -> Noise:
    """One draw of noise at `ratio` for each of x (n, *data)."""
    t = schedule.time(torch.full((len(x),), ratio, dtype=torch.float64, device=x.device)).to(x.dtype)
    alpha, sigma = schedule(t)
    eps = torch.randn(x.shape, generator=rng, device=rng.device, dtype=x.dtype)
    return Noise(t, alpha, sigma, torch.ones_like(t), eps, latents=len(x))


def draw_level(objective: BoundedObjective, generator: Student, ratio: float, n: int, rng: torch.Generator) -> Draw:
    """Draw (z, ε) n times at one noise level, with the further latents that the objective asks for."""
    z = generator.latents(n, rng)
    x = generator(z)
    noise = noise_level(objective.teacher.schedule, ratio, x, rng)
    needs = objective.needs
    fresh = (needs.eta, *z.shape)
    eta = torch.randn(fresh, generator=rng, device=rng.device, dtype=z.dtype)
    pool = generator.latents(needs.pool, rng) if needs.pool else None
    return Draw(z, x, noise, generator, eta if needs.eta else None, pool)


class Quadrature:
    """The student as a mixture of points g_θ(z_m) with weights w_m, in float64.

    Args:
        generator: g_θ, with k ≤ 3 latent dimensions.
        nodes: per latent dimension.
        device: of the generator.

    Raises:
        UsageError: for more than three latent dimensions, or nodes^k above 2^24.
    """

    def __init__(self, generator: Student, nodes: int, device: torch.device) -> None:
        k = math.prod(generator.latent_shape)
        if k > LARGEST_LATENT:
            raise UsageError(f"the exact gap needs at most {LARGEST_LATENT} latent dimensions, but there are {k}")
        if nodes**k > LARGEST_GRID:
            raise UsageError(f"nodes^{k} must be at most {LARGEST_GRID}, but nodes is {nodes}")
        z, log_w = stretched_midpoints(nodes, device)
        grid = torch.cartesian_prod(*[z] * k).reshape(-1, *generator.latent_shape)
        log_w = torch.cartesian_prod(*[log_w] * k).reshape(len(grid), k).sum(1, keepdim=True)
        dtype = next(generator.parameters()).dtype
        x = torch.cat([generator(z.to(dtype)).flatten(1).double() for z in torch.split(grid, GRID_ROWS)])
        self.nodes = torch.cat([x, (x**2).sum(1, keepdim=True), log_w], 1)

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The student's log p_θ^t(x_t) in nats, (R,), for x_t (R, *data) and the scales (R,).

        Up to the term −‖x_t‖²/(2σ²), ln w_m − ‖x_t − α x_m‖²/(2σ²) is the inner product of (α x_t/σ²,
        −α²/(2σ²), 1) with the node (x_m, ‖x_m‖², ln w_m).
        """
        x_t, alpha, sigma = x_t.flatten(1).double(), alpha.double()[:, None], sigma.double()[:, None]
        log_sum, _ = self._sums(x_t, alpha, sigma, columns=0)
        log_normaliser = x_t.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi)).squeeze(1)
        return log_sum - 0.5 * (x_t / sigma).square().sum(1) - log_normaliser

    def score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """∇ log p_θ^t(x_t) = (α E[x | x_t] − x_t)/σ², (R, d), the expectation over the nodes."""
        x_t, alpha, sigma = x_t.flatten(1).double(), alpha.double()[:, None], sigma.double()[:, None]
        _, mean = self._sums(x_t, alpha, sigma, columns=x_t.shape[1])
        return (alpha * mean - x_t) / sigma**2

    def _sums(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """The logarithm of Σ_m exp⟨row, node_m⟩ for every row, (R,), and so weighted the mean of x_m's `columns`."""
        rows = torch.cat([alpha / sigma**2 * x_t, -0.5 * (alpha / sigma) ** 2, torch.ones_like(sigma)], 1)
        size = ROWS if rows.device.type == "cpu" else DEVICE_ROWS
        parts = [self._block_sums(part, columns) for part in torch.split(rows, size)]
        return torch.cat([log_sum for log_sum, _ in parts]), torch.cat([mean for _, mean in parts])

    def _block_sums(self, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        logs, means = [], []
        for nodes in torch.split(self.nodes, COLUMNS if rows.device.type == "cpu" else DEVICE_COLUMNS):
            terms = rows @ nodes.T
            largest = terms.amax(1)
            relative = terms.sub_(largest[:, None]).clamp_(min=SMALLEST_TERM).exp_()
            total = relative.sum(1)
            logs.append(largest + total.log())
            means.append(relative @ nodes[:, :columns] / total[:, None])
        stacked = torch.stack(logs)
        return stacked.logsumexp(0), (stacked.softmax(0)[..., None] * torch.stack(means)).sum(0)


def stretched_midpoints(nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """z_m = 2 Φ⁻¹((m + ½)/nodes) and log w_m, w_m ∝ N(z_m; 0, 1)/N(z_m; 0, 4); both (nodes,), float64."""
    u = (torch.arange(nodes, dtype=torch.float64, device=device) + 0.5) / nodes
    e = torch.special.ndtri(u)
    z = STRETCH * e
    return z, (0.5 * (e**2 - z**2)).log_softmax(0)
