"""`vardistill export RUN --to diffusers|lora|onnx --out PATH`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError

if TYPE_CHECKING:
    from vardistill.runs.config import Config
    from vardistill.students.student import Student
    from vardistill.training.folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Write a run's generator for other programs."""

    to: Literal["diffusers", "lora", "onnx"] = "diffusers"
    """A folder that diffusers loads alone, the adapters for a pipeline of the teacher (under kohya's names, too), or an
    ONNX file."""
    out: Path | None = None
    """The folder, new or empty, or the file; default: `diffusers`, `lora` or `generator.onnx` in the run folder."""


def main(arguments: list[str]) -> int:
    """Export, and say how to load the result."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "export RUN", "Write a run's generator for other programs.")
    if run is None:
        raise UsageError("export needs a run folder before its flags: vardistill export RUN")
    folder, config, generator = _load(Path(run))
    if parsed.to == "onnx":
        return _onnx(generator, parsed.out or folder.path / "generator.onnx")
    if parsed.to == "lora":
        return _lora(folder, generator, parsed.out or folder.path / "lora")
    return _diffusers(folder, config, generator, parsed.out or folder.path / "diffusers")


def _load(run: Path) -> tuple[RunFolder, Config | None, Student]:
    from vardistill.runs.experiment import load_run

    return load_run(run)


def _diffusers(folder: RunFolder, config: Config | None, generator: Student, out: Path) -> int:
    from vardistill.domains.text.config import TextConfig
    from vardistill.domains.text.families import load_pipeline
    from vardistill.domains.text.parts import sources_of
    from vardistill.export import export_diffusers, export_whole
    from vardistill.reports.card import model_card

    domain, card = config and config.domain, partial(model_card, folder, "diffusers")
    if isinstance(domain, TextConfig):
        load = partial(load_pipeline, sources_of(domain).pipeline, domain.variant)
        usage = export_whole(generator, load, out, card)
    else:
        usage = export_diffusers(generator, out, card())
    print(f"{out} loads without vardistill:\n\n{usage}")
    return 0


def _lora(folder: RunFolder, generator: Student, out: Path) -> int:
    from vardistill.export import export_lora
    from vardistill.reports.card import model_card

    usage = export_lora(generator, out, model_card(folder, "lora"))
    print(f"{out} makes a pipeline of the teacher the student:\n\n{usage}")
    return 0


def _onnx(generator: Student, out: Path) -> int:
    from vardistill.export.onnx import CHECKED, export_onnx, onnx_usage

    try:
        error = export_onnx(generator, out)
    except RuntimeError as failure:
        print(f"vardistill: {failure}", file=sys.stderr)
        return 1
    sizes = " and ".join(map(str, CHECKED))
    print(f"{out}; at batches of {sizes}, x differs from the generator's by at most {error:.2g}:\n")
    print(onnx_usage(generator, out))
    return 0
