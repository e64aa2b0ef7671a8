r"""Scalars that show early how a run goes wrong; `warning_signs` holds them against thresholds.

With r = σ_t/α_t, x_t = α_t x + σ_t ε, Σ the covariance of the student's samples, and N of them:

    posterior_information  E[log q_φ(z | x_t, t) − log p(z)]                              ≤ I(z; x_t)
    posterior_capacity     E ½ log det(I + Σ/r²)                                          ≥ I(z; x_t)
    diversity              −E log 1/N Σ_j exp((‖x_r − x_i‖² − ‖x_r − x_j‖²)/2r²), x_r = x_i + r ε
    critic_lag             E λ(r) ‖D_ψ(x_t, t) − x‖² / E λ(r) ‖D_T(x_t, t) − x‖²
    spread                 √(E ‖x − E x‖²/d)/σ_d
    adversarial_share      rms ‖∂ℓ_G/∂x‖ / (rms ‖∂ℓ_G/∂x‖ + rms ‖∂(ℓ − ℓ_G)/∂x‖), ℓ_G the loss's adversarial term
    low_level_share        Σ_{rows of the lowest third of r} ‖∂ℓ/∂x‖² / Σ_{all rows} ‖∂ℓ/∂x‖²

The first is the variational bound on mutual information of Barber & Agakov (2003), exact for the exact posterior; the
second holds because a Gaussian has the largest entropy of its covariance. exp(diversity) counts the samples that can be
told apart under noise of ratio r: from 1 for a point to N. It never exceeds I(x; x_r) in the mean (Poole et al. 2019,
arXiv 1905.06922). Both losses of critic_lag share the term that no denoiser avoids, so their difference is
E λ ‖D_ψ − D_θ‖² − E λ ‖D_T − D_θ‖², with D_θ the student's own denoiser: the critic's error less the difference of
teacher and student that it should tell.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vardistill.denoisers import GaussianMixture
from vardistill.denoisers.mixture import mixture_of_points
from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import Draw
from vardistill.posteriors.few import Posterior, standard_normal

LARGEST = 1024
"""Samples that diversity and covariances are computed of, at most."""

FINENESS = 1 / 8
"""Ratio r of the diversity, in root mean square distances √(2d) σ_d of the target's samples: alike in any dimension."""


class Adversarial(Protocol):
    """An objective with a weighted adversarial term.

    Attributes:
        generator_gan: its weight.
    """

    generator_gan: float

    def generator_loss(self, draw: Draw) -> Tensor:
        """One value per row, (R,)."""
        ...


@torch.no_grad()
def posterior_information(posterior: Posterior, draw: Draw) -> dict[str, Tensor]:
    """What q_φ tells of the latent, and the most that anything could: both in nats, meaned over the draw's levels.

    The capacity is NaN for samples that are not finite, as a run's that diverges, and too small for fewer samples than
    dimensions.
    """
    z, noise = draw.z.flatten(1), draw.noise
    log_q = posterior(draw.x_t, noise.alpha, noise.sigma, **draw.batch).log_prob(z)
    x = draw.x[: min(noise.latents, LARGEST)].flatten(1)
    centred = x - x.mean(0)
    finite = centred.isfinite().all()
    variances = torch.linalg.svdvals(centred.where(finite, 0.0)) ** 2 / len(x)  # it raises on what is not finite
    capacity = 0.5 * torch.log1p(variances * (noise.alpha / noise.sigma)[:, None] ** 2).sum(1).where(finite, math.nan)
    return {"posterior_information": (log_q - standard_normal(z)).mean(), "posterior_capacity": capacity.mean()}


@torch.no_grad()
def diversity(x: Tensor, eps: Tensor, ratio: float) -> Tensor:
    """Logarithm of the number of the samples x (N, *data) that can be told apart under the noise r ε, in [0, log N].

    Its value for one draw of ε (N, *data) may leave the interval.
    """
    points, eps = x.flatten(1), eps.flatten(1)
    ones = torch.ones_like(points[:, 0])
    log_sum, _ = mixture_of_points(points + ratio * eps, points, ones, ratio * ones)
    return math.log(len(x)) - (log_sum + 0.5 * (eps**2).sum(1)).mean()


@torch.no_grad()
def diversities(draw: Draw, teacher: Denoiser | None, data_std: float, rng: torch.Generator) -> dict[str, Tensor]:
    """The diversity of the student's samples, and of as many of the target's where there are any.

    Those are the draw's real samples, or a teacher's that is a distribution; the ratio is `FINENESS` √(2d) σ_d, with
    σ_d their standard deviation, else `data_std`.
    """
    n = min(draw.noise.latents, LARGEST)
    x, eps = draw.x[:n], draw.noise.eps[:n]
    fineness = FINENESS * math.sqrt(2 * x[0].numel())
    if draw.real is not None:
        target = draw.real[:n]
    elif isinstance(teacher, GaussianMixture):
        target = teacher.sample(n, rng).view_as(x)
    else:
        return {"diversity": diversity(x, eps, fineness * data_std)}
    ratio = fineness * float((target - target.mean(0)).pow(2).mean().sqrt())
    return {"diversity": diversity(x, eps, ratio), "diversity_target": diversity(target, eps, ratio)}


@torch.no_grad()
def spread(draw: Draw, data_std: float) -> Tensor:
    """The standard deviation of the student's samples around their mean, in units of the data's."""
    x = draw.x[: draw.noise.latents]
    return (x - x.mean(0)).pow(2).mean().sqrt() / data_std


def adversarial_share(objective: Adversarial, draw: Draw) -> Tensor:
    """How much of what drives the samples is the adversarial term's, in [0, 1]."""
    bare = copy.copy(objective)
    bare.generator_gan = 0.0
    with torch.enable_grad():
        x = draw.x.detach().requires_grad_()
        own = replace(draw, x=x)
        whole, matching = (
            torch.autograd.grad(loss(own).sum(), x, retain_graph=True)[0]
            for loss in (objective.generator_loss, bare.generator_loss)
        )
    sizes = [g.pow(2).mean().sqrt() for g in (whole - matching, matching)]
    return sizes[0] / (sizes[0] + sizes[1])


def low_level_share(loss: Callable[[Draw], Tensor], draw: Draw) -> Tensor:
    """The share of the rows in the lowest third of noise levels in Σ ‖∂ℓ/∂x‖², for a loss of one value per row."""
    with torch.enable_grad():
        x = draw.x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(replace(draw, x=x)).sum(), x, allow_unused=True, materialize_grads=True)
    squares = gradient.flatten(1).pow(2).sum(1)
    lowest = (draw.noise.sigma / draw.noise.alpha).argsort(stable=True)[: max(1, len(squares) // 3)]
    return squares[lowest].sum() / squares.sum()
