r"""What a critic's error does to the gradient of the diffusive KL, for generators with few latents.

At a noise level, over x_t = α_t g_θ(z) + σ_t ε, with the student's exact noisy score s_θ by quadrature (`bound`),

    critic_error  = √(E‖s_ψ − s_θ‖² / E‖s_θ‖²)
    G             = E (s_θ − s_T)ᵀ α_t ∂g_θ/∂θ, the gradient of DiKL_t
    B             = E (s_ψ − s_θ)ᵀ α_t ∂g_θ/∂θ, what the critic adds to it
    gradient_bias = √(Σ ‖B‖² / Σ ‖G‖²), summed over the levels

The squared norm of a mean is estimated from the gradients g_i of M independent chunks of the draws by the U-statistic

    ‖E g‖² ≈ Σ_{i≠j} g_i·g_j / M(M − 1),

which is unbiased, so noise does not count as bias, and negative at times where E g is small. Its standard error is the
jackknife's over chunks, too large rather than too small (Efron & Stein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser, score
from vardistill.errors import UsageError
from vardistill.metrics.bound import Quadrature, checked_ratios, noise_level
from vardistill.students.student import Student

CHUNKS = 16
"""M, of each level's draws."""

CLEARLY_POSITIVE = 2.0
"""Standard errors that Σ ‖G‖² has to be from 0 for a ratio to it to mean something."""


class CriticObjective(Protocol):
    """What `critic_bias` needs of an objective."""

    teacher: Denoiser

    @property
    def critic(self) -> Denoiser:
        """D_ψ."""
        ...


@dataclass(frozen=True)
class CriticBias:
    """A critic's error and the bias that it causes, per noise level; fields are (L,) but for the last, all float64.

    Attributes:
        ratio: r = σ_t/α_t.
        critic_error: relative error of the critic's score.
        bias_norm2: unbiased estimate of ‖B‖²; may be negative.
        gradient_norm2: the same of ‖G‖².
        bias_error: standard error of bias_norm2.
        gradient_error: that of gradient_norm2.
        gradient_bias: √(Σ ‖B‖² / Σ ‖G‖²) over the levels, (): large where the student has converged and G is small,
            0 for a negative numerator, NaN unless the denominator is above two of its standard errors.
    """

    ratio: Tensor
    critic_error: Tensor
    bias_norm2: Tensor
    gradient_norm2: Tensor
    bias_error: Tensor
    gradient_error: Tensor
    gradient_bias: Tensor


def critic_bias(
    objective: CriticObjective,
    generator: Student,
    ratios: Iterable[float],
    rng: torch.Generator,
    n: int = 2048,
    nodes: int = 256,
) -> CriticBias:
    """Measure a critic at each of `ratios`.

    Args:
        objective: with the critic and the teacher.
        generator: g_θ, with one to three latent dimensions.
        ratios: noise-to-signal ratios σ_t/α_t, > 0.
        rng: draws z and ε.
        n: draws per level, at least 16; a multiple of 16 of them is used.
        nodes: of the quadrature, per latent dimension, at least 2.

    Raises:
        UsageError: for more than three latent dimensions, ratios that are not positive, or too few n or nodes.
    """
    ratio = checked_ratios(ratios, n, nodes)
    if n < CHUNKS:
        raise UsageError(f"n must be at least {CHUNKS}, but is {n}")
    with torch.no_grad():
        student = Quadrature(generator, nodes, rng.device)
    levels = [_at_level(objective, generator, student, r, n // CHUNKS, rng) for r in ratio.tolist()]
    errors, products = (torch.stack(values).double().cpu() for values in zip(*levels, strict=True))
    (bias, gradient), (bias_error, gradient_error) = squared_norm(products.transpose(0, 1))
    total, total_error = squared_norm(products.sum(0))
    clear = total[1] > CLEARLY_POSITIVE * total_error[1]
    relative = (total[0].clamp_min(0) / total[1]).sqrt().where(clear, math.nan)
    return CriticBias(ratio, errors, bias, gradient, bias_error, gradient_error, relative)


def squared_norm(products: Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased ‖E g‖² and its jackknife standard error, each (...), from g_i·g_j (..., M, M) of M > 2 chunks."""
    m = products.shape[-1]
    of_each = products.sum(-1) - products.diagonal(dim1=-2, dim2=-1)
    total = of_each.sum(-1)
    without = (total[..., None] - 2 * of_each) / ((m - 1) * (m - 2))
    return total / (m * (m - 1)), (m - 1) / math.sqrt(m) * without.std(-1)


def _at_level(
    objective: CriticObjective, generator: Student, student: Quadrature, ratio: float, rows: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The critic's error, and the products of the chunks' B and of their G, (2, M, M)."""
    errors, gradients = [], []
    for _ in range(CHUNKS):
        with torch.enable_grad():
            x = generator(generator.latents(rows, rng))
        with torch.no_grad():
            noise = noise_level(objective.teacher.schedule, ratio, x, rng)
            x_t = noise.x_t(x)
            exact = student.score(x_t, noise.alpha, noise.sigma).to(x).view_as(x)
            own = score(objective.critic, x_t, noise.t)
            wanted = exact - score(objective.teacher, x_t, noise.t)
        errors.append(torch.stack([(own - exact).pow(2).mean(), exact.pow(2).mean()]))
        cotangents = [noise.alpha[0] * g / rows for g in (own - exact, wanted)]
        gradients.append(torch.stack([_gradient(generator, x, g) for g in cotangents]))
    error, of_student = torch.stack(errors).sum(0)
    chunks = torch.stack(gradients, 1).double()
    return (error / of_student).sqrt(), chunks @ chunks.mT


def _gradient(generator: Student, x: Tensor, cotangent: Tensor) -> Tensor:
    """cotangentᵀ ∂x/∂θ, flat."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        x, parameters, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in gradients])
