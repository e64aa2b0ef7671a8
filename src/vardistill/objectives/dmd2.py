r"""DMD2 (Yin et al. 2024, arXiv 2405.14867): DMD without pairs, and with a discriminator.

A head on the critic's features (`discriminator`) is trained with the critic:

    critic and head:  denoising score matching + λ_C [softplus(C(x_t^S)) + softplus(−C(x_t^T))]
    student:          DMD's + λ_G softplus(−C(x_t^S))

Where the authors' code draws another level for each of these terms, here they share the update's: their means are the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Parts
from vardistill.objectives.critic import AdversarialConfig
from vardistill.objectives.dmd import DMD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vardistill.denoisers import features as inside
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import diagnostics, discriminator
    from vardistill.objectives.discriminator import Head
else:
    torch = Later("torch")
    inside = Later("vardistill.denoisers.features")
    diagnostics = Later("vardistill.objectives.diagnostics")
    discriminator = Later("vardistill.objectives.discriminator")


@dataclass(frozen=True)
class DMD2Config(AdversarialConfig):
    """DMD2: DMD with a discriminator on the critic's features; needs real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "dmd2"
    cost: ClassVar[int] = 19
    critic_gan: float = 1e-2
    """λ_C, weight of the discriminator beside denoising score matching."""

    def build(self, parts: Parts) -> DMD2:
        """The objective, with a fresh critic or a copy of the teacher, and a fresh head."""
        assert parts.teacher is not None
        critic = self.critic(parts)
        head = discriminator.Head.on(critic, parts)
        gan = self.generator_gan, self.critic_gan
        return DMD2(parts.teacher, critic, head, self.critic_steps, parts.data_std, *gan)


class DMD2(DMD):
    """DMD with a discriminator.

    Args:
        teacher: as of `ScoreDistillation`.
        critic: likewise, with an inner layer (`denoisers.features`) and differentiable in x_t.
        head: logits of the critic's features.
        critic_steps: as of `ScoreDistillation`.
        sigma_data: likewise.
        generator_gan: λ_G.
        critic_gan: λ_C.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        head: Head,
        critic_steps: int = 5,
        sigma_data: float = 1.0,
        generator_gan: float = 3e-3,
        critic_gan: float = 1e-2,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.networks["head"] = self.head = head
        self.generator_gan, self.critic_gan = generator_gan, critic_gan

    @property
    def critic_needs(self) -> Needs:
        """Real samples."""
        return Needs(real=True)

    def critic_loss(self, draw: Draw) -> Tensor:
        """Denoising score matching + λ_C [softplus(C(x_t^S)) + softplus(−C(x_t^T))], (R,)."""
        x_t = draw.noise.x_t(draw.x.detach())
        seen, denoised = inside.features_and_mean(self.critic, x_t, draw.noise.t, **draw.batch)
        real = self.head.logits(self.critic, draw.real_t, draw.noise.t, draw.batch)
        return self.denoising_loss(denoised, draw) + self.critic_gan * discriminator.of_head(real, self.head(seen))

    def generator_loss(self, draw: Draw) -> Tensor:
        """DMD's, times `field_weight`, + λ_G softplus(−C(x_t)), (R,)."""
        logits = self.head.logits(self.critic, draw.x_t, draw.noise.t, draw.batch)
        matching = self.field_weight(logits) * super().generator_loss(draw)
        return matching + self.generator_gan * discriminator.of_student(logits)

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """What others with a critic measure, and the adversarial term's share in what drives the samples."""
        return super().measure(draw) | {"adversarial_share": diagnostics.adversarial_share(self, draw)}

    def field_weight(self, logits: Tensor) -> Tensor:
        """What weighs the score difference at samples of these logits, (R,): 1."""
        return torch.ones_like(logits)

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """The critic on the student's samples and on real ones."""
        return 2 * latents * draws

    def evaluations(self, latents: int, draws: int) -> int:
        """Critic, teacher, and the critic's features once more, with gradient."""
        return 3 * latents * draws
