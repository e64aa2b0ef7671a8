"""What an objective is."""

from __future__ import annotations

from torch import Tensor, nn

from vardistill.denoisers import Denoiser
from vardistill.errors import UsageError
from vardistill.noise_levels import Draw


class Objective(nn.Module):
    """A loss for a one-step generator.

    It owns its auxiliary networks (posteriors, critics), knows the teacher, and draws nothing itself: a loss is
    a deterministic function of its `Draw`. The teacher is frozen and stays in evaluation mode.

    Attributes:
        teacher: the denoiser to distil.
        critic_steps: updates of the auxiliary networks alone, on fresh draws, before each update of the generator.
        fresh_latents: K, further latents per row that the loss needs as `draw.eta`; 0 for none.
        pool_latents: M, further latents shared by the rows that the loss needs as `draw.pool`; 0 for none.
    """

    critic_steps: int = 0
    fresh_latents: int = 0
    pool_latents: int = 0

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self.teacher = teacher
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Objective:
        """Set the mode of the auxiliary networks."""
        super().train(mode)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
        return self

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

    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """Scalars worth a curve, computed without gradient."""
        return {}
