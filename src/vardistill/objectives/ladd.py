r"""Adversarial distillation: LADD (Sauer et al. 2024, arXiv 2403.12015) and ADD (Sauer et al. 2023, arXiv 2311.17042).

A discriminator whose trunk is the frozen teacher: a head on its features of noisy samples, real ones and the student's
(`discriminator`). With C its logit, ρ the approximate R1 penalty and δ the loss, logistic or hinge,

    head:     w(t) [δ(C(x_t^S), C(x_t^T)) + λ_R ρ(x_t^T)]
    student:  w(t) [δ(C(x_t^S)) + λ_D c(t)/(d σ_d²) ‖x − sg D_T(x_t, t)‖²],   c = σ_d/√(r² + σ_d²)

LADD has no distillation term, λ_D = 0; ADD's is `sds` in x-space, and λ_D = 2.5 (whose reduction over the data axes we
could not check). Recalled only: LADD's levels, ln r ~ N(1, 1) for data of unit variance, and its weights. Here one
inner layer has a head where LADD has one on every block, ADD's trunk is the teacher and not DINOv2, and its heads are
not told the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vardistill.errors import require
from vardistill.lazy import Later
from vardistill.objectives.base import STUDENT, Needs, Objective, Parts, RealConfig, Update, inner

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
class LADDConfig(RealConfig):
    """LADD: a discriminator on the teacher's features; needs a learned teacher and real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "ladd"
    cost: ClassVar[int] = 6
    loss: Literal["logistic", "hinge"] = "logistic"
    """Of head and student."""
    r1: float = 1e-3
    """λ_R, weight of the penalty on the logit's slope at real samples."""
    distillation: float = 0.0
    """λ_D, weight of the teacher's error."""
    head_steps: int = 1
    """Updates of the head per update of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r1", "distillation"):
            value = getattr(self, name)
            require(name, value, 0 <= value < math.inf, "0 or positive, and finite")
        require("head_steps", self.head_steps, self.head_steps >= 1, "at least 1")

    def build(self, parts: Parts) -> LADD:
        """The objective with a fresh head."""
        assert parts.teacher is not None
        head = discriminator.Head.on(guidance.unguided(parts.teacher), parts)
        options = self.loss, self.r1, self.distillation, self.head_steps, parts.data_std
        return LADD(parts.teacher, head, *options)


@dataclass(frozen=True)
class ADDConfig(LADDConfig):
    """ADD: a hinge loss and the teacher's error; needs a learned teacher and real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "add"
    cost: ClassVar[int] = 7
    loss: Literal["logistic", "hinge"] = "hinge"
    r1: float = 1e-5
    distillation: float = 2.5


class LADD(Objective):
    """Adversarial distillation.

    Args:
        teacher: E[x | x_t], with an inner layer (`denoisers.features`) and differentiable in x_t; a guided one's
            features are those without guidance.
        head: C of the teacher's features.
        loss: `logistic` or `hinge`.
        r1: λ_R.
        distillation: λ_D.
        head_steps: updates of the head before each update of the student.
        sigma_data: σ_d.
    """

    teacher: Denoiser

    def __init__(
        self,
        teacher: Denoiser,
        head: Head,
        loss: Literal["logistic", "hinge"] = "logistic",
        r1: float = 1e-3,
        distillation: float = 0.0,
        head_steps: int = 1,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__(teacher, {"head": head})
        self.trunk, self.head, self.loss = guidance.unguided(teacher), head, loss
        inside.inner_layer(self.trunk)
        self.r1, self.distillation, self.head_steps, self.sigma_data = r1, distillation, head_steps, sigma_data

    def updates(self, progress: float = 0.0) -> list[Update]:
        """Of the head, `head_steps` times, and of the student."""
        head = Update(
            "head",
            ("head",),
            self.head_loss,
            Needs(real=True),
            repeats=self.head_steps,
            evaluations=lambda latents, draws: (3 if self.r1 else 2) * latents * draws,
        )
        return [head, Update(STUDENT, (STUDENT,), self.generator_loss, evaluations=self.evaluations)]

    def head_loss(self, draw: Draw) -> Tensor:
        """w(t) [δ(C(x_t^S), C(x_t^T)) + λ_R ρ(x_t^T)], (R,)."""
        noise = draw.noise
        generated, real = self._logits(noise.x_t(draw.x.detach()), draw), self._logits(draw.real_t, draw)
        loss = discriminator.of_head(real, generated, self.loss)
        if self.r1:
            slope = discriminator.approximate_r1(
                lambda x_t: self._logits(x_t, draw), real, draw.real_t, noise, self.sigma_data
            )
            loss = loss + self.r1 * slope
        return noise.weight * loss

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) [δ(C(x_t)) + λ_D c(t)/(d σ_d²) ‖x − sg D_T‖²], (R,)."""
        noise, loss = draw.noise, discriminator.of_student(self._logits(draw.x_t, draw), self.loss)
        if self.distillation:
            error = (draw.x - draw.denoised(self.teacher)) / self.sigma_data
            c = self.sigma_data / ((noise.sigma / noise.alpha) ** 2 + self.sigma_data**2).sqrt()
            loss = loss + self.distillation * c * inner(error, error)
        return noise.weight * loss

    def _logits(self, x_t: Tensor, draw: Draw) -> Tensor:
        return self.head.logits(self.trunk, x_t, draw.noise.t, draw.batch)

    def evaluations(self, latents: int, draws: int) -> int:
        """The teacher's features, and where it distils the teacher."""
        return (2 if self.distillation else 1) * latents * draws
