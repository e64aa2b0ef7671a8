"""A student x = a z of data N(0, s²) in one dimension, α = 1, where everything is closed form.

With A = a² + σ², S = s² + σ² and k = 1/A − 1/S the exact critic's score is −x/A, the teacher's −x/S. A Gauss–Hermite
rule over (z, ε) gives expectations, and those of gradients, without Monte-Carlo error. All in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from linear_gaussian import GaussianDenoiser, Linear, gauss_hermite
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.diffusion import Denoiser
from vardistill.diffusion.noise import Draw, Noise
from vardistill.diffusion.schedules import VE
from vardistill.networks import LevelMLP
from vardistill.objectives import Objective
from vardistill.objectives.critic import error_of

S_DATA, SIGMA = 1.3, 0.7
S = S_DATA**2 + SIGMA**2

every_scale = pytest.mark.parametrize("a", [0.8, 1.3, 1.9])


def teacher() -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 1), std=S_DATA, schedule=VE())


def critic(a: float) -> GaussianDenoiser:
    return GaussianDenoiser(torch.zeros(1), torch.tensor([[a]]), VE())


def draw_of(a: float, nodes: int = 3, weight: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Draw, Linear]:
    """A rule over (z, ε) as a draw; `weight`, of (x, x_t), is multiplied with the rule's."""
    points, weights = gauss_hermite(2, nodes)
    z, eps = points.split([1, 1], 1)
    generator = Linear(torch.tensor([[a]]), torch.zeros(1))
    t = VE().time(torch.full((len(z),), SIGMA))
    alpha, sigma = VE()(t)
    x = generator(z)
    extra = 1.0 if weight is None else weight(x.detach(), x.detach() + SIGMA * eps).flatten()
    return Draw(z, x, Noise(t, alpha, sigma, weights * extra, eps, len(z)), generator), generator


def slope(objective: Objective, draw: Draw, generator: Linear) -> float:
    """The gradient of the mean loss in a."""
    (gradient,) = torch.autograd.grad(objective.generator_loss(draw).sum(), generator.A)
    return float(gradient)


def normaliser(x: Tensor, x_t: Tensor) -> Tensor:
    """N, by which DMD and SiD divide."""
    return error_of(x_t * S_DATA**2 / S, x)


def reverse_kl(a: float) -> float:
    """d/da KL(N(0, A) ‖ N(0, S))."""
    return a * (1 / S - 1 / (a**2 + SIGMA**2))


def perceptron(seed: int) -> Preconditioned:
    torch.manual_seed(seed)
    return Preconditioned(LevelMLP(1, 1, depth=2, width=8), S_DATA, VE())


class ExactHead(nn.Module):
    """log p_d^t/p_θ^t, whatever the critic's features."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.A = a**2 + SIGMA**2
        self.unused = nn.Parameter(torch.zeros(()))

    def logits(self, critic: Denoiser, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return (0.5 * torch.tensor(self.A / S).log() + x_t.pow(2) * (1 / self.A - 1 / S) / 2).flatten()
