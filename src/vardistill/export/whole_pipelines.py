"""A text-to-image student as a whole pipeline: the teacher's, with the student's network and scheduler in it.

The folder is one of diffusers' own classes, and brings no code; see `export.schedulers` for how it takes a path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vardistill.errors import UsageError
from vardistill.export.pipelines import network_part, without_origins
from vardistill.export.schedulers import call, renoising
from vardistill.files import check_free, whole
from vardistill.students.network import NetworkStudent
from vardistill.students.student import Student

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---

```python
{usage}
```
"""


def export_whole(
    generator: Student, load: Callable[..., Any], path: Path | str, card: Callable[[str], str] | None = None
) -> str:
    """Save a student, its adapters merged, with all else of the teacher's pipeline.

    Args:
        generator: a `NetworkStudent` of a text-to-image network.
        load: the teacher's pipeline, given its network by name (`unet` or `transformer`).
        path: the folder, new or empty.
        card: text of README.md, of Python that loads the folder; default that alone.

    Returns:
        Python that loads the folder and draws pictures, without this library.

    Raises:
        UsageError: for a student of another kind or a folder that is not empty, and as `renoising`.
    """
    if not isinstance(generator, NetworkStudent):
        raise UsageError(f"a {type(generator).__name__} is no network of a pipeline: export it to onnx instead")
    path, student = Path(path), generator.configuration()
    scheduler = renoising(generator.denoiser.scheduler, generator.times)
    with whole(path, folder=True) as partial:
        check_free(path)
        pipeline = load(**{network_part(student["network"]): generator.merged().denoiser.network})
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(partial, safe_serialization=True)
        without_origins(partial)
        missing = [name for name, part in pipeline.components.items() if part is None]
        lines = usage(student, missing=[name for name in missing if name not in pipeline._optional_components])
        text = CARD.format(usage=lines) if card is None else card(lines)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return lines.replace('"FOLDER"', json.dumps(str(path), ensure_ascii=False))


def usage(student: Mapping[str, Any], missing: Sequence[str] = ()) -> str:
    """Python that draws pictures by the folder, called FOLDER, of a student of this configuration.

    Args:
        student: its configuration.
        missing: components that its pipeline is without, and that diffusers would ask for.
    """
    left_out = "".join(f", {name}=None" for name in missing)
    return (
        "from diffusers import DiffusionPipeline\n"
        f'pipeline = DiffusionPipeline.from_pretrained("FOLDER"{left_out})\n'
        f"pictures = {call(student['scheduler'], student['times'])}.images"
    )
