r"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455), also variational score distillation (Wang et al. 2023).

The gradient of the diffusive KL with a critic's score in the place of the student's:

    ∇_θ = E w(t)/d (s_ψ − s_T)(x_t, t)ᵀ α_t ∂g_θ(z)/∂θ

It is that of E w(t)/d KL(p_θ^t ‖ p_d^t) where s_ψ is exact; elsewhere it is off by E w(t)/d (s_ψ − s_θ)ᵀ α_t ∂g_θ/∂θ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill.objectives.base import Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.diffusion import Draw


@dataclass(frozen=True)
class DiffInstructConfig(CriticConfig):
    """Diff-Instruct: score distillation with a learned critic.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "diff-instruct"
    cost: ClassVar[int] = 5

    def build(self, parts: Parts) -> DiffInstruct:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        return DiffInstruct(parts.teacher, self.critic(parts), self.critic_steps, sigma_data=parts.data_std)


class DiffInstruct(ScoreDistillation):
    """Score distillation with a learned critic; arguments and errors are those of `ScoreDistillation`."""

    scores_by_teacher: ClassVar[bool] = True

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d ⟨s_ψ − s_T, x_t⟩, (R,), the scores held fixed: only its gradient has a meaning."""
        return draw.noise.weight * inner(self.score_difference(draw), draw.x_t)
