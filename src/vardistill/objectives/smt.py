r"""Score-of-mixture training (SMT; Jayashankar, Ryu & Wornell 2025, arXiv 2502.09609): SMD without a teacher.

One denoiser D(x_t, t, α) learns all mixtures m = α p_d^t + (1 − α) p_θ^t from samples, data at α = 1 and student at 0:

    critic and head:  λ(t)/d [(1 − α) ‖D(x_t^S, t, α) − x‖² + α ‖D(x_t^T, t, α) − y‖²]
                      + λ_C [softplus(C(x_t^S)) + softplus(−C(x_t^T))]
    student:          w(t)/d ⟨(D_0 − D_α)/N, x⟩ + λ_G softplus(−C(x_t^S))
    N = mean |x − D_1| · rms(D_0 − D_α)/rms(D_0 − D_1)

α sets the direction; the length is that of α = 1, DMD's. The shares α are those of `smd`, the weights the authors'
code's, whose C also sees α: as ½, where its loss is this one. Here α scales and shifts the channels of the critic's
inner layer (`denoisers.of_mixtures`), where the authors add an embedding of it to that of the time; their warm-up of
the student as a denoiser is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vardistill import diffusion
from vardistill.lazy import Later
from vardistill.objectives.base import STUDENT, Needs, Objective, Parts, Update, inner
from vardistill.objectives.critic import SMALLEST_ERROR, AdversarialConfig, error_of
from vardistill.objectives.smd import uniform, with_zeros

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vardistill import networks
    from vardistill.denoisers import of_mixtures
    from vardistill.denoisers.of_mixtures import OfMixtures
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import diagnostics, discriminator
    from vardistill.objectives.discriminator import Head
    from vardistill.students import Student
else:
    torch, networks = Later("torch"), Later("vardistill.networks")
    of_mixtures = Later("vardistill.denoisers.of_mixtures")
    diagnostics = Later("vardistill.objectives.diagnostics")
    discriminator = Later("vardistill.objectives.discriminator")


@dataclass(frozen=True)
class SMTConfig(AdversarialConfig):
    """SMT: divergences to mixtures of student and data, from samples alone.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "smt"
    cost: ClassVar[int] = 30
    critic_gan: float = 1e-2
    """λ_C, weight of the discriminator beside denoising score matching."""

    @property
    def takes_teacher(self) -> bool:
        """Whether a teacher's samples stand for the data; a critic may start as it, too."""
        return self.real == "teacher" or self.critic_start == "teacher"

    def build(self, parts: Parts) -> SMT:
        """The objective, with a fresh critic or a copy of the teacher, and a fresh head."""
        critic = self.critic(parts)
        head = discriminator.Head.on(critic, parts)
        with networks.initial_weights(parts.seed + 5):
            of_all = of_mixtures.OfMixtures(critic, head.channels)
        return SMT(of_all, head, self.critic_steps, parts.data_std, self.generator_gan, self.critic_gan, parts.teacher)


class SMT(Objective):
    """Score-of-mixture training.

    Args:
        critic: D(x_t, t, α), all of it trained.
        head: C of the features of its network.
        critic_steps: updates of the critic before each update of the student.
        sigma_data: σ_d of the critic's weight, where it does not tell what its network predicts.
        generator_gan: λ_G.
        critic_gan: λ_C.
        teacher: only where the real samples are its own.
    """

    def __init__(
        self,
        critic: OfMixtures,
        head: Head,
        critic_steps: int = 5,
        sigma_data: float = 1.0,
        generator_gan: float = 3e-3,
        critic_gan: float = 1e-2,
        teacher: Denoiser | None = None,
    ) -> None:
        super().__init__(teacher, {"critic": critic.requires_grad_(True), "head": head})
        self.critic, self.head, self.critic_steps, self.sigma_data = critic, head, critic_steps, sigma_data
        self.generator_gan, self.critic_gan = generator_gan, critic_gan

    def updates(self, progress: float = 0.0) -> list[Update]:
        """Of critic and head, `critic_steps` times, and of the student."""
        critic = Update(
            "critic",
            ("critic", "head"),
            self.critic_loss,
            Needs(real=True, eta=1),
            repeats=self.critic_steps,
            evaluations=lambda latents, draws: 4 * latents * draws,
        )
        return [critic, Update(STUDENT, (STUDENT,), self.generator_loss, self.needs, evaluations=self.evaluations)]

    @property
    def needs(self) -> Needs:
        """A latent, of which α is made."""
        return Needs(eta=1)

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless the critic takes the student's samples and can be trained."""
        super().check(student, condition)
        parameter = next(student.parameters())
        diffusion.check_denoiser(self.critic, student.data_shape, parameter, condition, "critic", trained=True)

    def critic_loss(self, draw: Draw) -> Tensor:
        """Denoising score matching of both samples, and the discriminator's loss, (R,)."""
        share, noise, x = with_zeros(uniform(draw)), draw.noise, draw.x.detach()
        assert draw.real is not None
        weight = diffusion.dsm_weight(self.critic, noise.alpha, noise.sigma, self.sigma_data)
        own, real = (
            self.critic(x_t, noise.t, share, **draw.batch) - clean
            for x_t, clean in ((noise.x_t(x), x), (draw.real_t, draw.real))
        )
        told_apart = discriminator.of_head(self._logits(draw.real_t, draw), self._logits(noise.x_t(x), draw))
        matching = (1 - share) * inner(own, own) + share * inner(real, real)
        return weight * matching + self.critic_gan * told_apart

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d ⟨(D_0 − D_α)/N, x⟩ + λ_G softplus(−C(x_t)), (R,)."""
        share = (1 + uniform(draw)) / 2
        with torch.no_grad():
            own, mixed, data = (
                self.critic(draw.x_t, draw.noise.t, a, **draw.batch) for a in (0 * share, share, share**0)
            )
            lengths = [inner(own - other, own - other).sqrt().clamp_min(SMALLEST_ERROR) for other in (mixed, data)]
            field = (own - mixed) / error_of(data, draw.x) * diffusion.expand(lengths[1] / lengths[0], own)
        passed_off = discriminator.of_student(self._logits(draw.x_t, draw))
        return draw.noise.weight * inner(field, draw.x) + self.generator_gan * passed_off

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """Only the adversarial term's share in what drives the samples."""
        return {"adversarial_share": diagnostics.adversarial_share(self, draw)}

    def _logits(self, x_t: Tensor, draw: Draw) -> Tensor:
        return self.head.logits(self.critic.denoiser, x_t, draw.noise.t, draw.batch)

    def evaluations(self, latents: int, draws: int) -> int:
        """The critic at three α, and its features once more, with gradient."""
        return 4 * latents * draws
