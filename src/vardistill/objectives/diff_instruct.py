r"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455), also variational score distillation (Wang et al. 2023).

The gradient of the diffusive KL holds the student's own noisy score, which a critic D_ψ, a denoiser of the student's
samples, stands in for:

    critic:     E (r² + σ_d²)/(r σ_d)² ‖D_ψ(x_t, t) − x‖²,  x = g_θ(z), r = σ_t/α_t
    generator:  ∇_θ = E w(t) (s_ψ − s_T)(x_t, t)ᵀ α_t ∂g_θ(z)/∂θ

The gradient is that of E w(t) KL(p_θ^t ‖ p_d^t) where s_ψ is exact; elsewhere it is off by
E w(t) (s_ψ − s_θ)ᵀ α_t ∂g_θ/∂θ.
"""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral

import torch
from torch import Tensor, nn

from vardistill.denoisers.network import dsm_loss
from vardistill.diffusion.denoiser import Denoiser, check_denoiser, require_denoiser, score
from vardistill.diffusion.noise import Draw, named_weight
from vardistill.errors import UsageError, require
from vardistill.objectives.base import Objective, inner
from vardistill.students.student import Student
from vardistill.training.data import Conditions


class DiffInstruct(Objective):
    """Score distillation with a learned critic.

    The critic stays in evaluation mode: with dropout s_ψ would be random, and drawn by torch's global generator.

    Args:
        teacher: E[x | x_t] of the data.
        critic: D_ψ, a denoiser with parameters, under the teacher's schedule: fresh, or a copy of the teacher.
        critic_steps: updates of the critic before each update of the generator.
        sigma_data: σ_d of the critic's weight.

    Raises:
        UsageError: for a critic without parameters, of another schedule, or that shares parameters with the teacher;
            for fewer than one critic step, or a σ_d that is not positive and finite.
    """

    teacher: Denoiser

    def __init__(self, teacher: Denoiser, critic: Denoiser, critic_steps: int = 1, sigma_data: float = 1.0) -> None:
        super().__init__(teacher)
        whole = isinstance(critic_steps, Integral) and critic_steps >= 1
        require("critic_steps", critic_steps, whole, "a whole number, at least 1")
        require("sigma_data", sigma_data, 0 < sigma_data < math.inf, "positive and finite")
        if not isinstance(critic, nn.Module) or next(critic.parameters(), None) is None:
            raise UsageError(f"the critic must be a module with parameters, but {type(critic).__name__} has none")
        if isinstance(teacher, nn.Module) and set(critic.parameters()) & set(teacher.parameters()):
            raise UsageError("the critic is trained and the teacher is not: give a copy.deepcopy of the teacher")
        require_denoiser(critic, "critic")
        if critic.schedule != teacher.schedule:
            raise UsageError(f"the critic's schedule is {critic.schedule}, but the teacher's is {teacher.schedule}")
        self.critic = critic.requires_grad_(True)
        self.critic_steps = critic_steps
        self.critic_weight = named_weight("edm", sigma_data)
        critic.eval()

    def train(self, mode: bool = True) -> DiffInstruct:
        """Set the mode, but for the teacher's and the critic's."""
        super().train(mode)
        self.critic.eval()
        return self

    def check(self, generator: Student, conditions: Conditions | None = None) -> None:
        """Raise UsageError unless teacher and critic take the generator's samples, and the critic can be trained."""
        super().check(generator, conditions)
        parameter = next(generator.parameters())
        check_denoiser(self.critic, generator.data_shape, parameter, conditions, "critic", trained=True)

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) ⟨sg(s_ψ − s_T), x_t⟩, (R,): only its gradient has a meaning."""
        noise, x_t = draw.noise, draw.x_t
        return noise.weight * inner(self.score_difference(draw), x_t)

    def critic_loss(self, draw: Draw) -> Tensor:
        """Denoising score matching on the student's samples with EDM's weight, (R,)."""
        return self._denoising_loss(self.critic, draw)

    def _denoising_loss(self, denoiser: Denoiser, draw: Draw) -> Tensor:
        weight = self.critic_weight(draw.noise.alpha, draw.noise.sigma)
        noise = dataclasses.replace(draw.noise, weight=weight)
        return dsm_loss(denoiser, draw.x.detach(), noise, **draw.batch)

    @torch.no_grad()
    def score_difference(self, draw: Draw) -> Tensor:
        """s_ψ − s_T at x_t, (R, *data)."""
        x_t = draw.x_t
        own = score(self.critic, x_t, draw.noise.t, **draw.batch)
        return own - score(self.teacher, x_t, draw.noise.t, **draw.batch)

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """The critic; in the generator's update the teacher, too."""
        return latents * draws * (1 if critic else 2)

    @torch.no_grad()
    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """The critic's loss over the teacher's; the estimated Fisher divergence E w ‖s_ψ − s_T‖²."""
        fisher = draw.noise.weight * self.score_difference(draw).flatten(1).pow(2).sum(1)
        own, teachers = (self._denoising_loss(denoiser, draw).mean() for denoiser in (self.critic, self.teacher))
        return {"critic_lag": own / teachers, "fisher": fisher.mean()}
