r"""Moment matching (Salimans et al. 2024, arXiv 2406.04103), the alternating form.

The critic is drawn to the student's samples and to the teacher alike:

    critic:   λ(t)/d [‖D_ψ(x_t, t) − x‖² + ‖D_ψ(x_t, t) − D_T(x_t, t)‖²]
    student:  w(t)/d ⟨sg(D_ψ − D_T)(x_t, t), x⟩

So its optimum is ½ (E[x | x_t] + D_T), and the student's gradient half of Diff-Instruct's under the weight (σ_t/α_t)²:
a smaller step, and a critic that stays near the teacher. Recalled: the form, not checked in the authors' code, of which
there is none. A student of several steps meets x_t of fresh noise on each x̂_k, as it samples; the paper's is drawn
from the posterior q(x_s | x_t, x̂_k) of an ancestral sampler. Its form in parameter space is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.objectives.base import Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.diffusion import Draw


@dataclass(frozen=True)
class MomentMatchingConfig(CriticConfig):
    """Moment matching: a critic between the student's samples and the teacher.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "moment-matching"
    cost: ClassVar[int] = 6

    def build(self, parts: Parts) -> MomentMatching:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        return MomentMatching(parts.teacher, self.critic(parts), self.critic_steps, parts.data_std)


class MomentMatching(ScoreDistillation):
    """Alternating moment matching; arguments and errors are those of `ScoreDistillation`."""

    scores_by_teacher: ClassVar[bool] = True
    tells_score: ClassVar[bool] = False

    def critic_loss(self, draw: Draw) -> Tensor:
        """λ(t)/d [‖D_ψ − x‖² + ‖D_ψ − D_T‖²], (R,)."""
        x_t, noise = draw.noise.x_t(draw.x.detach()), draw.noise
        denoised = self.critic(x_t, noise.t, **draw.batch)
        difference = denoised - draw.denoised(self.teacher)
        weight = diffusion.dsm_weight(self.critic, noise.alpha, noise.sigma, self.sigma_data)
        return self.denoising_loss(denoised, draw) + weight * inner(difference, difference)

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d ⟨D_ψ − D_T, x⟩, (R,), the denoisers held fixed: only its gradient has a meaning."""
        return draw.noise.weight * inner(draw.denoised(self.critic) - draw.denoised(self.teacher), draw.x)

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """Critic and teacher."""
        return 2 * latents * draws
