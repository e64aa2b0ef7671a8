"""`vardistill sample RUN --num N --out FILE.npz|FILE.png|FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vardistill.choices import check_choices
from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require
from vardistill.files import check_free, check_place, whole
from vardistill.progress import phase

SUFFIXES = (".npz", ".png", "")
"""Of what samples are written as; a folder has none."""

BLOCK = 64
"""Samples that are drawn at once: as many pictures as fit into a processor's memory."""


@dataclass(frozen=True)
class Arguments:
    """Draw samples of a run's generator."""

    out: Path = Path("samples.npz")
    """Where to write: .npz (array `samples`), .png (a picture) or, of pictures, a folder of them."""
    num: int = 10_000
    """Number of samples."""
    seed: int = 0
    """Fixes the samples."""
    label: int | None = None
    """Class of all samples of a conditional generator; default: all classes in turn."""

    prompt: str | None = None
    """Of all samples of a text-to-image run; default: the run's prompts in turn."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("num", self.num, self.num >= 1, "at least 1")


def main(arguments: list[str]) -> int:
    """Draw, write, and say where."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "sample RUN", "Draw samples of a run's generator.")
    if run is None:
        raise UsageError("sample needs a run folder before its flags: vardistill sample RUN")
    if parsed.out.suffix not in SUFFIXES:
        raise UsageError(f"samples are written as .npz, .png or, of pictures, a folder, but --out is {parsed.out}")
    check = check_place if parsed.out.suffix else check_free
    check(parsed.out)
    with phase(f"drawing {parsed.num:,} samples", kept=False):
        draw(Path(run), parsed)
    print(f"{parsed.num} samples in {parsed.out}")
    return 0


def draw(run: Path, parsed: Arguments) -> None:
    """Draw the samples and write them."""
    import torch

    from vardistill.domains.text.parts import Text
    from vardistill.runs.experiment import build_domain, load_run
    from vardistill.students import NetworkStudent

    _, config, student = load_run(run)
    domain = None if config is None else build_domain(config)
    if parsed.prompt is not None:
        if not isinstance(domain, Text):
            raise UsageError("--prompt is for runs on text to image: give --label, or nothing")
        if parsed.label is not None:
            raise UsageError("--prompt and --label say two things: give one of them")
        assert isinstance(student, NetworkStudent)
        student = domain.asked(student, [parsed.prompt])
    of_pictures = len(student.data_shape) == 3
    if parsed.out.suffix == "" and not of_pictures:
        raise UsageError(f"samples of points are written as .npz or .png, but --out is {parsed.out}")
    if parsed.label is not None and not student.classes:
        raise UsageError("the generator is unconditional: leave out --label")
    labels = torch.arange(parsed.num) % student.classes if student.classes else None
    if parsed.label is not None:
        labels = torch.full((parsed.num,), parsed.label)
    block = {"block": BLOCK} if of_pictures else {}
    samples = student.sample(parsed.num, parsed.seed, labels=labels, **block).cpu()
    if isinstance(domain, Text):
        samples = domain.pictures(samples)
    if parsed.out.suffix == ".npz":
        arrays: dict[str, Any] = {} if labels is None else {"labels": labels.numpy()}
        with whole(parsed.out) as partial:
            np.savez_compressed(partial, samples=samples.numpy(), **arrays)
    elif not of_pictures:
        from vardistill.reports.samples import save_samples

        save_samples({"samples": samples}, domain.problem if domain else None, parsed.out)
    else:
        from vardistill.domains.pictures.figures import save_folder, save_grid

        if parsed.out.suffix == ".png":
            save_grid(samples, parsed.out)
        else:
            save_folder(samples, parsed.out, labels)
