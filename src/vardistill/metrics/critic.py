r"""What a critic's error does to the gradient of the diffusive KL, for generators with few latents.

At a noise level, over x_t = α_t g_θ(z) + σ_t ε, with the student's exact noisy score s_θ by quadrature (`bound`),

    critic_error  = √(E‖s_ψ − s_θ‖² / E‖s_θ‖²)
    G             = E (s_θ − s_T)ᵀ α_t ∂g_θ/∂θ, the gradient of DiKL_t
    B             = E (s_ψ − s_θ)ᵀ α_t ∂g_θ/∂θ, what the critic adds to it
    gradient_bias = ‖B‖ / ‖G‖

The squared norms are inner products of two independent halves of the draws, without which noise would count as bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vardistill.denoisers import Denoiser, score
from vardistill.generators import Generator
from vardistill.metrics.bound import Quadrature, checked_ratios, noise_level


class CriticObjective(Protocol):
    """What `critic_bias` needs of an objective."""

    teacher: Denoiser

    @property
    def critic(self) -> Denoiser:
        """D_ψ."""
        ...


@dataclass(frozen=True)
class CriticBias:
    """A critic's error and the bias that it causes, per noise level; all fields are (L,), float64.

    Attributes:
        ratio: r = σ_t/α_t.
        critic_error: relative error of the critic's score.
        gradient_bias: ‖B‖/‖G‖; large where the student has converged, and G is small.
    """

    ratio: Tensor
    critic_error: Tensor
    gradient_bias: Tensor


def critic_bias(
    objective: CriticObjective,
    generator: Generator,
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
        n: draws per level, at least 2.
        nodes: of the quadrature, per latent dimension, at least 2.

    Raises:
        UsageError: for more than three latent dimensions, ratios that are not positive, or too few n or nodes.
    """
    ratio = checked_ratios(ratios, n, nodes)
    with torch.no_grad():
        student = Quadrature(generator, nodes, rng.device)
    rows = [_at_level(objective, generator, student, r, n, rng) for r in ratio.tolist()]
    return CriticBias(ratio, *torch.stack(rows, 1).double().cpu())


def _at_level(
    objective: CriticObjective, generator: Generator, student: Quadrature, ratio: float, n: int, rng: torch.Generator
) -> Tensor:
    """The critic's error and the gradient's bias, (2,)."""
    gradients, errors = [], []
    for _ in range(2):
        with torch.enable_grad():
            x = generator(generator.latents(n // 2, rng))
        with torch.no_grad():
            noise = noise_level(objective.teacher.schedule, ratio, x, rng)
            x_t = noise.x_t(x)
            exact = student.score(x_t, noise.alpha, noise.sigma).to(x).view_as(x)
            own = score(objective.critic, x_t, noise.t)
            wanted = exact - score(objective.teacher, x_t, noise.t)
        errors.append(torch.stack([(own - exact).pow(2).mean(), exact.pow(2).mean()]))
        gradients.append([_gradient(generator, x, noise.alpha[0] * g / len(x)) for g in (own - exact, wanted)])
    error = torch.stack(errors).sum(0)
    (bias_1, wanted_1), (bias_2, wanted_2) = gradients
    bias, norm = (bias_1 @ bias_2).clamp_min(0), (wanted_1 @ wanted_2).clamp_min(torch.finfo(bias_1.dtype).tiny)
    return torch.stack([(error[0] / error[1]).sqrt(), (bias / norm).sqrt()])


def _gradient(generator: Generator, x: Tensor, cotangent: Tensor) -> Tensor:
    """cotangentᵀ ∂x/∂θ, flat."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, cotangent, retain_graph=True)])
