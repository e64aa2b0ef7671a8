"""What an objective is: a list of updates.

An update says which networks it trains, what it needs drawn, how often it runs, and its loss. Whatever it does not
train is frozen for parameters and open for inputs: a gradient may pass through teacher and critic, and moves neither.

**Convention.** A loss has one value per row, (R,), and is a mean over the data axes: ⟨a, b⟩ stands for
1/d Σ_i a_i b_i, ‖a‖² for ⟨a, a⟩ and distances for √⟨a − b, a − b⟩. So learning rates, limits on gradients and the
weights of sums mean the same for points and for pictures, and published weights of adversarial terms can be taken as
they are.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from vardistill import diffusion
from vardistill.choices import check_choices
from vardistill.errors import require
from vardistill.lazy import Later

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vardistill.diffusion import Denoiser, Draw, NoiseLevels, Schedule
    from vardistill.posteriors import Posterior
    from vardistill.students import Student
else:
    nn = Later("torch.nn")

STUDENT = "student"
"""The name of the network that every objective trains."""

Evaluations = Callable[[int, int], int]
"""Rows through networks in an update, the student's own aside, of N latents with G noise draws each."""


@dataclass(frozen=True)
class Needs:
    """What an update needs drawn beside latents and noise.

    Attributes:
        real: real samples, as `draw.real`.
        eta: K, further latents per row, as `draw.eta`.
        xi: K, further noise of the data's shape per row, as `draw.xi`.
        pool: M, further latents that the rows share, as `draw.pool`.
        groups: rows in groups of one level: levels that are shared by at least two rows.
        levels: noise levels of its own; None for the run's.
        other_levels: noise levels beside these, whose noise it needs as `draw.other_noise`.
        smallest_batch: the fewest latents that the loss is defined for.
        per_condition: m, latents of a group that share their condition, one after the other; 0 for conditions that are
            drawn for every latent.
    """

    real: bool = False
    eta: int = 0
    xi: int = 0
    pool: int = 0
    groups: bool = False
    levels: NoiseLevels | None = None
    other_levels: tuple[NoiseLevels, ...] = ()
    smallest_batch: int = 1
    per_condition: int = 0


@dataclass(frozen=True)
class Update:
    """A step of some of an objective's networks.

    Attributes:
        name: of its curve; the student's is `student`.
        trains: names of the networks that it trains.
        loss: one value per row, (R,); a deterministic function of its draw.
        needs: what is drawn for it.
        repeats: how often it runs in a step, on fresh draws.
        couples_rows: whether the loss of a row depends on the samples of others (groups, candidates of the batch). A
            batch that is computed in parts is then cut at x: the student's gradient is taken through x alone.
        evaluations: what it costs.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Draw], Tensor]
    needs: Needs = field(default_factory=Needs)
    repeats: int = 1
    couples_rows: bool = False
    evaluations: Evaluations = lambda latents, draws: 0

    @property
    def trains_student(self) -> bool:
        """Whether the student is among the networks that it trains."""
        return STUDENT in self.trains


@dataclass(frozen=True)
class Term:
    """A part of what the student is trained with, for diagnostics.

    Attributes:
        prefix: of the names of its scalars; "" for the only one.
        objective: that it is the loss of.
        draw: that it sees.
    """

    prefix: str
    objective: Objective
    draw: Draw


class Objective:
    """A list of updates, and the networks that they train.

    An objective knows its teacher, owns its networks (posteriors, critics, target copies) and draws nothing itself.

    Args:
        teacher: the denoiser to distil, which is frozen and stays in evaluation mode; None for an objective that learns
            from samples alone.
        networks: its own networks by name. They stay in evaluation mode: with dropout a loss would be random.
        frozen: further modules that are used as they are.

    Attributes:
        teacher: as given.
        networks: as given.
        frozen: as given.
        scores_by_teacher: whether the student's loss evaluates the teacher at x_t, once for all parts of a sum.
    """

    scores_by_teacher: ClassVar[bool] = False

    def __init__(
        self,
        teacher: Denoiser | None,
        networks: Mapping[str, nn.Module] | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        if teacher is not None:
            diffusion.require_denoiser(teacher, "teacher")
        self.teacher = teacher
        self.networks = dict(networks or {})
        self.frozen = tuple(frozen)
        for module in (teacher, *frozen):
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    def updates(self, progress: float = 0.0) -> Sequence[Update]:
        """The updates of a step at this progress ∈ [0, 1], in their order; the last one is the student's."""
        return (
            Update(
                STUDENT,
                (STUDENT, *self.networks),
                self.generator_loss,
                self.needs,
                couples_rows=self.needs.groups,
                evaluations=self.evaluations,
            ),
        )

    @property
    def needs(self) -> Needs:
        """What the student's update needs drawn."""
        return Needs()

    def generator_loss(self, draw: Draw) -> Tensor:
        """One value per row, (R,); its gradient reaches the student through `draw.x`."""
        raise NotImplementedError

    def evaluations(self, latents: int, draws: int) -> int:
        """Rows through networks in the student's update; the step's x = g(z) aside."""
        return 0

    def after_step(self, progress: float) -> None:
        """What follows a step of all updates: target copies, a change of phase."""

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """Scalars worth a curve, computed without gradient."""
        return {}

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless the networks take the student's samples, under conditions of two rows."""
        if self.teacher is not None:
            diffusion.check_denoiser(self.teacher, student.data_shape, next(student.parameters()), condition)

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one is the sum of: itself."""
        return (self,)

    def terms(self, draw: Draw) -> list[Term]:
        """The parts with the draws that they see: itself."""
        return [Term("", self, draw)]

    def to(self, *args: Any, **options: Any) -> Objective:
        """Move all its modules, as `nn.Module.to`."""
        for module in (self.teacher, *self.networks.values(), *self.frozen):
            if isinstance(module, nn.Module):
                module.to(*args, **options)
        return self


@dataclass(frozen=True)
class RealConfig:
    """Where an objective's real samples come from.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    real: Literal["teacher", "data"] = "teacher"
    """Real samples: the teacher's own, or the data's."""
    real_samples: int = 20_000
    """Size of the set that a learned teacher's sampler makes at the start."""
    real_steps: int = 20
    """Steps of that sampler."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("real_samples", "real_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


class Parts(Protocol):
    """What a domain provides to build an objective of: everything that differs between points, pictures and text."""

    @property
    def teacher(self) -> Denoiser | None:
        """The denoiser to distil, None where the objective takes none."""

    @property
    def student(self) -> Student:
        """With its initial weights."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The forward process."""
        ...

    @property
    def seed(self) -> int:
        """Of the initial weights."""
        ...

    @property
    def data_std(self) -> float:
        """σ_d, standard deviation of the data."""
        ...

    @property
    def conditions(self) -> Callable[[int, torch.Generator], Mapping[str, Tensor]] | None:
        """What draws the student's conditions; None for an unconditional one."""

    def posterior(self, family: str, **sizes: Any) -> list[Posterior]:
        """A fresh q(z | x_t, t) of this family for each of the student's steps."""
        ...

    def critic(self, start: str, **sizes: Any) -> Denoiser:
        """A denoiser to train: `fresh`, or with the weights of the `teacher` without its guidance."""
        ...

    def space(self, name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The map (x_t, t) → features of this name; None for the data themselves."""
        ...


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩, the mean of the products over all but the batch axis, (R,)."""
    return (a * b).flatten(1).mean(1)
