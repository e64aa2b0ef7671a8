r"""Score distillation sampling (DreamFusion; Poole et al. 2022, arXiv 2209.14988, eq. 3).

The teacher's error on the student's noise, with the teacher's Jacobian left out:

    ∇_θ = E w(t)/d (q − s_T)(x_t, t)ᵀ α_t ∂g_θ(z)/∂θ,   q = ∇ log q(x_t | x) = −ε/σ_t,

which is w(t)/(d σ_t) (ε_T − ε). It is Diff-Instruct with the critic D_ψ := x, which takes every sample for the whole
law: it needs no critic, and it seeks modes. For x = a z and Gaussian data its gradient in a is positive, so the student
collapses; it is here to compare with, and for single images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.objectives.base import Objective, Parts, inner

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.diffusion import Denoiser, Draw


@dataclass(frozen=True)
class SDSConfig:
    """Score distillation sampling: no critic, seeks modes."""

    name: ClassVar[str] = "sds"
    cost: ClassVar[int] = 2

    def build(self, parts: Parts) -> SDS:
        """The objective; it needs a teacher alone."""
        assert parts.teacher is not None
        return SDS(parts.teacher)


class SDS(Objective):
    """Score distillation sampling.

    Args:
        teacher: E[x | x_t] of the data.
    """

    teacher: Denoiser
    scores_by_teacher: ClassVar[bool] = True

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d ⟨q − s_T, x_t⟩, (R,), the scores held fixed: only its gradient has a meaning."""
        x_t = draw.x_t
        of_noise = -draw.noise.eps / diffusion.expand(draw.noise.sigma, x_t)
        return draw.noise.weight * inner(of_noise - draw.score(self.teacher), x_t)

    def evaluations(self, latents: int, draws: int) -> int:
        """The teacher."""
        return latents * draws
