r"""Denoisers and students as pipelines that diffusers loads alone.

The folder's scheduler is a sampler down to σ = 0, of a teacher from its first noise level, of a student from t_1:

    discrete   a DDIM scheduler of the teacher's first i + 1 values of β, which starts at the last, i = (T − 1) t_1
    EDM        an Euler scheduler with σ_max = σ_{t_1}
    flow       an Euler scheduler

Read back by `from_diffusers`, a discrete or an EDM student is therefore the denoiser whose last time is t_1.
Unconditional discrete U-Nets of pictures that learned no variance fit diffusers' `DDIMPipeline`, as teachers and as
students of one step. For all others the folder brings `pipeline.py`, which diffusers runs only when it is told to
(`trust_remote_code=True`), and which has a student's levels in `model_index.json`. Weights are in safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from vardistill.denoisers.diffusers import (
    DISCRETE,
    EDM,
    PICTURE_CHANNELS,
    DiffusersDenoiser,
    import_diffusers,
    network_name,
)
from vardistill.diffusion.schedules import Table
from vardistill.errors import UsageError
from vardistill.files import check_free, whole

PARTS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
"""Networks that take no condition but labels, and what pipelines call them."""

STEPS = 50
"""Of a teacher's pipeline, where its user names no number."""

ON_STEP = 1e-3
"""How far (T − 1) t may be from a step, for rounding."""

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

```python
{usage}
```
"""


def save_pipeline(
    denoiser: DiffusersDenoiser,
    path: Path,
    times: Sequence[float] = (),
    classes: int = 0,
    card: str | None = None,
) -> None:
    """Save a teacher, or a student of such a denoiser, as a folder that diffusers loads; `usage` tells how.

    Noise drawn from the same seed gives the same pictures as the student's `sample`, clipped to [−1, 1] and moved to
    [0, 1]; latents are neither. The folder is written beside its place and moved there when it is whole.

    Args:
        denoiser: D.
        path: the folder, new or empty.
        times: t_1 > ... > t_n of a student; () for a teacher, which samples in many steps.
        classes: labels 0..classes − 1 that it is asked for; default all that the network knows.
        card: text of README.md; default how to load the folder.

    Raises:
        UsageError: for a folder that is not empty or cannot be written, a network that takes more than labels, or a
            time between two steps of a discrete schedule.
    """
    network = network_name(denoiser.network)
    if network not in PARTS:
        raise UsageError(f"no pipeline fits a {network}, which takes more than labels: give one of {', '.join(PARTS)}")
    steps = len(times) or None
    scheduler = sampler(denoiser, times[0] if times else None)
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": import_diffusers().__version__,
        PARTS[network]: ["diffusers", network],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    stock = is_stock(described(denoiser), steps)
    if not stock:
        index["_class_name"] = ["pipeline", "ImagePipeline"]
        index |= {"classes": classes or denoiser.classes, "steps": steps or STEPS, "latents": denoiser.latents}
        if times:
            index["student"] = {"scale": denoiser.init_scale(times[0]), "levels": levels(denoiser, times)}
    text = card or CARD.format(usage=usage_of(denoiser, steps))
    with whole(path, folder=True) as partial:
        check_free(path)
        denoiser.network.save_pretrained(partial / PARTS[network])  # type: ignore[operator]  # a ModelMixin
        scheduler.save_pretrained(partial / "scheduler")
        without_origins(partial)
        if not stock:
            template = files("vardistill.export") / "templates" / "pipeline.py"
            (partial / "pipeline.py").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
        (partial / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        (partial / "README.md").write_text(text, encoding="utf-8")


def network_part(network: Mapping[str, Any]) -> str:
    """What pipelines call the network of this configuration."""
    return "unet" if network["_class_name"].startswith("UNet") else "transformer"


def without_origins(folder: Path) -> None:
    """Take out of the configurations in a folder where on this machine their parts were read from."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def is_stock(student: Mapping[str, Any], steps: int | None) -> bool:
    """Whether diffusers' own `DDIMPipeline` samples such a denoiser.

    Args:
        student: its configuration, as `NetworkStudent.configuration` has it.
        steps: a student's; None for a teacher.
    """
    network = student["network"]
    return (
        network["_class_name"] == "UNet2DModel"
        and network.get("out_channels") == network["in_channels"]  # it takes the whole of what the network returns
        and student["scheduler"]["_class_name"] in DISCRETE
        and not student.get("classes")
        and not makes_latents(student)
        and steps in (None, 1)
    )


def makes_latents(student: Mapping[str, Any]) -> bool:
    """Whether such a denoiser's x are latents of an autoencoder, by `DiffusersDenoiser`'s rule."""
    return student.get("latents", False) or student["network"]["in_channels"] not in PICTURE_CHANNELS


def usage(student: Mapping[str, Any], steps: int | None, folder: str = "FOLDER") -> str:
    """Python that loads the folder of such a denoiser and draws 16 pictures or latents, without this library."""
    name, options, call, what = "DiffusionPipeline", ", trust_remote_code=True", "", "pictures"
    if is_stock(student, steps):
        name, options, call = "DDIMPipeline", "", f", num_inference_steps={steps or STEPS}"
    if makes_latents(student):
        call, what = ', output_type="latent"', "latents"
    return (
        f"from diffusers import {name}\n"
        f"pipeline = {name}.from_pretrained({json.dumps(folder, ensure_ascii=False)}{options})\n"
        f"{what} = pipeline(batch_size=16{call}).images"
    )


def usage_of(denoiser: DiffusersDenoiser, steps: int | None, folder: str = "FOLDER") -> str:
    """`usage` of the folder that `save_pipeline` writes for this denoiser."""
    return usage(described(denoiser), steps, folder)


def described(denoiser: DiffusersDenoiser) -> dict[str, Any]:
    """What `usage` reads of a student's configuration, of a denoiser."""
    config: Any = denoiser.network.config
    network = {**config, "_class_name": network_name(denoiser.network)}
    scheduler = {"_class_name": type(denoiser.scheduler).__name__}
    return {"network": network, "scheduler": scheduler, "classes": denoiser.classes, "latents": denoiser.latents}


def levels(denoiser: DiffusersDenoiser, times: Sequence[float]) -> list[tuple[float, float, float]]:
    """For each time of a student: what its scheduler calls it, α and σ.

    A discrete scheduler counts steps, the others have σ.
    """
    alpha, sigma = (v.tolist() for v in denoiser.schedule(torch.tensor(times, dtype=torch.float64)))
    names: list[float] = sigma
    if isinstance(denoiser.schedule, Table):
        names = [step_of(t, len(denoiser.schedule.alphas_cumprod) - 1) for t in times]
    return list(zip(names, alpha, sigma, strict=True))


def sampler(denoiser: DiffusersDenoiser, t: float | None) -> Any:
    """The scheduler of a teacher's pipeline, or of a student's whose first time is t."""
    scheduler, diffusers = denoiser.scheduler, import_diffusers()
    if isinstance(denoiser.schedule, Table):
        clip = t is None and not denoiser.latents and scheduler.config.get("clip_sample", False)
        return ddim(scheduler, len(denoiser.schedule.alphas_cumprod) - 1, t, clip)
    if t is None:
        fixed = {"use_dynamic_shifting": False} if scheduler.config.get("use_dynamic_shifting") else {}
        return type(scheduler).from_config(dict(scheduler.config), **fixed) if fixed else scheduler
    if type(scheduler).__name__ in EDM:
        own = {name: scheduler.config[name] for name in ("sigma_min", "sigma_data", "prediction_type")}
        return diffusers.EDMEulerScheduler(sigma_max=denoiser.init_scale(t), **own)
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=scheduler.config.num_train_timesteps)


def ddim(scheduler: Any, last: int, t: float | None, clip: bool) -> Any:
    """DDIM from step i = `last` · t of a discrete scheduler, or from the last one, down to σ = 0; x̂ clipped or not."""
    index = last if t is None else step_of(t, last)
    return import_diffusers().DDIMScheduler(
        num_train_timesteps=index + 1,
        trained_betas=scheduler.betas[: index + 1].tolist(),
        prediction_type=scheduler.config.prediction_type,
        clip_sample=clip,
        clip_sample_range=scheduler.config.get("clip_sample_range", 1.0),
        timestep_spacing="trailing",
    )


def step_of(t: float, last: int) -> int:
    """i = `last` · t; UsageError where t lies between two steps."""
    index = round(last * t)
    if abs(last * t - index) > ON_STEP:
        raise UsageError(
            f"t={t:g} lies between two of the {last + 1} steps of the schedule: a step is {index / last:g}"
        )
    return index
