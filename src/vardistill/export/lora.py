r"""Adapters as a LoRA file of diffusers, and the scheduler that takes a student's path.

A folder holds the factors in the file that `pipeline.load_lora_weights(FOLDER)` reads, `scheduler` (see
`export.schedulers`) and, of U-Nets, the same factors under kohya's names, which ComfyUI and other programs read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vardistill.denoisers.adapters import Adapted
from vardistill.errors import UsageError
from vardistill.export.pipelines import network_part
from vardistill.export.schedulers import call, kind_of, renoising
from vardistill.files import check_free, whole
from vardistill.students.network import NetworkStudent
from vardistill.students.student import Student

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers looks for."""

KOHYA = "kohya.safetensors"
"""The file under kohya's names; diffusers looks for it where it is asked to."""

EMBEDDING = {"lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0",
             "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2"}  # fmt: skip
"""What the converter of diffusers leaves under names that neither kohya nor its own reader has, SDXL's sizes."""

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
        UsageError: for a student without adapters or a folder that is not empty, and as `renoising`.
    """
    if not isinstance(generator, NetworkStudent) or not isinstance(generator.denoiser, Adapted):
        raise UsageError("a LoRA file needs a student of adapters, and this one has trained all its weights, or merged")
    denoiser, path, student = generator.denoiser, Path(path), generator.configuration()
    scheduler, factors = renoising(denoiser.scheduler, generator.times), state_dict(denoiser)
    with whole(path, folder=True) as partial:
        check_free(path)
        save_file(factors, partial / WEIGHTS, metadata={"format": "pt"})
        if network_part(student["network"]) == "unet":
            save_file(kohya(factors), partial / KOHYA, metadata={"format": "pt"})
        scheduler.save_pretrained(partial / "scheduler")
        (partial / "README.md").write_text(card or CARD.format(usage=usage(student)), encoding="utf-8")
    return usage(student, str(path))


def state_dict(denoiser: Adapted) -> dict[str, Tensor]:
    """The factors under diffusers' names, `unet.LAYER.lora_A.weight`; their scale is 1."""
    part = network_part({"_class_name": type(denoiser.network).__name__})
    factors = denoiser.adapters.state_dict()
    return {f"{part}.{name}": v.detach().cpu().contiguous() for name, v in factors.items()}


def kohya(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a U-Net under kohya's names, `lora_unet_LAYER.lora_down.weight`, and their ranks as alpha."""
    convert: Any = import_module("diffusers.utils.state_dict_utils").convert_state_dict_to_kohya
    found: dict[str, Tensor] = {}
    for name, v in convert(dict(factors)).items():
        layer, _, kind = name.partition(".")
        found[f"{EMBEDDING.get(layer, layer)}.{kind}"] = v
    return found


def usage(student: Mapping[str, Any], folder: str = "FOLDER") -> str:
    """Python that makes a pipeline of the teacher the student of this configuration."""
    kind, place = kind_of(student["scheduler"]), json.dumps(folder, ensure_ascii=False)
    return (
        f"from diffusers import {kind}\n"
        f"pipeline.load_lora_weights({place})\n"
        f'pipeline.scheduler = {kind}.from_pretrained({place}, subfolder="scheduler")\n'
        f"pictures = {call(student['scheduler'], student['times'])}.images"
    )
