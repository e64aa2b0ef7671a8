r"""Score-of-mixture distillation (SMD; Jayashankar, Ryu & Wornell 2025, arXiv 2502.09609).

The α-skew Jensen–Shannon divergences between the noisy marginals, with m = α p_d^t + (1 − α) p_θ^t:

    D_α = 1/α KL(p_θ^t ‖ m) + 1/(1 − α) KL(p_d^t ‖ m),   ∇_θ D_α = 1/α E (s_θ − s_m)ᵀ α_t ∂g_θ(z)/∂θ
    s_m = h s_T + (1 − h) s_θ,   h = logistic(ℓ + logit α),   ℓ = log p_d^t/p_θ^t

From the forward Kullback–Leibler divergence (α → 0) to the reverse one (α = 1, DMD). ℓ is the logit of a head on the
critic's features, which regression on the mixture's denoiser D_m = h D_T + (1 − h) D_ψ teaches:

    critic and head:  λ(t)/d [‖D_ψ − x‖² + (1 − α) ‖D_m − sg D_ψ‖² at x_t^S + α ‖D_m − D_T‖² at x_t^T]
    student:          w(t)/d ⟨h/α (D_ψ − D_T)/N, x⟩ + λ_G softplus(−(ℓ + logit α)),   N = mean |x − D_T|

α is uniform in [½, 1] for the student; for the critic it is 0 for a quarter of the rows and uniform in [0, 1] for the
others: all as in the authors' code, which has the adversarial term beside the paper's formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.errors import UsageError
from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Parts, inner
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

ZEROS = 0.25
"""Share of the critic's rows with α = 0."""


@dataclass(frozen=True)
class SMDConfig(AdversarialConfig):
    """SMD: divergences to mixtures of student and data; needs real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "smd"
    cost: ClassVar[int] = 29

    def build(self, parts: Parts) -> SMD:
        """The objective, with a fresh critic or a copy of the teacher, and a fresh head."""
        assert parts.teacher is not None
        critic = self.critic(parts)
        head = discriminator.Head.on(critic, parts)
        return SMD(parts.teacher, critic, head, self.critic_steps, parts.data_std, self.generator_gan)


class SMD(DMD):
    """Score-of-mixture distillation.

    Args:
        teacher: as of `ScoreDistillation`.
        critic: likewise, with an inner layer (`denoisers.features`) and differentiable in x_t.
        head: ℓ of the critic's features.
        critic_steps: as of `ScoreDistillation`.
        sigma_data: likewise.
        generator_gan: λ_G.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        head: Head,
        critic_steps: int = 5,
        sigma_data: float = 1.0,
        generator_gan: float = 3e-3,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.networks["head"] = self.head = head
        self.generator_gan = generator_gan

    @property
    def needs(self) -> Needs:
        """A latent, of which α is made."""
        return Needs(eta=1)

    @property
    def critic_needs(self) -> Needs:
        """The same, and real samples."""
        return Needs(real=True, eta=1)

    def critic_loss(self, draw: Draw) -> Tensor:
        """Denoising score matching, and the regression on the mixture's denoiser, (R,)."""
        alpha, noise = with_zeros(uniform(draw)), draw.noise
        h, far, denoised = self._mixed(noise.x_t(draw.x.detach()), alpha, draw)
        h_real, far_real, _ = self._mixed(draw.real_t, alpha, draw)
        mixed = (1 - alpha) * h**2 * far + alpha * (1 - h_real) ** 2 * far_real
        weight = diffusion.dsm_weight(self.critic, noise.alpha, noise.sigma, self.sigma_data)
        return self.denoising_loss(denoised, draw) + weight * mixed

    def _mixed(self, x_t: Tensor, alpha: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """h, ‖D_T − D_ψ‖²/d and D_ψ at x_t; the second without gradient."""
        seen, denoised = inside.features_and_mean(self.critic, x_t, draw.noise.t, **draw.batch)
        with torch.no_grad():
            difference = self.teacher(x_t, draw.noise.t, **draw.batch) - denoised
        h = (self.head(seen) + alpha.logit()).sigmoid()
        return h, inner(difference, difference), denoised

    def generator_loss(self, draw: Draw) -> Tensor:
        """DMD's, times h/α, + λ_G softplus(−(ℓ + logit α)), (R,)."""
        alpha = self.shares(draw)
        logits = self.head.logits(self.critic, draw.x_t, draw.noise.t, draw.batch) + alpha.logit()
        matching = logits.detach().sigmoid() / alpha * super().generator_loss(draw)
        return matching + self.generator_gan * discriminator.of_student(logits)

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """What others with a critic measure, and the adversarial term's share in what drives the samples."""
        return super().measure(draw) | {"adversarial_share": diagnostics.adversarial_share(self, draw)}

    def shares(self, draw: Draw) -> Tensor:
        """α of the student's loss, (R,)."""
        return (1 + uniform(draw)) / 2

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """Critic and teacher on the student's samples and on real ones."""
        return 4 * latents * draws

    def evaluations(self, latents: int, draws: int) -> int:
        """Critic, teacher, and the critic's features once more, with gradient."""
        return 3 * latents * draws


def uniform(draw: Draw) -> Tensor:
    """A number in [0, 1] for each row, (R,): Φ of the first coordinate of a further latent.

    Raises:
        UsageError: for a draw without one.
    """
    if draw.eta is None:
        raise UsageError("the share of the data in the mixture needs a further latent, draw.eta (1, R, *latent)")
    u: Tensor = torch.special.ndtr(draw.eta[0].flatten(1)[:, 0])
    return u


def with_zeros(u: Tensor) -> Tensor:
    """α of a critic's loss: 0 for a quarter of the rows, uniform for the others."""
    return ((u - ZEROS) / (1 - ZEROS)).clamp_min(0)
