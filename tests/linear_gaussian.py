"""A linear generator x = A z + b and a Gaussian target N(m, S), for which everything is closed form.

The student's noisy marginal is N(α b, α² A Aᵀ + σ² I), and a Gauss–Hermite rule over (z, ε) gives the expectation of
any polynomial without Monte-Carlo error. Where draws are random, z-scores are held against `z_limit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.noise import Draw, Noise, NoiseLevels
from vardistill.diffusion.schedules import Schedule
from vardistill.objectives import Objective
from vardistill.students.student import Student
from vardistill.training.data import Labels, Samples
from vardistill.training.draws import Drawn


class Linear(Student):
    """x = A z + b, x of any shape."""

    def __init__(self, A: Tensor, b: Tensor, data_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.latent_shape, self.data_shape, self.data_std = (A.shape[1],), data_shape or (len(A),), 1.0
        self.A, self.b = nn.Parameter(A), nn.Parameter(b)

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.A.T + self.b).unflatten(1, self.data_shape)


def student() -> Linear:
    """A map of the plane into space."""
    return Linear(torch.tensor([[1.1, 0.2], [-0.4, 0.7], [0.3, 0.5]]), torch.tensor([0.5, -0.3, 0.2]))


def target(schedule: Schedule) -> GaussianMixture:
    """N(m, S) as a teacher under `schedule`."""
    mean = torch.tensor([[0.2, 0.4, -0.5]])
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]])
    return GaussianMixture(mean, covariances=(factor @ factor.T)[None], schedule=schedule)


class Linears(Student):
    """x = A_c z + b_c under the label c, for A (K, data, latent) and b (K, data)."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.classes, *data_shape, latent = A.shape
        self.latent_shape, self.data_shape, self.data_std = (latent,), tuple(data_shape), 1.0
        self.A, self.b = nn.Parameter(A), nn.Parameter(b)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return (self.A[labels] @ z[..., None]).squeeze(-1) + self.b[labels]

    def of(self, label: int) -> Linear:
        """The generator of one label, with weights of its own."""
        return Linear(self.A[label].detach().clone(), self.b[label].detach().clone())


class ByLabel(nn.Module):
    """Denoisers as one that takes labels: D(x_t, t, c) = D_c(x_t, t)."""

    def __init__(self, denoisers: Sequence[Any]) -> None:
        super().__init__()
        self.of_label = nn.ModuleList(denoisers)
        self.schedule: Schedule = denoisers[0].schedule

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return pick([denoiser(x_t, t) for denoiser in self.of_label], labels)

    def log_prob(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return pick([denoiser.log_prob(x_t, t) for denoiser in self.of_label], labels)


def pick(of_labels: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The i-th row of the labels[i]-th tensor, for every i."""
    return torch.stack(list(of_labels))[labels, torch.arange(len(labels))]


def students() -> Linears:
    """Two maps of the plane into space; the first is `student`."""
    first = student()
    A = torch.stack([first.A.detach(), torch.tensor([[0.2, -0.6], [0.9, 0.1], [0.4, 0.8]])])
    return Linears(A, torch.stack([first.b.detach(), torch.tensor([-0.7, 0.1, 0.6])]))


def targets(schedule: Schedule) -> ByLabel:
    """N(m_c, S_c) as a teacher that takes labels; the first is `target`."""
    second = GaussianMixture(torch.tensor([[-0.4, 0.3, 0.1]]), std=0.7, schedule=schedule)
    return ByLabel([target(schedule), second])


def student_marginal(A: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor) -> MultivariateNormal:
    """p_θ^t = N(α b, α² A Aᵀ + σ² I) for scalar or (R,) scales."""
    covariance = (alpha**2)[..., None, None] * (A @ A.T) + (sigma**2)[..., None, None] * torch.eye(len(A))
    return MultivariateNormal(alpha[..., None] * b, covariance)


def target_marginal(teacher: GaussianMixture, alpha: Tensor, sigma: Tensor) -> MultivariateNormal:
    """p_d^t = N(α m, α² S + σ² I), by torch's own density."""
    components = teacher.components
    covariance = components.eigenvectors[0] @ components.eigenvalues[0].diag() @ components.eigenvectors[0].T
    covariance = (alpha**2)[..., None, None] * covariance + (sigma**2)[..., None, None] * torch.eye(len(covariance))
    return MultivariateNormal(alpha[..., None] * teacher.means[0], covariance)


def diffusive_kl(A: Tensor, b: Tensor, teacher: GaussianMixture, t: float) -> Tensor:
    """KL(p_θ^t ‖ p_d^t) in closed form, differentiable in A and b."""
    alpha, sigma = teacher.schedule(torch.tensor(t))
    return kl_divergence(student_marginal(A, b, alpha, sigma), target_marginal(teacher, alpha, sigma))


def gauss_hermite(dimension: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Points (nodes^dimension, dimension) and weights of a rule for N(0, I), exact to degree 2 · nodes − 1."""
    points, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(nodes))
    shape = nodes**dimension, dimension
    grid = torch.cartesian_prod(*[points] * dimension).view(shape)
    return grid, torch.cartesian_prod(*[weights / weights.sum()] * dimension).view(shape).prod(1)


def quadrature(generator: Linear, schedule: Schedule, t: float, sign: float = 1.0) -> Draw:
    """A draw whose weights are those of a rule over (z, ε): Σ_r w_r f_r = E f for polynomials f up to degree 5."""
    latent, data = generator.A.shape[1], len(generator.A)
    points, weights = gauss_hermite(latent + data, 3)
    z, eps = points.split([latent, data], 1)
    t_rows = torch.full((len(points),), t)
    alpha, sigma = schedule(t_rows)
    return Draw(z, generator(z), Noise(t_rows, alpha, sigma, weights, sign * eps, len(z)), generator)


@dataclass(frozen=True)
class AtTimes:
    """A level distribution: uniform over the given times."""

    times: tuple[float, ...]

    def __call__(self, u: Tensor, progress: float, schedule: Schedule) -> Tensor:
        alpha, sigma = schedule(torch.tensor(self.times)[(u * len(self.times)).long()])
        return sigma / alpha


def random_draw(
    generator: Linear,
    schedule: Schedule,
    times: tuple[float, ...],
    latents: int,
    rng: torch.Generator,
    candidates: int = 0,
    data: Samples | None = None,
    **levels: Any,
) -> Draw:
    """A draw as a trainer makes it."""
    of_levels = NoiseLevels(schedule, AtTimes(times), **levels)
    noise = of_levels.draw(generator.data_shape, latents, 0.0, rng, torch.float64, real=data is not None)
    z = generator.latents(latents, rng)
    eta = torch.randn(candidates, len(noise.t), *generator.latent_shape, generator=rng) if candidates else None
    real = None if data is None else noise.rows(data(latents, rng))
    return Draw(noise.rows(z), noise.rows(generator(z)), noise, generator, eta, real=real)


def labelled_drawn(
    generator: Linears,
    schedule: Schedule,
    times: tuple[float, ...],
    latents: int,
    rng: torch.Generator,
    candidates: int = 0,
    data: Samples | None = None,
    **levels: Any,
) -> Drawn:
    """The random part of a step of a trainer with equally frequent labels."""
    of_levels = NoiseLevels(schedule, AtTimes(times), **levels)
    noise = of_levels.draw(generator.data_shape, latents, 0.0, rng, torch.float64, real=data is not None)
    condition = Labels(torch.ones(generator.classes))(latents, rng)
    shape = candidates, of_levels.draws, latents, *generator.latent_shape
    eta = torch.randn(shape, generator=rng) if candidates else None
    real = None if data is None else data(latents, rng, **condition)
    renoise = torch.empty(0, latents, *generator.data_shape)
    return Drawn(generator.latents(latents, rng), renoise, noise, eta, None, real, 0.0, (), condition)


def complete(drawn: Drawn, generator: Student) -> Draw:
    """The draw with the generator's samples, as a trainer makes it."""

    def generate(z: Tensor, step: int, condition: Mapping[str, Tensor]) -> Tensor:
        which = {} if step == 1 else {"step": step}
        x: Tensor = generator(z, **which, **condition)
        return x

    drawn = drawn.entered(generator)
    u = drawn.latents(generator)
    return drawn.complete(generator, u, generate(u, drawn.step, drawn.condition), generate)


def of_label(draw: Draw, label: int, generator: Linear) -> tuple[Draw, Tensor]:
    """The rows of one label as a draw of an unconditional generator, and which rows they are."""
    rows = (draw.batch["labels"] == label).nonzero().flatten()
    n = draw.noise
    noise = Noise(n.t[rows], n.alpha[rows], n.sigma[rows], n.weight[rows], n.eps[rows], len(rows))
    eta = None if draw.eta is None else draw.eta[:, rows]
    return Draw(draw.z[rows], generator(draw.z[rows]), noise, generator, eta), rows


def z_limit(comparisons: int, failure_rate: float = 1e-4) -> float:
    """What |z| exceeds in any of `comparisons` with probability at most `failure_rate` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - failure_rate / (2 * comparisons))


def z_scores(samples: Tensor, mean: Tensor | float) -> Tensor:
    """(sample mean − mean)/standard error, over axis 0 of independent `samples`."""
    return (samples.mean(0) - mean) / (samples.std(0) / math.sqrt(len(samples)))


def gradients(loss: Tensor, *parameters: Tensor) -> Tensor:
    """The gradient of Σ loss in all parameters, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parameters, retain_graph=True)])


def gradient_rows(objective: Objective, draw: Draw) -> Tensor:
    """Each row's gradient in (A, b), (R, ·), for losses that see θ through x alone."""
    (g,) = torch.autograd.grad(objective.generator_loss(draw).sum(), draw.x, retain_graph=True)
    return torch.cat([(g[:, :, None] * draw.z[:, None]).flatten(1), g], 1)


class GaussianDenoiser(nn.Module):
    """E[x | x_t] of N(mean, F Fᵀ): mean + α C (α² C + σ² I)⁻¹ (x_t − α mean), with parameters mean and F."""

    def __init__(self, mean: Tensor, factor: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean.detach().clone()), nn.Parameter(factor.detach().clone())
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v[:, None, None] for v in self.schedule(t))
        C = self.factor @ self.factor.T
        residual = x_t[..., None] - alpha * self.mean[:, None]
        gain = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(len(C)))
        return self.mean + (gain @ residual).squeeze(-1)


def exact_critic(generator: Linear, schedule: Schedule) -> GaussianDenoiser:
    """The denoiser of the student's own law, N(b, A Aᵀ)."""
    factor = torch.cat([generator.A, torch.zeros(3, 1)], 1)
    return GaussianDenoiser(generator.b, factor, schedule)


def wrong_critic(generator: Linear, schedule: Schedule, shift: float = 0.3, widen: float = 1.3) -> GaussianDenoiser:
    """That of N(b + shift, widen² A Aᵀ)."""
    exact = exact_critic(generator, schedule)
    return GaussianDenoiser(exact.mean + shift, widen * exact.factor, schedule)


def predicted_bias(generator: Linear, critic: GaussianDenoiser, t: float) -> Tensor:
    """E (s_ψ − s_θ)ᵀ α ∂g/∂(A, b), flat, with affine scores s(x_t) = −C⁻¹ (x_t − α mean).

    With m = α b and H = C_θ⁻¹ − C_ψ⁻¹: E[s_ψ − s_θ] = α C_ψ⁻¹ (mean_ψ − b), and as x_t − m = α A z + σ ε, the gradient
    in A, E (s_ψ − s_θ) zᵀ α, is α² H A.
    """
    alpha, sigma = critic.schedule(torch.tensor(t))
    A, b = generator.A.detach(), generator.b.detach()
    own = student_marginal(A, b, alpha, sigma).precision_matrix
    wrong = torch.linalg.inv(alpha**2 * critic.factor @ critic.factor.T + sigma**2 * torch.eye(3)).detach()
    of_A = alpha**2 * (own - wrong) @ A
    of_b = alpha**2 * wrong @ (critic.mean.detach() - b)
    return torch.cat([of_A.flatten(), of_b])
