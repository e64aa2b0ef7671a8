r"""A weighted sum of objectives is an objective: L = Σ_i λ_i L_i, with one generator pass for all parts.

VarDiU + λ·VarFlow is the first use: the energy distance covers, the diffusive KL sharpens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.errors import UsageError, require
from vardistill.objectives.base import Objective
from vardistill.students.student import Student
from vardistill.training.data import Conditions

PartWeight = float | Callable[[float], float]
"""λ, or λ as a function of the run's progress ∈ [0, 1]."""


@dataclass(frozen=True)
class Part:
    """A term of a sum.

    Attributes:
        objective: L_i.
        weight: λ_i.
        levels: noise levels of its own; None for the run's.
        name: of its curves; default the objective's class in lower case.

    Raises:
        UsageError: for what is no objective, or a weight that is neither a finite number nor a function.
    """

    objective: Objective
    weight: PartWeight = 1.0
    levels: NoiseLevels | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise UsageError(f"a part of a sum must be an objective, but is {type(self.objective).__name__}")
        known = callable(self.weight) or (isinstance(self.weight, Real) and math.isfinite(self.weight))
        require("weight", self.weight, known, "a finite number, or a function of the run's progress")

    @property
    def label(self) -> str:
        """Its name in logs."""
        return self.name or type(self.objective).__name__.lower()

    def weight_at(self, progress: float) -> float:
        """λ_i at this progress of the run."""
        return self.weight(progress) if callable(self.weight) else self.weight


class WeightedSum(Objective):
    """Σ_i λ_i L_i.

    Parts with a critic are all updated in each of the largest number of critic steps among them.

    Args:
        parts: the terms.

    Raises:
        UsageError: for no parts, what is no `Part`, sums as parts, parts of one name, different teachers or pools, or
            drawn candidates under own levels.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise UsageError("a sum needs at least one part")
        for part in parts:
            if not isinstance(part, Part):
                raise UsageError(f"the parts of a sum are Part(objective, weight), but one is {type(part).__name__}")
        labels = [part.label for part in parts]
        if len(set(labels)) < len(labels):
            raise UsageError(f"the parts of a sum need different names, but are {', '.join(labels)}: give Part(name=)")
        teachers = [part.objective.teacher for part in parts if part.objective.teacher is not None]
        if any(teacher is not teachers[0] for teacher in teachers):
            raise UsageError("the parts of a sum must have the same teacher")
        if any(part.levels is not None and part.objective.fresh_latents for part in parts):
            raise UsageError("a part that draws candidates from its posterior needs the run's levels, not its own")
        for part in parts:
            if part.objective.compares_groups and part.levels is not None and not part.levels.shared:
                raise UsageError(f"{part.label} compares groups of one level: share its levels, for example shared=8")
        if any(isinstance(part.objective, WeightedSum) for part in parts):
            raise UsageError("a sum of sums is one sum: list its parts directly")
        if len(pools := {part.objective.pool_latents for part in parts} - {0}) > 1:
            raise UsageError(f"parts with pools of candidates share one pool, but these want {sorted(pools)}")
        super().__init__(teachers[0] if teachers else None)
        objectives = [part.objective for part in parts]
        self._set_terms(parts)
        self.modules_of_parts = nn.ModuleList(objectives)
        self.critic_steps = max(o.critic_steps for o in objectives)
        self.fresh_latents = max(o.fresh_latents for o in objectives)
        self.pool_latents = max(o.pool_latents for o in objectives)
        self.needs_real = any(o.needs_real for o in objectives)
        self.smallest_batch = max(o.smallest_batch for o in objectives)

    def _set_terms(self, terms: Sequence[Part]) -> None:
        """Take the terms, and what follows from their levels."""
        self.terms = tuple(terms)
        self.compares_groups = any(part.objective.compares_groups and part.levels is None for part in terms)
        self.other_levels = tuple(part.levels for part in terms if part.levels is not None)

    def with_shared(self, levels: NoiseLevels) -> WeightedSum:
        """The same sum, these the levels of the parts that compare groups and have none of their own."""
        both = copy.copy(self)
        both._set_terms(
            [
                replace(part, levels=levels) if part.objective.compares_groups and part.levels is None else part
                for part in self.terms
            ]
        )
        return both

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one is the sum of."""
        return tuple(part.objective for part in self.terms)

    def draws(self, draw: Draw) -> list[tuple[str, Objective, Draw]]:
        """The parts with a prefix of their names and the draws that they see."""
        return [(f"{part.label}/", part.objective, own) for part, own in self._draws(draw)]

    def check(self, generator: Student, conditions: Conditions | None = None) -> None:
        """Raise UsageError unless all parts take the generator's latents and samples."""
        for objective in self.parts:
            objective.check(generator, conditions)

    def auxiliary_state(self) -> dict[str, Tensor]:
        """The parts' states, by their names."""
        return {
            f"{part.label}.{name}": v for part in self.terms for name, v in part.objective.auxiliary_state().items()
        }

    def generator_loss(self, draw: Draw) -> Tensor:
        """Σ_i λ_i L_i; a part with levels of its own is meaned over each latent's rows first, (R,)."""
        total = torch.zeros_like(draw.noise.weight)
        for part, own in self._draws(draw):
            total = total + part.weight_at(draw.progress) * _to_rows(part.objective.generator_loss(own), own, draw)
        return total

    def critic_loss(self, draw: Draw) -> Tensor:
        """The sum over the parts that have a critic, (R,)."""
        total = torch.zeros_like(draw.noise.weight)
        for part, own in self._draws(draw):
            if part.objective.critic_steps:
                total = total + _to_rows(part.objective.critic_loss(own), own, draw)
        return total

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """Those of all parts; in the critic's update of the parts that have one."""
        updated = [part for part in self.terms if part.objective.critic_steps or not critic]
        return sum(
            part.objective.evaluations(latents, draws if part.levels is None else part.levels.draws, critic)
            for part in updated
        )

    @torch.no_grad()
    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """Each part's mean loss and weight, `NAME/loss` and `NAME/weight`, and its own diagnostics.

        These keep their names, but for those that an earlier part has, which become `NAME/...`.
        """
        out: dict[str, Tensor] = {}
        for part, own in self._draws(draw):
            loss = part.objective.generator_loss(own).mean()
            out |= {f"{part.label}/loss": loss, f"{part.label}/weight": loss.new_tensor(part.weight_at(draw.progress))}
            for name, v in part.objective.diagnostics(own).items():
                out[f"{part.label}/{name}" if name in out else name] = v
        return out

    def _draws(self, draw: Draw) -> list[tuple[Part, Draw]]:
        """Every part with the draw that it sees."""
        if len(draw.other_noise) < len(self.other_levels):
            raise UsageError(f"the sum needs {len(self.other_levels)} further draws of noise as draw.other_noise")
        others = iter(draw.other_noise)
        return [(part, draw if part.levels is None else draw.under(next(others))) for part in self.terms]


def _to_rows(loss: Tensor, own: Draw, draw: Draw) -> Tensor:
    """A part's loss per row of its own draw as one per row of the common one, of the same mean."""
    if own is draw:
        return loss
    return draw.noise.rows(loss.view(-1, own.noise.latents).mean(0))
