r"""Adapters as a LoRA file of diffusers, and the scheduler that takes a student's path.

A folder holds the factors in the file that `pipeline.load_lora_weights(FOLDER)` reads, and `scheduler`, which makes the
student's steps when it is given their times:

    discrete   LCM's: x̂, then x_t = α x̂ + σ n; with a boundary condition that is none (c_skip < 1e-12)
    flow       Euler's with stochastic_sampling: x̂, then x_t = (1 − σ) x̂ + σ n; without a shift, which times have

Pipelines of flow matching start from unit noise, so such a student's first time has to be 1.
Guidance is in the student already: its pipeline is called with guidance_scale=1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vardistill.denoisers.adapters import Adapted
from vardistill.denoisers.diffusers import FLOW, import_diffusers
from vardistill.diffusion.schedules import Table
from vardistill.errors import UsageError
from vardistill.export.pipelines import step_of
from vardistill.files import check_free, whole
from vardistill.students.network import NetworkStudent
from vardistill.students.student import Student

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for."""

NO_BOUNDARY = 1e6
"""LCM's timestep_scaling s, in c_skip = σ²/((s i)² + σ²), σ = ½."""

CARD = """---
library_name: diffusers
tags: [lora]
---

```python
{usage}
```
"""


def export_lora(generator: Student, path: Path | str, card: str | None = None) -> str:
    """Save a student's adapters as a folder that `load_lora_weights` takes, with its scheduler beside them.

    Args:
        generator: a `NetworkStudent` of adapters.
        path: the folder, new or empty.
        card: text of README.md; default how to load the folder.

    Returns:
        Python that sets a pipeline up, without this library.

    Raises:
        UsageError: for a student without adapters, a schedule that no scheduler of diffusers renoises under, a time
            between two steps of a discrete schedule, a first time below 1 in flow matching, or a folder that is not
            empty.
    """
    if not isinstance(generator, NetworkStudent) or not isinstance(generator.denoiser, Adapted):
        raise UsageError("a LoRA file needs a student of adapters, and this one has trained all its weights, or merged")
    denoiser, path = generator.denoiser, Path(path)
    scheduler, told = renoising(denoiser, generator.times), usage(denoiser, generator.times, str(path))
    with whole(path, folder=True) as partial:
        check_free(path)
        save_file(state_dict(denoiser), partial / WEIGHTS, metadata={"format": "pt"})
        scheduler.save_pretrained(partial / "scheduler")
        text = card or CARD.format(usage=usage(denoiser, generator.times, "FOLDER"))
        (partial / "README.md").write_text(text, encoding="utf-8")
    return told


def state_dict(denoiser: Adapted) -> dict[str, Tensor]:
    """The factors under diffusers' names, `unet.LAYER.lora_A.weight`; their scale is 1."""
    part = "unet" if type(denoiser.network).__name__.startswith("UNet") else "transformer"
    factors = denoiser.adapters.state_dict()
    return {f"{part}.{name}": v.detach().cpu().contiguous() for name, v in factors.items()}


def renoising(denoiser: Adapted, times: Sequence[float]) -> Any:
    """The scheduler of diffusers that takes a student's path through these times."""
    diffusers, scheduler = import_diffusers(), denoiser.scheduler
    if isinstance(denoiser.schedule, Table):
        named(denoiser, times)
        return diffusers.LCMScheduler(
            num_train_timesteps=len(denoiser.schedule.alphas_cumprod),
            trained_betas=scheduler.betas.tolist(),
            prediction_type=scheduler.config.prediction_type,
            clip_sample=False,
            timestep_scaling=NO_BOUNDARY,
            rescale_betas_zero_snr=False,  # betas are rescaled already
        )
    if type(scheduler).__name__ in FLOW:
        if times[0] != 1:
            raise UsageError(f"a pipeline of flow matching starts at the time 1, but the student at {times[0]:g}")
        steps = scheduler.config.num_train_timesteps
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, stochastic_sampling=True)
    raise UsageError(f"no scheduler of diffusers takes a student's path under {type(scheduler).__name__}")


def named(denoiser: Adapted, times: Sequence[float]) -> tuple[str, list[float]]:
    """What a pipeline's call names the times by: `timesteps` of a discrete schedule, `sigmas` of flow matching."""
    if isinstance(denoiser.schedule, Table):
        return "timesteps", [step_of(t, len(denoiser.schedule.alphas_cumprod) - 1) for t in times]
    return "sigmas", list(times)


def usage(denoiser: Adapted, times: Sequence[float], folder: str) -> str:
    """Python that makes a pipeline the student's."""
    kind, place = type(renoising(denoiser, times)).__name__, json.dumps(folder, ensure_ascii=False)
    name, values = named(denoiser, times)
    options = f"num_inference_steps={len(values)}, {name}={values}, guidance_scale=1"
    return (
        f"from diffusers import {kind}\n"
        f"pipeline.load_lora_weights({place})\n"
        f'pipeline.scheduler = {kind}.from_pretrained({place}, subfolder="scheduler")\n'
        f"pictures = pipeline(prompt, {options}).images"
    )
