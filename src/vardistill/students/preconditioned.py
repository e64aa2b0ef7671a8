r"""A student of points with times: a preconditioned perceptron f(x_t, t), the counterpart of a teacher's network."""

from __future__ import annotations

from collections.abc import Sequence

from vardistill.denoisers.network import Preconditioned
from vardistill.diffusion.schedules import SCHEDULES
from vardistill.errors import UsageError, unknown
from vardistill.networks import LevelMLP
from vardistill.students.denoising import DenoisingStudent
from vardistill.students.hub import SafeHubMixin


class DenoisingMLP(
    DenoisingStudent,
    SafeHubMixin,
    library_name="vardistill",
    tags=["few-step-generation", "diffusion-distillation"],
):
    """f(x_t, t) = c_skip x̂ + c_out F(c_in x̂, ¼ ln r), with F a perceptron; see `denoisers.network`.

    To start as a teacher of the same sizes, load its weights: `student.denoiser.load_state_dict(teacher.state_dict())`.

    Args:
        times: t_1 > ... > t_n in (0, 1]; see `default_times`.
        data: dimension of x.
        depth: hidden layers.
        width: units of a hidden layer.
        activation: name in `vardistill.networks.ACTIVATIONS`.
        data_std: σ_d, standard deviation of the data.
        schedule: name in `vardistill.diffusion.schedules.SCHEDULES`.

    Raises:
        UsageError: for unknown names, sizes below 1, a scale that is not positive, or times that do not decrease.
    """

    denoiser: Preconditioned

    def __init__(
        self,
        times: Sequence[float],
        data: int = 2,
        depth: int = 4,
        width: int = 256,
        activation: str = "silu",
        data_std: float = 1.0,
        schedule: str = "ve",
    ) -> None:
        for name, size in {"data": data, "depth": depth, "width": width}.items():
            if size < 1:
                raise UsageError(f"{name} must be at least 1, but is {size}")
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        network = LevelMLP(data, data, depth, width, activation)
        denoiser = Preconditioned(network, data_std, SCHEDULES[schedule]())
        super().__init__(denoiser, (data,), data_std, times)
