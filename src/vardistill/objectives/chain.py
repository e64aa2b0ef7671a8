r"""Markov chains that begin at the latent which made x_t, an exact sample of p_θ(z | x_t): they need no burn-in.

`posterior_chain` is Metropolis-adjusted Langevin dynamics (MALA; Roberts & Tweedie 1996) of

    log π(z) = −½ ‖z‖² − ‖x_t − α_t g_θ(z)‖²/(2 σ_t²)

at a fixed x_t, with steps in units of s² = r²/(r² + σ_d²), the posterior's variance for a linear g_θ:

    z′ = z + γ s² ∇log π(z) + √(2γ) s n,   n ~ N(0, I).

It leaves p_θ(z | x_t) as it is whatever γ: every state is an exact sample, and the later ones are nearly independent of
the first where the chain mixes, which between far modes of the posterior it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vardistill.diffusion.noise import Draw
from vardistill.diffusion.schedules import expand
from vardistill.errors import UsageError

Generator = Callable[[Tensor], Tensor]


def pull_back(generator: Generator, z: Tensor, cotangent: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x = g(z), v = cotangent(x) and (∂g/∂z)ᵀ v, none with a gradient; (R, *data), (R, *data) and (R, *latent)."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = generator(z)
    with torch.no_grad():
        v = cotangent(x.detach())
    (pulled,) = torch.autograd.grad(x, z, v)
    return x.detach(), v, pulled


@torch.no_grad()
def posterior_chain(draw: Draw, steps: int, step: float, sigma_data: float) -> Tensor:
    """g_θ of the states after the first of a chain for each row, (K, R, *data).

    Args:
        draw: with 2K further latents, the chain's noise and what decides which proposals are accepted.
        steps: K.
        step: γ.
        sigma_data: σ_d.

    Raises:
        UsageError: for a draw without further latents.
    """
    if draw.eta is None or len(draw.eta) < 2 * steps:
        raise UsageError(f"a chain of {steps} steps needs {2 * steps} further latents, draw.eta (2K, R, *latent)")
    noise, x_t = draw.noise, draw.x_t
    alpha, sigma = expand(noise.alpha, x_t), expand(noise.sigma, x_t)
    ratio = noise.sigma / noise.alpha
    size = step * expand(ratio**2 / (ratio**2 + sigma_data**2), draw.z)

    def density(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π up to a constant, its gradient, and g(z)."""
        x, v, pulled = pull_back(draw.generator, z, lambda x: alpha * (x_t - alpha * x) / sigma**2)
        error = (x_t - alpha * x) / sigma
        return -0.5 * (square(z) + square(error)), pulled - z, x

    z, states = draw.z, []
    log_density, slope, x = density(z)
    for n, other in zip(draw.eta[:steps], draw.eta[steps : 2 * steps], strict=True):
        proposed = z + size * slope + (2 * size).sqrt() * n
        log_there, slope_there, x_there = density(proposed)
        back = square((z - proposed - size * slope_there) / (2 * size.sqrt()))
        log_ratio = log_there - log_density - back + 0.5 * square(n)
        accepted = torch.special.log_ndtr(other.flatten(1)[:, 0]) < log_ratio
        z, slope, x = (
            torch.where(expand(accepted, new), new, old)
            for new, old in ((proposed, z), (slope_there, slope), (x_there, x))
        )
        log_density = log_there.where(accepted, log_density)
        states.append(x)
    return torch.stack(states)


def chain_score(draw: Draw, steps: int, step: float, sigma_data: float) -> Tensor:
    """∇ log p_θ^t(x_t) = E[(α_t g_θ(z) − x_t)/σ_t² | x_t], shape of x_t, by the mean of a chain's later half."""
    noise, states = draw.noise, posterior_chain(draw, steps, step, sigma_data)
    x_t = draw.x_t.detach()
    mean = states[steps // 2 :].mean(0)
    return (expand(noise.alpha, x_t) * mean - x_t) / expand(noise.sigma, x_t) ** 2


def square(v: Tensor) -> Tensor:
    """Σ v² of each row, (R,)."""
    return v.flatten(1).pow(2).sum(1)
