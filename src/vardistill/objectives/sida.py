r"""Adversarial score identity distillation (SiDA; Zhou et al. 2024, arXiv 2410.14919).

SiD with a = 1 and a discriminator without parameters: C, the mean of the critic's inner layer over its channels, a
logit for each place of it.

    critic:   λ(t)/d ‖D_ψ(x_t, t) − x‖² + λ_C λ(t) ½ [softplus(C(x_t^S)) + softplus(−C(x_t^T))]
    student:  SiD's + λ_G w(t) softplus(−C(x_t^S))/N,   N = mean |x − D_T|

with means over the places, and C between −10 and 10 in the student's. The authors' weights, λ_C = 1 and λ_G = 10⁻⁴ for
losses that are means over the data axes, are the defaults; their delays of the student's two terms are not here (a
critic's head start is `TrainingConfig.head_start`). Of a perceptron the inner layer is an activation: SiLU's is at
least −0.28, so there C can say "real" without a bound but "generated" only faintly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.errors import require
from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Parts
from vardistill.objectives.critic import AdversarialConfig, error_of
from vardistill.objectives.sid import SiD

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill.denoisers import features as inside
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import diagnostics, discriminator
else:
    inside = Later("vardistill.denoisers.features")
    diagnostics = Later("vardistill.objectives.diagnostics")
    discriminator = Later("vardistill.objectives.discriminator")

LARGEST_LOGIT = 10.0
"""Where C is clamped for the student, as the authors do."""


@dataclass(frozen=True)
class SiDAConfig(AdversarialConfig):
    """SiDA: SiD with a discriminator that has no parameters; needs real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "sida"
    cost: ClassVar[int] = 6
    critic_steps: int = 1
    a: float = 1.0
    """Weight of the squared difference; 1 is the paper's."""
    generator_gan: float = 1e-4
    critic_gan: float = 1.0
    """λ_C, weight of the discriminator beside denoising score matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("a", self.a, math.isfinite(self.a), "finite")

    def build(self, parts: Parts) -> SiDA:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        gan = self.generator_gan, self.critic_gan
        return SiDA(parts.teacher, self.critic(parts), self.critic_steps, parts.data_std, self.a, *gan)


class SiDA(SiD):
    """Adversarial score identity distillation.

    Args:
        teacher: as of `SiD`.
        critic: likewise, with an inner layer (`denoisers.features`).
        critic_steps: likewise.
        sigma_data: likewise.
        a: likewise.
        generator_gan: λ_G.
        critic_gan: λ_C.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        critic_steps: int = 1,
        sigma_data: float = 1.0,
        a: float = 1.0,
        generator_gan: float = 1e-4,
        critic_gan: float = 1.0,
    ) -> None:
        inside.inner_layer(critic)
        super().__init__(teacher, critic, critic_steps, sigma_data, a)
        self.generator_gan, self.critic_gan = generator_gan, critic_gan

    @property
    def critic_needs(self) -> Needs:
        """Real samples."""
        return Needs(real=True)

    def critic_loss(self, draw: Draw) -> Tensor:
        """λ(t)/d ‖D_ψ − x‖² + λ_C λ(t) ½ [softplus(C(x_t^S)) + softplus(−C(x_t^T))], (R,)."""
        noise = draw.noise
        seen, denoised = inside.features_and_mean(self.critic, noise.x_t(draw.x.detach()), noise.t, **draw.batch)
        real = inside.features(self.critic, draw.real_t, noise.t, **draw.batch)
        told_apart = discriminator.of_head(logits(real), logits(seen)).mean(1) / 2
        weight = diffusion.dsm_weight(self.critic, noise.alpha, noise.sigma, self.sigma_data)
        return self.denoising_loss(denoised, draw) + self.critic_gan * weight * told_apart

    def generator_loss(self, draw: Draw) -> Tensor:
        """SiD's + λ_G w(t) softplus(−C(x_t))/N, (R,)."""
        of_data = self.teacher(draw.x_t, draw.noise.t, **draw.batch)
        seen, own = inside.features_and_mean(self.critic, draw.x_t, draw.noise.t, **draw.batch)
        passed_off = discriminator.of_student(logits(seen).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)).mean(1)
        passed_off = passed_off / error_of(of_data, draw.x).flatten()
        return self.identity(draw, of_data, own) + self.generator_gan * draw.noise.weight * passed_off

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """What others with a critic measure, and the adversarial term's share in what drives the samples."""
        return super().measure(draw) | {"adversarial_share": diagnostics.adversarial_share(self, draw)}

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """The critic on the student's samples and on real ones."""
        return 2 * latents * draws


def logits(features: Tensor) -> Tensor:
    """C, the mean over the channels of features (R, channels, *places): (R, places)."""
    return features.mean(1).flatten(1) if features.ndim > 2 else features.mean(1, keepdim=True)
