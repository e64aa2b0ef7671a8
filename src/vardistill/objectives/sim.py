r"""Score implicit matching (SiM; Luo et al. 2024, arXiv 2410.16794).

The divergence E d(y) of the scores' difference y = σ_t (s_ψ − s_T), the noise that teacher and critic predict
differently, under the sampling law held fixed. Its gradient is that of

    L = −w(t)/d ⟨d′(y), σ_t (s_ψ(x_t, t) − q)⟩,   q = ∇ log q(x_t | x) = −ε/σ_t,

through everything but the weights of teacher and critic. d(y) is ‖y‖² with d′ = 2y (SiD's a = 1 but for the weight), or
the pseudo-Huber √(‖y‖² + c²) − c with d′ = y/√(‖y‖² + c²), ‖·‖ the root mean square. That loss is the paper's; its c in
these units and its levels are not stated in what we could check, and are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from vardistill import diffusion
from vardistill.errors import require, unknown
from vardistill.objectives.base import Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.diffusion import Denoiser, Draw

Distance = Literal["pseudo-huber", "square"]


@dataclass(frozen=True)
class SiMConfig(CriticConfig):
    """SiM: a distance between teacher's and critic's scores, through their inputs.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "sim"
    cost: ClassVar[int] = 5
    distance: Distance = "pseudo-huber"
    """d of the scores' difference."""
    c: float = 0.1
    """The pseudo-Huber distance's constant, in units of the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("c", self.c, 0 < self.c < math.inf, "positive and finite")

    def build(self, parts: Parts) -> SiM:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        return SiM(parts.teacher, self.critic(parts), self.critic_steps, parts.data_std, self.distance, self.c)


class SiM(ScoreDistillation):
    """Score implicit matching.

    Args:
        teacher: as of `ScoreDistillation`, and differentiable in x_t.
        critic: likewise.
        critic_steps: likewise.
        sigma_data: likewise.
        distance: `pseudo-huber` or `square`.
        c: of the former; positive.

    Raises:
        UsageError: for an unknown distance or a c that is not positive.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        critic_steps: int = 1,
        sigma_data: float = 1.0,
        distance: Distance = "pseudo-huber",
        c: float = 0.1,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        if distance not in get_args(Distance):
            raise unknown("distance", distance, get_args(Distance))
        require("c", c, 0 < c < math.inf, "positive and finite")
        self.distance, self.c = distance, c

    def generator_loss(self, draw: Draw) -> Tensor:
        """−w(t)/d ⟨d′(y), σ_t (s_ψ − q)⟩, (R,)."""
        x_t, t = draw.x_t, draw.noise.t
        sigma = diffusion.expand(draw.noise.sigma, x_t)
        own = sigma * diffusion.score(self.critic, x_t, t, **draw.batch)
        y = own - sigma * diffusion.score(self.teacher, x_t, t, **draw.batch)
        return -draw.noise.weight * inner(self.slope(y), own + draw.noise.eps)

    def slope(self, y: Tensor) -> Tensor:
        """d′(y), shape of y (R, *data)."""
        if self.distance == "square":
            return 2 * y
        return y / diffusion.expand((inner(y, y) + self.c**2).sqrt(), y)
