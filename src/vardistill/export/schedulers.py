r"""A student's path in diffusers' own pipelines: the scheduler that takes it, and how such a pipeline is called.

The scheduler makes the student's steps when it is given their times:

    discrete   LCM's: x̂, then x_t = α x̂ + σ n; with a boundary condition that is none (c_skip < 1e-12)
    flow       Euler's with stochastic_sampling: x̂, then x_t = (1 − σ) x̂ + σ n; without a shift, which times have

Pipelines of flow matching start from unit noise, so such a student's first time has to be 1.
Guidance is in the student already: its pipeline is called with guidance_scale=1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vardistill.denoisers.diffusers import DISCRETE, FLOW, import_diffusers
from vardistill.errors import UsageError
from vardistill.export.pipelines import step_of
from vardistill.students.network import describe

NO_BOUNDARY = 1e6
"""LCM's timestep_scaling s, in c_skip = σ²/((s i)² + σ²), σ = ½."""

KINDS = dict.fromkeys(DISCRETE, "LCMScheduler") | dict.fromkeys(FLOW, "FlowMatchEulerDiscreteScheduler")
"""The scheduler that takes a student's path, by the class of the teacher's."""


def renoising(scheduler: Any, times: Sequence[float]) -> Any:
    """The scheduler of diffusers that takes a student's path.

    Args:
        scheduler: the teacher's.
        times: t_1 > ... > t_n.

    Raises:
        UsageError: for a schedule that no scheduler of diffusers renoises under, a time between two steps of a
            discrete schedule, or a first time below 1 in flow matching.
    """
    described = describe(scheduler)
    call(described, times)
    name, diffusers = described["_class_name"], import_diffusers()
    kind, steps = getattr(diffusers, kind_of(described)), steps_of(described)
    if name in FLOW:
        return kind(num_train_timesteps=steps, stochastic_sampling=True)
    return kind(
        num_train_timesteps=steps,
        trained_betas=scheduler.betas.tolist(),
        prediction_type=scheduler.config.prediction_type,
        clip_sample=False,
        timestep_scaling=NO_BOUNDARY,
        steps_offset=1,  # without which pipelines of Stable Diffusion warn; times that are given have none
        rescale_betas_zero_snr=False,  # betas are rescaled already
    )


def kind_of(scheduler: Mapping[str, Any]) -> str:
    """The class of `renoising`'s scheduler, by the teacher's configuration; UsageError where there is none."""
    if (name := scheduler["_class_name"]) not in KINDS:
        raise UsageError(f"no scheduler of diffusers takes a student's path under {name}")
    return KINDS[name]


def call(scheduler: Mapping[str, Any], times: Sequence[float]) -> str:
    """A pipeline's call with the student's times: discrete `timesteps`, or `sigmas` of flow matching.

    Args:
        scheduler: the teacher's configuration, with its class.
        times: t_1 > ... > t_n.

    Raises:
        UsageError: as `renoising`.
    """
    kind_of(scheduler)
    name, values = "sigmas", list(times)
    if scheduler["_class_name"] in DISCRETE:
        name, values = "timesteps", [step_of(t, steps_of(scheduler) - 1) for t in times]
    elif times[0] != 1:
        raise UsageError(f"a pipeline of flow matching starts at the time 1, but the student at {times[0]:g}")
    return f"pipeline(prompt, num_inference_steps={len(values)}, {name}={values}, guidance_scale=1)"


def steps_of(scheduler: Mapping[str, Any]) -> int:
    """T, of a scheduler's configuration."""
    betas = scheduler.get("trained_betas")
    return int(scheduler["num_train_timesteps"]) if betas is None else len(betas)
