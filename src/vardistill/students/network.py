r"""The field's student: the teacher's own network at one noise level or a few.

    x̂ = f(x_t, t) = D(x_t, t),   x_{t_1} = c z,   z ~ N(0, I) of the shape of x,

with D a diffusers network under its scheduler's parametrisation, so that x̂ is a prediction of the clean data whatever
the network itself predicts, and c the scale of the noise that a pipeline starts from at t_1 (σ_t where the variance
explodes, 1 where it is preserved). Started from the teacher's weights it is the first step of the teacher's sampler
(Luo et al. 2023, arXiv 2305.18455). With adapters of low rank (`denoisers.adapters`) only these are trained, beside
the teacher's frozen weights, which it shares.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vardistill.denoisers.adapters import HALF, Adapted
from vardistill.denoisers.diffusers import DISCRETE, EDM, FLOW, NETWORKS, DiffusersDenoiser, import_diffusers
from vardistill.errors import UsageError, unknown
from vardistill.students.denoising import DenoisingStudent, default_times
from vardistill.students.hub import SafeHubMixin

ADAPTERS = "adapters.safetensors"
"""The file of a saved student's factors, named as in `Adapted.state_dict`."""


class NetworkStudent(
    DenoisingStudent,
    SafeHubMixin,
    library_name="vardistill",
    tags=["few-step-generation", "diffusion-distillation"],
):
    """f(x_t, t) = D(x_t, t) of a diffusers network; see `from_teacher` for one that starts as a teacher.

    Args:
        network: configuration of the network: what diffusers saves, with its `_class_name`.
        scheduler: configuration of the scheduler, likewise.
        times: t_1 > ... > t_n in (0, 1].
        classes: labels 0..classes − 1 that it takes; 0 for an unconditional one.
        data_std: standard deviation of the data, for default noise levels.
        latents: as the denoiser's.

    Raises:
        UsageError: for classes of diffusers that are not supported, or times that do not decrease in (0, 1].
    """

    denoiser: DiffusersDenoiser | Adapted

    def __init__(
        self,
        network: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        times: Sequence[float],
        classes: int = 0,
        data_std: float = 0.5,
        latents: bool = False,
    ) -> None:
        parts = build(network, NETWORKS), build(scheduler, (*DISCRETE, *EDM, *FLOW))
        denoiser = DiffusersDenoiser(*parts, classes, latents)
        super().__init__(denoiser, denoiser.data_shape, data_std, times, classes)

    @classmethod
    def from_teacher(
        cls,
        teacher: DiffusersDenoiser,
        ratio: float | None = None,
        classes: int | None = None,
        data_std: float = 0.5,
        steps: int = 1,
        times: Sequence[float] | None = None,
        rank: int = 0,
        targets: Sequence[str] | None = None,
    ) -> NetworkStudent:
        """A student with the teacher's network: a copy of its weights, or adapters on them.

        Args:
            teacher: E[x | x_t].
            ratio: noise-to-signal ratio σ/α of t_1; default `INITIAL_RATIO` standard deviations of the data.
            classes: labels that the student takes; default all that the teacher knows.
            data_std: standard deviation of the data.
            steps: n.
            times: t_1 > ... > t_n, instead of ratio and steps; default `default_times`. For a discrete schedule the
                nearest of its steps are taken.
            rank: of adapters on the teacher's own weights, which are frozen; 0 for a copy of them.
            targets: the layers that have adapters, see `Adapted`.

        Raises:
            UsageError: as `default_times`, the class and `Adapted`.
        """
        if not (hasattr(teacher, "network") and hasattr(teacher, "scheduler")):
            raise UsageError(
                f"a NetworkStudent starts from a DiffusersDenoiser, but the teacher is {type(teacher).__name__}: "
                "vardistill.students.from_teacher takes others"
            )
        if times is None:
            times = default_times(teacher.schedule, steps, data_std, ratio)
        classes = teacher.classes if classes is None else classes
        if rank:
            denoiser, student = Adapted(teacher, rank, targets), cls.__new__(cls)
            DenoisingStudent.__init__(student, denoiser, denoiser.data_shape, data_std, times, classes)
            student._hub_mixin_config = student.configuration()  # of the student that it is saved as, merged
            return student
        described = describe(teacher.network), describe(teacher.scheduler)
        student = cls(*described, list(times), classes, data_std, teacher.latents)
        parameter = next(teacher.network.parameters())
        student.to(parameter.device, torch.float32 if parameter.dtype in HALF else parameter.dtype)
        student.denoiser.network.load_state_dict(teacher.network.state_dict())
        return student

    def configuration(self) -> dict[str, Any]:
        """The arguments that make such a student anew."""
        network, scheduler = describe(self.denoiser.network), describe(self.denoiser.scheduler)
        return {
            "network": network,
            "scheduler": scheduler,
            "times": list(self.times),
            "classes": self.classes,
            "data_std": self.data_std,
            "latents": self.denoiser.latents,
        }

    @torch.no_grad()
    def merged(self) -> NetworkStudent:
        """A copy without adapters, whose weights have them added, W + B A."""
        student = copy.deepcopy(self)
        if isinstance(student.denoiser, Adapted):
            student.denoiser = student.denoiser.merged()
        return student.requires_grad_(False)

    @classmethod
    def _from_pretrained(
        cls, *, config: Mapping[str, Any] | None = None, times: Sequence[float] | None = None, **options: Any
    ) -> Any:
        """Load; students saved when all had one time have it as `t`."""
        if times is None:
            times = [config["t"]] if config and "t" in config else []
        return super()._from_pretrained(times=times, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Save the weights with their adapters merged, and the adapters' factors beside them."""
        if isinstance(self.denoiser, Adapted):
            self.merged()._save_pretrained(save_directory)
            factors = {name: v.contiguous() for name, v in self.denoiser.state_dict().items()}
            save_file(factors, save_directory / ADAPTERS, metadata={"format": "pt"})
        else:
            super()._save_pretrained(save_directory)


def describe(part: Any) -> dict[str, Any]:
    """The configuration of a network or scheduler of diffusers as JSON has it, without notes of its origin."""
    config = json.loads(part.to_json_string())
    return {name: value for name, value in config.items() if name == "_class_name" or not name.startswith("_")}


def build(config: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> Any:
    """A network or scheduler of diffusers from its configuration; its class must be one of `known`."""
    name = str(config.get("_class_name"))
    if name not in known:
        raise unknown("class of diffusers", name, known)
    return getattr(import_diffusers(), name).from_config(dict(config))
