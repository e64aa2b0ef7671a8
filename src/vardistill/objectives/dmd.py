r"""Distribution matching distillation: DMD (Yin et al. 2023, arXiv 2311.18828).

The score difference between critic and teacher in x-space, brought to one size at all noise levels (eq. 7 and 8):

    ∇_θ = E w(t)/d (D_ψ − D_T)(x_t, t)ᵀ/N ∂g_θ(z)/∂θ,   N = mean |x − D_T|,

which is Diff-Instruct's under the weight (σ_t/α_t)²/N; and a regression on stored pairs of the teacher's noise and
sample, λ_P ‖φ(g_θ(z)) − φ(y)‖² (`pairs`), with λ_P = 0.25 and LPIPS in the paper. Here pairs are drawn only where they
are asked for: later methods leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from vardistill.errors import require
from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Parts, inner
from vardistill.objectives.critic import CriticConfig, ScoreDistillation, error_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import pairs as stored
    from vardistill.objectives.pairs import Distance, StoredPairs
    from vardistill.students import Student
else:
    torch = Later("torch")
    stored = Later("vardistill.objectives.pairs")


@dataclass(frozen=True)
class DMDConfig(CriticConfig):
    """DMD: Diff-Instruct's field at one size for all noise levels, and a regression on the teacher's pairs.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "dmd"
    cost: ClassVar[int] = 5
    pairs: int = 0
    """Stored pairs of the teacher's noise and sample, drawn at the start; 0 for no regression."""
    pair_weight: float = 0.25
    """λ_P."""
    pair_steps: int = 18
    """Steps of the teacher's sampler."""
    pair_space: Literal["data", "classifier", "teacher", "lpips"] = "data"
    """Where pairs are compared: the samples themselves, or of pictures a space of VarFlow's, or LPIPS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("pairs", self.pairs, self.pairs >= 0, "0 or positive")
        require("pair_steps", self.pair_steps, self.pair_steps >= 1, "at least 1")
        require("pair_weight", self.pair_weight, 0 < self.pair_weight < math.inf, "positive and finite")

    def build(self, parts: Parts) -> DMD:
        """The objective, with a fresh critic or a copy of the teacher; its pairs are drawn when they are first used."""
        teacher, student = parts.teacher, parts.student
        assert teacher is not None
        core = teacher, self.critic(parts), self.critic_steps, parts.data_std
        if not self.pairs:
            return DMD(*core)

        def make() -> StoredPairs:
            rng = torch.Generator(next(student.parameters()).device).manual_seed(parts.seed + 4)
            return stored.teacher_pairs(teacher, student, self.pairs, rng, self.pair_steps, parts.conditions)

        lpips = self.pair_space == "lpips"
        of_space = stored.lpips() if lpips else stored.mean_square(parts.space(self.pair_space), parts.data_std)
        return DMD(*core, make, of_space, self.pair_weight)


class DMD(ScoreDistillation):
    """Distribution matching distillation.

    Args:
        teacher: as of `ScoreDistillation`.
        critic: likewise.
        critic_steps: likewise.
        sigma_data: likewise.
        pairs: makes the stored pairs, once; None for no regression.
        distance: of the student's sample of a pair and the teacher's; default their mean square in units of σ_d.
        pair_weight: λ_P.
    """

    scores_by_teacher: ClassVar[bool] = True

    def __init__(
        self,
        teacher: Denoiser,
        critic: Denoiser,
        critic_steps: int = 1,
        sigma_data: float = 1.0,
        pairs: Callable[[], StoredPairs] | None = None,
        distance: Distance | None = None,
        pair_weight: float = 0.25,
    ) -> None:
        super().__init__(teacher, critic, critic_steps, sigma_data)
        self.make_pairs, self.pair_weight = pairs, pair_weight
        self.distance = distance or stored.mean_square(None, sigma_data)

    @cached_property
    def pairs(self) -> StoredPairs | None:
        """The stored pairs."""
        return None if self.make_pairs is None else self.make_pairs()

    @property
    def needs(self) -> Needs:
        """A latent that points to a pair."""
        return Needs(eta=0 if self.make_pairs is None else 1)

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError for pairs of a student that has none, beside what others do."""
        super().check(student, condition)
        if self.make_pairs is not None:
            stored.check_pairs(student)

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t)/d ⟨(D_ψ − D_T)/N, x⟩ + λ_P ‖φ(g(z)) − φ(y)‖², (R,): only its gradient has a meaning."""
        of_data = draw.denoised(self.teacher)
        field = (draw.denoised(self.critic) - of_data) / error_of(of_data, draw.x)
        matching = draw.noise.weight * inner(field, draw.x)
        if self.pairs is None:
            return matching
        z, y = self.pairs.pick(draw)
        return matching + self.pair_weight * self.distance(draw.generator(z), y)
