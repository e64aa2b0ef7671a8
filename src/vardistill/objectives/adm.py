r"""Adversarial distribution matching (ADM; Lu et al. 2025, arXiv 2507.18569).

From one x_t of the student's sample, teacher and critic each take a step of the probability flow to less noise,

    x^T = DDIM(x_t, D_T; t → s),   x^S = DDIM(x_t, D_ψ; t → s),   r_s = ρ r_t,   r = σ/α,

and a head on the frozen teacher's features tells where they end apart:

    critic:   λ(t)/d ‖D_ψ(x_t, t) − x‖²
    head:     max(0, 1 + C(x^S, s)) + max(0, 1 − C(x^T, s))
    student:  −w(t) C(x^S, s), with gradient through the step, D_ψ's input and x_t

No real samples are needed, and where D_ψ = D_T there is nothing to tell. The paper's pre-training on stored pairs is
not here; its Δt is not stated in what we could check, and ρ is ours. The method is known to us from a summary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.errors import require
from vardistill.lazy import Later
from vardistill.objectives.base import Parts
from vardistill.objectives.critic import CriticConfig, ScoreDistillation

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.denoisers import features as inside, guidance
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import discriminator
    from vardistill.objectives.discriminator import Head
else:
    inside, guidance = Later("vardistill.denoisers.features"), Later("vardistill.denoisers.guidance")
    discriminator = Later("vardistill.objectives.discriminator")


@dataclass(frozen=True)
class ADMConfig(CriticConfig):
    """ADM: a discriminator of the teacher's next step and the critic's; needs a learned teacher.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "adm"
    cost: ClassVar[int] = 8
    shrink: float = 0.5
    """ρ, how much of the noise-to-signal ratio a step leaves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("shrink", self.shrink, 0 < self.shrink < 1, "between 0 and 1")

    def build(self, parts: Parts) -> ADM:
        """The objective, with a fresh critic or a copy of the teacher, and a fresh head."""
        assert parts.teacher is not None
        head = discriminator.Head.on(guidance.unguided(parts.teacher), parts)
        return ADM(parts.teacher, self.critic(parts), head, self.critic_steps, parts.data_std, self.shrink)


class ADM(ScoreDistillation):
    """Adversarial distribution matching.

    Args:
        teacher: as of `ScoreDistillation`, with an inner layer (`denoisers.features`) and differentiable in x_t.
        critic: as of `ScoreDistillation`, and differentiable in x_t.
        head: C of the teacher's features, without its guidance.
        critic_steps: updates of critic and head before each update of the student.
        sigma_data: as of `ScoreDistillation`.
        shrink: ρ.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        head: Head,
        critic_steps: int = 1,
        sigma_data: float = 1.0,
        shrink: float = 0.5,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.networks["head"] = self.head = head
        self.trunk, self.shrink = guidance.unguided(teacher), shrink
        inside.inner_layer(self.trunk)

    def critic_loss(self, draw: Draw) -> Tensor:
        """λ(t)/d ‖D_ψ − x‖² + the head's hinge loss, (R,)."""
        x_t = draw.noise.x_t(draw.x.detach())
        denoised = self.critic(x_t, draw.noise.t, **draw.batch)
        own, real = (self._logits(x_t, d, draw) for d in (denoised.detach(), draw.denoised(self.teacher)))
        return self.denoising_loss(denoised, draw) + discriminator.of_head(real, own, "hinge")

    def generator_loss(self, draw: Draw) -> Tensor:
        """−w(t) C(x^S, s), (R,)."""
        own = self.critic(draw.x_t, draw.noise.t, **draw.batch)
        return draw.noise.weight * discriminator.of_student(self._logits(draw.x_t, own, draw), "hinge")

    def _logits(self, x_t: Tensor, denoised: Tensor, draw: Draw) -> Tensor:
        """C at the end of the step from x_t by this E[x | x_t], (R,)."""
        alpha, sigma = (diffusion.expand(v, x_t) for v in (draw.noise.alpha, draw.noise.sigma))
        s = self.critic.schedule.time(self.shrink * draw.noise.sigma / draw.noise.alpha).clamp(0, 1)
        alpha_s, sigma_s = (diffusion.expand(v, x_t) for v in self.critic.schedule(s))
        x_s = alpha_s * denoised + sigma_s / sigma * (x_t - alpha * denoised)
        return self.head.logits(self.trunk, x_s, s, draw.batch)

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """Critic, teacher, and the teacher's features of both steps."""
        return 4 * latents * draws
