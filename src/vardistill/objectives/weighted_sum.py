r"""A weighted sum of objectives is an objective: L = Σ_i λ_i L_i, with one generator pass for all parts.

VarDiU + λ·VarFlow is the first use: the energy distance covers, the diffusive KL sharpens. As all losses are means over
the data axes, a λ means the same in any dimension. What a part trains beside the student has updates of its own.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING

from vardistill.errors import UsageError, require
from vardistill.lazy import Later
from vardistill.objectives.base import STUDENT, Needs, Objective, Term, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vardistill.diffusion import Draw, NoiseLevels
    from vardistill.students import Student
else:
    torch = Later("torch")

PartWeight = float | Callable[[float], float]
"""λ, or λ as a function of the run's progress ∈ [0, 1]."""


@dataclass(frozen=True)
class Geometric:
    """start^(1−p) · end^p at progress p."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        """The value at this progress."""
        return float(self.start ** (1 - progress) * self.end**progress)


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

    def updates(self, progress: float) -> list[Update]:
        """The objective's, under the part's levels where it has its own."""
        found = list(self.objective.updates(progress))
        if self.levels is None:
            return found
        return [replace(update, needs=replace(update.needs, levels=self.levels)) for update in found]


class WeightedSum(Objective):
    """Σ_i λ_i L_i.

    Args:
        parts: the terms.

    Raises:
        UsageError: for no parts, what is no `Part`, sums as parts, parts of one name, different teachers or pools, or
            further latents or noise under own levels.
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
        if any(isinstance(part.objective, WeightedSum) for part in parts):
            raise UsageError("a sum of sums is one sum: list its parts directly")
        self.summands = tuple(parts)
        frozen = [module for part in parts for module in part.objective.frozen]
        super().__init__(teachers[0] if teachers else None, self._own_networks(), frozen)
        students = [self._student_update(part, 0.0) for part in parts]
        if any(update.needs.levels is not None and (update.needs.eta or update.needs.xi) for update in students):
            raise UsageError("a part that needs further latents or noise needs the run's levels, not its own")
        if len({update.needs.per_condition for update in students if update.needs.groups}) > 1:
            raise UsageError("the parts of a sum that compare groups must have the same per_condition")
        for part, update in zip(parts, students, strict=True):
            if update.needs.groups and update.needs.levels is not None and not update.needs.levels.shared:
                raise UsageError(f"{part.label} compares groups of one level: share its levels, for example shared=8")
        if len(pools := {update.needs.pool for update in students} - {0}) > 1:
            raise UsageError(f"parts with pools of candidates share one pool, but these want {sorted(pools)}")

    def _own_networks(self) -> dict[str, nn.Module]:
        """The parts' networks; names that several parts have are PART.NAME."""
        counts = Counter(name for part in self.summands for name in part.objective.networks)
        return {
            self._name(part, name, counts[name] > 1): network
            for part in self.summands
            for name, network in part.objective.networks.items()
        }

    def _name(self, part: Part, name: str, ambiguous: bool) -> str:
        return f"{part.label}.{name}" if ambiguous else name

    def _names(self, part: Part) -> dict[str, str]:
        """What a part calls its networks, and what the sum does."""
        own = {id(network): name for name, network in self.networks.items()}
        return {STUDENT: STUDENT} | {name: own[id(network)] for name, network in part.objective.networks.items()}

    def with_shared(self, levels: NoiseLevels) -> WeightedSum:
        """The same sum, these the levels of the parts that compare groups and have none of their own."""
        both = copy.copy(self)
        both.summands = tuple(
            replace(part, levels=levels) if part.objective.needs.groups and part.levels is None else part
            for part in self.summands
        )
        return both

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one is the sum of."""
        return tuple(part.objective for part in self.summands)

    def terms(self, draw: Draw) -> list[Term]:
        """The parts with a prefix of their names and the draws that they see."""
        return [Term(f"{part.label}/", part.objective, own) for part, own in self._draws(draw)]

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless all parts take the student's latents and samples."""
        for objective in self.parts:
            objective.check(student, condition)

    @property
    def needs(self) -> Needs:
        """What all parts need, in one draw."""
        needs = [self._student_update(part, 0.0).needs for part in self.summands]
        return Needs(
            real=any(n.real for n in needs),
            eta=max(n.eta for n in needs),
            xi=max(n.xi for n in needs),
            pool=max(n.pool for n in needs),
            groups=any(n.groups and n.levels is None for n in needs),
            other_levels=tuple(n.levels for n in needs if n.levels is not None),
            smallest_batch=max(n.smallest_batch for n in needs),
            per_condition=max(n.per_condition for n in needs),
        )

    def updates(self, progress: float = 0.0) -> list[Update]:
        """Those of the parts' own networks, and one of the student under all losses."""
        found, trains, couples = [], {STUDENT: None}, False
        for part in self.summands:
            names, jointly = self._names(part), self._student_update(part, progress).trains
            for update in part.updates(progress):
                renamed = replace(update, trains=tuple(names[name] for name in update.trains))
                if update.trains_student:
                    trains |= dict.fromkeys(renamed.trains)
                    couples |= update.couples_rows
                    continue
                if set(update.trains) & set(jointly):  # a network has one weighting in all of its updates
                    renamed = replace(renamed, loss=_weighted(part, update))
                found.append(replace(renamed, name=names.get(update.name, update.name)))
        student = Update(
            STUDENT,
            tuple(trains),
            self.generator_loss,
            self.needs,
            couples_rows=couples,
            evaluations=self.evaluations,
        )
        return [*found, student]

    def generator_loss(self, draw: Draw) -> Tensor:
        """Σ_i λ_i L_i; a part with levels of its own is meaned over each latent's rows first, (R,)."""
        total = torch.zeros_like(draw.noise.weight)
        for part, own in self._draws(draw):
            total = total + part.weight_at(draw.progress) * _to_rows(part.objective.generator_loss(own), own, draw)
        return total

    def evaluations(self, latents: int, draws: int) -> int:
        """Those of all parts' losses of the student; parts under the run's levels share the teacher's."""
        sharing = sum(part.levels is None and part.objective.scores_by_teacher for part in self.summands)
        every = sum(
            part.objective.evaluations(latents, draws if part.levels is None else part.levels.draws)
            for part in self.summands
        )
        return every - max(0, sharing - 1) * latents * draws

    def after_step(self, progress: float) -> None:
        """What follows a step in each part."""
        for objective in self.parts:
            objective.after_step(progress)

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """Each part's mean loss and weight, `NAME/loss` and `NAME/weight`, and its own diagnostics.

        These keep their names, but for those that an earlier part has, which become `NAME/...`.
        """
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            for part, own in self._draws(draw):
                loss = part.objective.generator_loss(own).mean()
                weight = loss.new_tensor(part.weight_at(draw.progress))
                out |= {f"{part.label}/loss": loss, f"{part.label}/weight": weight}
                for name, v in part.objective.measure(own).items():
                    out[f"{part.label}/{name}" if name in out else name] = v
        return out

    def _student_update(self, part: Part, progress: float) -> Update:
        return next(update for update in part.updates(progress) if update.trains_student)

    def _draws(self, draw: Draw) -> list[tuple[Part, Draw]]:
        """Every part with the draw that it sees."""
        own = [self._student_update(part, draw.progress).needs.levels for part in self.summands]
        wanted = sum(levels is not None for levels in own)
        if len(draw.other_noise) < wanted:
            raise UsageError(f"the sum needs {wanted} further draws of noise as draw.other_noise")
        others = iter(draw.other_noise)
        return [
            (part, draw if levels is None else draw.under(next(others)))
            for part, levels in zip(self.summands, own, strict=True)
        ]


def _weighted(part: Part, update: Update) -> Callable[[Draw], Tensor]:
    """An update's loss times the part's weight."""
    return lambda draw: part.weight_at(draw.progress) * update.loss(draw)


def _to_rows(loss: Tensor, own: Draw, draw: Draw) -> Tensor:
    """A part's loss per row of its own draw as one per row of the common one, of the same mean."""
    if own is draw:
        return loss
    return draw.noise.rows(loss.view(-1, own.noise.latents).mean(0))
