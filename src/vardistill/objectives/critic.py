r"""Score distillation: objectives with a critic D_ψ, a denoiser of the student's own samples.

The student's noisy score s_θ has no closed form, so a critic is fitted to its samples by denoising score matching,

    E λ(t)/d ‖D_ψ(x_t, t) − x‖²,  x = g_θ(z),

with λ(t) the weight under which this is the squared error of what the critic's network predicts (`dsm_weight`; for
EDM's preconditioning it is EDM's). What the student then makes of s_ψ − s_T, each method says in its own file. Of a
student of n steps, p_θ is the mixture of what its steps return.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Literal

from vardistill import diffusion
from vardistill.choices import check_choices
from vardistill.errors import UsageError, require
from vardistill.lazy import Later
from vardistill.objectives.base import STUDENT, Needs, Objective, Parts, RealConfig, Update, inner

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vardistill.diffusion import Denoiser, Draw
    from vardistill.students import Student
else:
    torch, nn = Later("torch"), Later("torch.nn")


@dataclass(frozen=True)
class CriticConfig:
    """The critic of an objective.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    critic_steps: int = 1
    """Critic updates per generator update."""
    critic_start: Literal["fresh", "teacher"] = "fresh"
    """Initial critic: new weights, or those of a learned teacher."""
    critic_depth: int = 4
    """Hidden layers of a fresh critic of points."""
    critic_width: int = 256
    """Units of its hidden layers."""
    critic_rank: int = 0
    """Rank of adapters on the teacher's frozen weights, as a critic of pictures that starts as the teacher; 0 trains
    a copy of all weights."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("critic_steps", "critic_depth", "critic_width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("critic_rank", self.critic_rank, self.critic_rank >= 0, "0 or positive")
        starts = self.critic_start == "teacher" or not self.critic_rank
        require("critic_start", self.critic_start, starts, "'teacher' with a critic_rank")

    def critic(self, parts: Parts) -> Denoiser:
        """A fresh critic, a copy of the teacher, or adapters on it."""
        sizes = {"depth": self.critic_depth, "width": self.critic_width, "rank": self.critic_rank}
        return parts.critic(self.critic_start, **sizes)


@dataclass(frozen=True)
class AdversarialConfig(RealConfig, CriticConfig):
    """A critic with a discriminator on its features, which needs real samples.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    critic_steps: int = 5
    generator_gan: float = 3e-3
    """λ_G, weight of the student's adversarial term."""

    def __post_init__(self) -> None:
        CriticConfig.__post_init__(self)
        RealConfig.__post_init__(self)
        for weight in fields(self):
            if weight.name.endswith("_gan"):
                value = getattr(self, weight.name)
                require(weight.name, value, 0 <= value < math.inf, "0 or positive, and finite")


class ScoreDistillation(Objective):
    """What objectives with a critic share; each has a `generator_loss` of its own.

    Args:
        teacher: E[x | x_t] of the data.
        critic: D_ψ, a denoiser with parameters, under the teacher's schedule: fresh, or a copy of the teacher.
        critic_steps: updates of the critic before each update of the generator.
        sigma_data: σ_d of the critic's weight, where the critic does not tell what its network predicts.

    Attributes:
        couples_rows: whether a row's loss depends on the samples of others.
        tells_score: whether the critic is fitted to the student's samples alone, so that s_ψ estimates its score.

    Raises:
        UsageError: for a critic without parameters, of another schedule, or that shares parameters with the teacher;
            for fewer than one critic step, or a σ_d that is not positive and finite.
    """

    teacher: Denoiser
    couples_rows: ClassVar[bool] = False
    tells_score: ClassVar[bool] = True

    def __init__(self, teacher: Denoiser, critic: Denoiser, critic_steps: int = 1, sigma_data: float = 1.0) -> None:
        whole = isinstance(critic_steps, Integral) and critic_steps >= 1
        require("critic_steps", critic_steps, whole, "a whole number, at least 1")
        require("sigma_data", sigma_data, 0 < sigma_data < math.inf, "positive and finite")
        if not isinstance(critic, nn.Module) or next(critic.parameters(), None) is None:
            raise UsageError(f"the critic must be a module with parameters, but {type(critic).__name__} has none")
        if isinstance(teacher, nn.Module) and set(critic.parameters()) & set(teacher.parameters()):
            raise UsageError("the critic is trained and the teacher is not: give a copy.deepcopy of the teacher")
        diffusion.require_denoiser(critic, "critic")
        super().__init__(teacher, {"critic": critic.requires_grad_(True)})
        if not diffusion.same_schedule(critic.schedule, teacher.schedule):
            raise UsageError(f"the critic's schedule is {critic.schedule}, but the teacher's is {teacher.schedule}")
        self.critic: Denoiser = critic
        self.critic_steps, self.sigma_data = critic_steps, sigma_data

    def updates(self, progress: float = 0.0) -> list[Update]:
        """Of the critic and what is trained with it, `critic_steps` times, and of the student."""
        critic = Update(
            "critic",
            tuple(self.networks),
            self.critic_loss,
            self.critic_needs,
            repeats=self.critic_steps,
            evaluations=self.critic_evaluations,
        )
        student = Update(
            STUDENT,
            (STUDENT,),
            self.generator_loss,
            self.needs,
            couples_rows=self.couples_rows,
            evaluations=self.evaluations,
        )
        return [critic, student]

    @property
    def critic_needs(self) -> Needs:
        """What the critic's update needs drawn."""
        return Needs()

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless teacher and critic take the student's samples, and the critic can be trained."""
        super().check(student, condition)
        parameter = next(student.parameters())
        diffusion.check_denoiser(self.critic, student.data_shape, parameter, condition, "critic", trained=True)

    def critic_loss(self, draw: Draw) -> Tensor:
        """Denoising score matching on the student's samples, (R,)."""
        x, noise = draw.x.detach(), draw.noise
        return self.denoising_loss(self.critic(noise.x_t(x), noise.t, **draw.batch), draw)

    def denoising_loss(self, denoised: Tensor, draw: Draw) -> Tensor:
        """λ(t)/d ‖D(x_t, t) − x‖², (R,)."""
        weight = diffusion.dsm_weight(self.critic, draw.noise.alpha, draw.noise.sigma, self.sigma_data)
        error = denoised - draw.x.detach()
        return weight * inner(error, error)

    def score_difference(self, draw: Draw) -> Tensor:
        """s_ψ − s_T at x_t, (R, *data), without gradient."""
        return draw.score(self.critic) - draw.score(self.teacher)

    def critic_evaluations(self, latents: int, draws: int) -> int:
        """The critic on the student's samples."""
        return latents * draws

    def evaluations(self, latents: int, draws: int) -> int:
        """Critic and teacher."""
        return 2 * latents * draws

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """The critic's loss over the teacher's; the estimated Fisher divergence E w/d ‖s_ψ − s_T‖²."""
        with torch.no_grad():
            difference = self.score_difference(draw)
            own, teachers = (
                self.denoising_loss(draw.denoised(denoiser), draw).mean() for denoiser in (self.critic, self.teacher)
            )
            fisher = draw.noise.weight * inner(difference, difference)
            return {"critic_lag": own / teachers, "fisher": fisher.mean()}


SMALLEST_ERROR = 1e-5
"""Of `error_of`: a sample at the teacher's own mean is divided by this."""


def error_of(denoised: Tensor, x: Tensor) -> Tensor:
    """N = 1/d Σ_i |x_i − D_i| of each row, (R, 1, ...), without gradient.

    The normaliser of DMD and SiD: it brings gradients of all noise levels to one size (DMD, eq. 8).
    """
    with torch.no_grad():
        mean = (x - denoised).abs().flatten(1).mean(1).clamp_min(SMALLEST_ERROR)
    return diffusion.expand(mean, x)
