r"""f-distill (Xu et al. 2025, arXiv 2502.15681): the gradient of an f-divergence between noisy marginals.

DMD2's field, each sample weighted by its density ratio, which the discriminator's logit at the same x_t tells:

    ∇_θ = E w(t)/d h(r) (D_ψ − D_T)(x_t, t)ᵀ/N ∂g_θ(z)/∂θ,   r = p_d^t/p_θ^t = exp C(x_t),   h = f″(r) r²

| divergence | h(r) |
|---|---|
| reverse Kullback–Leibler (DMD2) | 1 |
| forward Kullback–Leibler | r |
| Jensen–Shannon | r/(1 + r) |
| softened reverse Kullback–Leibler | 1/(1 + r) |
| squared Hellinger | √r |
| Jeffreys | 1 + r |

C is clamped to ±10 and r to [0.1, 20]; h is divided by its batch's mean (over all processes), so its scale does not
change the learning rate. (The authors' code can also divide r by its mean at neighbouring times; off by default.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vardistill.errors import unknown
from vardistill.lazy import Later
from vardistill.objectives.base import Parts
from vardistill.objectives.dmd2 import DMD2, DMD2Config

if TYPE_CHECKING:
    from torch import Tensor

    from vardistill import processes
    from vardistill.diffusion import Denoiser
    from vardistill.objectives import discriminator
    from vardistill.objectives.discriminator import Head
else:
    processes = Later("vardistill.processes")
    discriminator = Later("vardistill.objectives.discriminator")

Divergence = Literal["forward-kl", "reverse-kl", "jensen-shannon", "softened-reverse-kl", "hellinger", "jeffreys"]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda r: r,
    "reverse-kl": lambda r: r**0,
    "jensen-shannon": lambda r: r / (1 + r),
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "hellinger": lambda r: r.sqrt(),
    "jeffreys": lambda r: 1 + r,
}
"""h(r) by the divergence."""
LARGEST_LOGIT, RATIOS = 10.0, (0.1, 20.0)
"""Where C and r are clamped, as the authors do."""


@dataclass(frozen=True)
class FDistillConfig(DMD2Config):
    """f-distill: DMD2 with samples weighted by a discriminator's density ratio; needs real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "f-distill"
    cost: ClassVar[int] = 19
    divergence: Divergence = "forward-kl"
    """Whose gradient the student follows."""

    def build(self, parts: Parts) -> FDistill:
        """The objective, with a fresh critic or a copy of the teacher, and a fresh head."""
        assert parts.teacher is not None
        critic = self.critic(parts)
        head = discriminator.Head.on(critic, parts)
        gan = self.generator_gan, self.critic_gan
        return FDistill(parts.teacher, critic, head, self.critic_steps, parts.data_std, *gan, self.divergence)


class FDistill(DMD2):
    """The gradient of an f-divergence.

    Args:
        teacher: as of `DMD2`.
        critic: likewise.
        head: likewise.
        critic_steps: likewise.
        sigma_data: likewise.
        generator_gan: likewise.
        critic_gan: likewise.
        divergence: `forward-kl`, `reverse-kl`, `jensen-shannon`, `softened-reverse-kl`, `hellinger` or `jeffreys`.

    Raises:
        UsageError: for an unknown divergence.
    """

    couples_rows: ClassVar[bool] = True

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        head: Head,
        critic_steps: int = 5,
        sigma_data: float = 1.0,
        generator_gan: float = 3e-3,
        critic_gan: float = 1e-2,
        divergence: Divergence = "forward-kl",
    ) -> None:
        super().__init__(teacher, critic, head, critic_steps, sigma_data, generator_gan, critic_gan)
        if divergence not in WEIGHTS:
            raise unknown("divergence", divergence, WEIGHTS)
        self.divergence = divergence

    def field_weight(self, logits: Tensor) -> Tensor:
        """h(r) over its mean in the batch, (R,)."""
        ratio = logits.detach().clamp(-LARGEST_LOGIT, LARGEST_LOGIT).exp().clamp(*RATIOS)
        h = WEIGHTS[self.divergence](ratio)
        return h / processes.gather(h).mean()
