r"""Score identity distillation (SiD; Zhou et al. 2024, arXiv 2404.04057, eq. 23).

With D_ψ the critic and gradients through x, x_t and the inputs of both denoisers,

    L = w(t)/(d N) ⟨D_T − D_ψ, (D_T − x) − a (D_T − D_ψ)⟩,   N = mean |x − D_T|, held fixed.

With an exact critic a = ½ is half the gradient of the Fisher divergence E‖s_θ − s_T‖² between the noisy marginals, and
a = 1 half of it with the sampling law held fixed (the quadratic `SiM`); the paper's a = 1.2 is neither, and its best.
The value may be negative and says nothing of convergence: watch metrics instead. For a > 1 it has no lower bound while
the critic is wrong: with a fresh critic a = 1.2 drove the student of MoG-40 to infinity, so recipes take a = 1.

**Guidance** (Zhou et al. 2024, arXiv 2406.01561; 2025, arXiv 2505.12674). The critic can be guided as a teacher is, in
its own training, too, where it is D_∅ + κ (D_c − D_∅) that is fitted: "long and short guidance" with κ the teacher's
scale; with an unguided teacher "Zero-CFG" at 0 and "Anti-CFG" below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill.errors import require
from vardistill.lazy import Later
from vardistill.objectives.base import Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation, error_of

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.denoisers import guidance
    from vardistill.diffusion import Denoiser, Draw
else:
    guidance = Later("vardistill.denoisers.guidance")


@dataclass(frozen=True)
class SiDConfig(CriticConfig):
    """SiD: the Fisher divergence between noisy marginals, through the critic's and the teacher's input.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "sid"
    cost: ClassVar[int] = 5
    a: float = 1.2
    """Weight of the squared difference; 1.2 is the paper's for most data."""

    critic_guidance: float = 1.0
    """κ, scale of the critic's guidance, for a conditional teacher with a label for no class; 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("a", "critic_guidance"):
            require(name, getattr(self, name), math.isfinite(getattr(self, name)), "finite")

    def build(self, parts: Parts) -> SiD:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        critic = self.critic(parts)
        if self.critic_guidance != 1:
            critic = guidance.guided_as(critic, self.critic_guidance)
        return SiD(parts.teacher, critic, self.critic_steps, parts.data_std, self.a)


class SiD(ScoreDistillation):
    """Score identity distillation.

    Args:
        teacher: as of `ScoreDistillation`, and differentiable in x_t.
        critic: likewise.
        critic_steps: likewise.
        sigma_data: likewise.
        a: weight of the squared difference.
    """

    def __init__(
        self, teacher: Denoiser, critic: Denoiser, critic_steps: int = 1, sigma_data: float = 1.0, a: float = 1.2
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.a = a

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/(d N) ⟨D_T − D_ψ, (D_T − x) − a (D_T − D_ψ)⟩, (R,)."""
        x_t, t = draw.x_t, draw.noise.t
        of_data, own = (denoiser(x_t, t, **draw.batch) for denoiser in (self.teacher, self.critic))
        return self.identity(draw, of_data, own)

    def identity(self, draw: Draw, of_data: Tensor, own: Tensor) -> Tensor:
        """The same of D_T and D_ψ at x_t, (R, *data) both."""
        difference = of_data - own
        remainder = (of_data - draw.x - self.a * difference) / error_of(of_data, draw.x)
        return draw.noise.weight * inner(difference, remainder)
