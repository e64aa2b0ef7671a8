"""One door from a teacher to a student that starts as it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.denoisers.guidance import Guided
from vardistill.denoisers.mixed import Mixed
from vardistill.diffusion.denoiser import Denoiser, require_denoiser
from vardistill.errors import UsageError
from vardistill.students.denoising import DenoisingStudent, default_times
from vardistill.students.network import NetworkStudent


def from_teacher(
    teacher: Denoiser,
    steps: int = 1,
    data_shape: Sequence[int] | None = None,
    data_std: float = 0.5,
    classes: int | None = None,
    ratio: float | None = None,
    times: Sequence[float] | None = None,
) -> DenoisingStudent:
    """A student of n steps that starts as the teacher, with a copy of its weights; of a guided one without guidance.

    Args:
        teacher: E[x | x_t]: a network of diffusers, which makes a `NetworkStudent`, or another nn.Module with
            parameters.
        steps: n.
        data_shape: shape of one x; default the teacher's own `data_shape`.
        data_std: standard deviation of the data.
        classes: labels 0..classes − 1 that the student takes; default the teacher's own.
        ratio: noise-to-signal ratio σ/α of t_1; default `INITIAL_RATIO` standard deviations of the data.
        times: t_1 > ... > t_n, instead of ratio and steps; default `default_times`.

    Raises:
        UsageError: for a teacher without parameters or known shape, or steps and times that do not fit its schedule.
    """
    require_denoiser(teacher, "teacher")
    network = innermost(teacher)
    if isinstance(network, DiffusersDenoiser):
        return NetworkStudent.from_teacher(network, ratio, classes, data_std, steps, times)
    if not isinstance(network, nn.Module) or next(network.parameters(), None) is None:
        raise UsageError(f"a {type(network).__name__} has no parameters to start from: take a student of its own, MLP")
    shape: Sequence[int] | None = data_shape or getattr(network, "data_shape", None)
    if shape is None:
        raise UsageError(f"a {type(network).__name__} does not tell the shape of its data: give data_shape")
    if times is None:
        times = default_times(network.schedule, steps, data_std, ratio)
    known = int(getattr(network, "classes", 0)) if classes is None else classes
    return DenoisingStudent(copy.deepcopy(network).requires_grad_(True), shape, data_std, times, known)


def innermost(teacher: Denoiser) -> Denoiser:
    """The denoiser below guidance and mixed precision."""
    while isinstance(teacher, Guided | Mixed):
        teacher = teacher.denoiser
    return teacher
