"""What an objective is."""

from __future__ import annotations

from torch import Tensor, nn

from vardistill.diffusion.denoiser import Denoiser, check_denoiser, require_denoiser
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.errors import UsageError
from vardistill.students.student import Student
from vardistill.training.data import Conditions


class Objective(nn.Module):
    """A loss for a one-step generator.

    It owns its auxiliary networks (posteriors, critics), knows the teacher, and draws nothing itself: a loss is
    a deterministic function of its `Draw`. The teacher is frozen and stays in evaluation mode.

    Attributes:
        teacher: the denoiser to distil; None for an objective that learns from samples alone.
        critic_steps: updates of the auxiliary networks alone, on fresh draws, before each update of the generator.
        fresh_latents: K, further latents per row that the loss needs as `draw.eta`; 0 for none.
        pool_latents: M, further latents shared by the rows that the loss needs as `draw.pool`; 0 for none.
        needs_real: whether the loss needs real samples as `draw.real`.
        compares_groups: whether the loss compares groups of at least two rows of one level, so that levels are shared.
        smallest_batch: the fewest latents that the loss is defined for.
        other_levels: noise levels of its own beside the run's, whose noise it needs as `draw.other_noise`.
    """

    critic_steps: int = 0
    fresh_latents: int = 0
    pool_latents: int = 0
    needs_real: bool = False
    compares_groups: bool = False
    smallest_batch: int = 1
    other_levels: tuple[NoiseLevels, ...] = ()

    def __init__(self, teacher: Denoiser | None) -> None:
        super().__init__()
        if teacher is not None:
            require_denoiser(teacher, "teacher")
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Objective:
        """Set the mode of the auxiliary networks."""
        super().train(mode)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        return self

    def check(self, generator: Student, conditions: Conditions | None = None) -> None:
        """Raise UsageError unless the teacher and the objective's own networks take the generator's samples."""
        if self.teacher is not None:
            check_denoiser(self.teacher, generator.data_shape, next(generator.parameters()), conditions)

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters: all but the teacher's."""
        return [p for p in self.parameters() if p.requires_grad]

    def auxiliary_state(self) -> dict[str, Tensor]:
        """The state to keep in a checkpoint: all but the teacher's."""
        return {name: v for name, v in self.state_dict().items() if not name.startswith("teacher.")}

    def generator_loss(self, draw: Draw) -> Tensor:
        """One value per row, (R,); its gradient reaches the generator through `draw.x`."""
        raise NotImplementedError

    def critic_loss(self, draw: Draw) -> Tensor:
        """One value per row, (R,), for the auxiliary networks alone; only where `critic_steps` > 0."""
        raise UsageError(f"{type(self).__name__} has no critic to train: set its critic steps to 0")

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """Rows through networks in one update, of the critic or of the generator; the step's x = g(z) aside."""
        return 0

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives that this one is the sum of: itself."""
        return (self,)

    def draws(self, draw: Draw) -> list[tuple[str, Objective, Draw]]:
        """The parts with a prefix of their names and the draws that they see: itself, without a prefix."""
        return [("", self, draw)]

    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """Scalars worth a curve, computed without gradient."""
        return {}


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over all but the batch axis, (R,)."""
    return (a * b).flatten(1).sum(1)
