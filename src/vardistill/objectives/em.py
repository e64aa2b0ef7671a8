r"""EM distillation (EMD; Xie et al. 2024, arXiv 2405.16852): maximum likelihood by a chain in latent and noise.

The target is ρ_t(x_t, z) ∝ p_d^t(x_t) p_θ(z | x_t). With x_t = α_t g_θ(z) + σ_t ε and Δ = s_T − s_ψ at x_t, K steps of
Langevin dynamics from the draw's own z and ε,

    ε ← ε + γ_ε (σ_t Δ − ε) + √(2γ_ε) n
    z ← z + γ_z (α_t (∂g_θ/∂z)ᵀ Δ − z) + √(2γ_z) n′,

move both towards it, and the student is drawn to where x_t ends. Of the last ε all that is noise is cancelled, what
the chain began with and the n that came in on the way, so that the Δ_k, k = 0, ..., K − 1, are left:

    L = −w(t)/d ⟨sg Σ_k γ_ε (1 − γ_ε)^{K−1−k} Δ_k, α_t g_θ(sg z_K)⟩.

For K = 1 and γ_z = 0 it is γ_ε times Diff-Instruct's; the critic is fitted to the draw's samples, not to the chain's.
Recalled only: the sizes of the steps (γ_ε about 0.4², γ_z about 0.004²; K = 16 on ImageNet) and that the beginning of ε
is cancelled, too, which is exact for γ_z = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.errors import UsageError, require
from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import chain
    from vardistill.students import Student
else:
    torch = Later("torch")
    chain = Later("vardistill.objectives.chain")


@dataclass(frozen=True)
class EMDConfig(CriticConfig):
    """EM distillation: a Langevin chain towards the teacher, in latent and noise.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "emd"
    cost: ClassVar[int] = 16
    chain_length: int = 4
    """K."""
    noise_step: float = 0.16
    """γ_ε."""
    latent_step: float = 1.6e-5
    """γ_z."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("chain_length", self.chain_length, self.chain_length >= 1, "at least 1")
        require("noise_step", self.noise_step, 0 < self.noise_step < 1, "between 0 and 1")
        require("latent_step", self.latent_step, 0 <= self.latent_step < 1, "at least 0 and below 1")

    def build(self, parts: Parts) -> EMD:
        """The objective, with a fresh critic or a copy of the teacher."""
        assert parts.teacher is not None
        options = self.chain_length, self.noise_step, self.latent_step
        return EMD(parts.teacher, self.critic(parts), self.critic_steps, parts.data_std, *options)


class EMD(ScoreDistillation):
    """EM distillation.

    Args:
        teacher: as of `ScoreDistillation`.
        critic: likewise.
        critic_steps: likewise.
        sigma_data: likewise.
        chain_length: K.
        noise_step: γ_ε.
        latent_step: γ_z; 0 for a student of several steps, the law of whose latents is not known.
    """

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        critic_steps: int = 1,
        sigma_data: float = 1.0,
        chain_length: int = 4,
        noise_step: float = 0.16,
        latent_step: float = 1.6e-5,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.chain_length, self.noise_step, self.latent_step = chain_length, noise_step, latent_step

    @property
    def needs(self) -> Needs:
        """The chain's noise."""
        return Needs(eta=self.chain_length, xi=self.chain_length)

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError for a chain in latents whose law is not known, beside what others do."""
        super().check(student, condition)
        if student.steps > 1 and self.latent_step:
            raise UsageError("a student of several steps has latents of unknown law: set latent_step 0")

    def generator_loss(self, draw: Draw) -> Tensor:
        """−w(t)/d ⟨sg Σ_k γ_ε (1 − γ_ε)^{K−1−k} Δ_k, α_t g(z_K)⟩, (R,): only its gradient has a meaning."""
        z, _, drift = self.chain(draw)
        x = draw.generator(z) if self.latent_step else draw.x
        return -draw.noise.weight * inner(drift, diffusion.expand(draw.noise.alpha, x) * x)

    def chain(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """z_K (R, *latent), ε_K and the sum of the Δ_k (R, *data), without gradient.

        Raises:
            UsageError: for a draw without the chain's noise.
        """
        if draw.eta is None or draw.xi is None:
            raise UsageError(f"a chain of {self.chain_length} steps needs as many further latents and noises")
        noise, z, eps = draw.noise, draw.z, draw.noise.eps
        sigma = diffusion.expand(noise.sigma, eps)
        drift, g, g_z = torch.zeros_like(eps), self.noise_step, self.latent_step
        for n_z, n in zip(draw.eta[: self.chain_length], draw.xi[: self.chain_length], strict=True):
            towards = partial(self.towards, draw, sigma * eps)
            _, delta, pulled = chain.pull_back(draw.generator, z, towards)
            eps = (1 - g) * eps + g * sigma * delta + (2 * g) ** 0.5 * n
            drift = (1 - g) * drift + g * delta
            z = z + g_z * (diffusion.expand(noise.alpha, z) * pulled - z) + (2 * g_z) ** 0.5 * n_z
        return z, eps, drift

    def towards(self, draw: Draw, noise: Tensor, x: Tensor) -> Tensor:
        """Δ = s_T − s_ψ at α_t x + noise, (R, *data)."""
        x_t = diffusion.expand(draw.noise.alpha, x) * x + noise
        data, own = (diffusion.score(d, x_t, draw.noise.t, **draw.batch) for d in (self.teacher, self.critic))
        return data - own

    def evaluations(self, latents: int, draws: int) -> int:
        """The student, critic and teacher in each step of the chain, and the student at its end."""
        return (3 * self.chain_length + 1) * latents * draws
