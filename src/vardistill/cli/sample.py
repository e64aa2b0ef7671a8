"""`vardistill sample RUN --num N --out FILE.npz|FILE.png|FOLDER`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vardistill.cli.arguments import parse, take_positional
from vardistill.errors import UsageError, require
from vardistill.runs.config import check_choices
from vardistill.training.config_files import is_image_run


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

    def __post_init__(self) -> None:
        check_choices(self)
        require("num", self.num, self.num >= 1, "at least 1")


def main(arguments: list[str]) -> int:
    """Draw, write, and say where."""
    run, rest = take_positional(arguments)
    parsed = parse(Arguments, rest, "sample RUN", "Draw samples of a run's generator.")
    if run is None:
        raise UsageError("sample needs a run folder before its flags: vardistill sample RUN")
    if is_image_run(Path(run)):
        _pictures(Path(run), parsed)
    else:
        _points(Path(run), parsed)
    print(f"{parsed.num} samples in {parsed.out}")
    return 0


def _points(run: Path, parsed: Arguments) -> None:
    if parsed.out.suffix not in (".npz", ".png"):
        raise UsageError(f"samples are written as .npz or .png, but --out is {parsed.out}")

    from vardistill.reports.figures import samples_figure
    from vardistill.runs.build import build_problem
    from vardistill.runs.experiment import load_run

    _, config, generator = load_run(run)
    if parsed.label is not None:
        raise UsageError("the generator is unconditional: leave out --label")
    samples = generator.sample(parsed.num, seed=parsed.seed)
    with _written(parsed.out):
        if parsed.out.suffix == ".npz":
            np.savez_compressed(parsed.out, samples=samples.numpy())
        else:
            samples_figure(samples, build_problem(config.problem, config.levels.schedule)).savefig(parsed.out, dpi=120)


def _pictures(run: Path, parsed: Arguments) -> None:
    if parsed.out.suffix not in (".npz", ".png", ""):
        raise UsageError(f"pictures are written as .npz, .png or a folder, but --out is {parsed.out}")

    import torch

    from vardistill.domains.pictures.experiment import draw, even_labels, load_image_run
    from vardistill.reports.pictures import save_folder, save_grid

    _, _, student = load_image_run(run)
    labels = even_labels(parsed.num, student.classes)
    if parsed.label is not None:
        labels = torch.full((parsed.num,), parsed.label)
    pictures = draw(student, parsed.num, parsed.seed, labels)
    with _written(parsed.out):
        if parsed.out.suffix == ".npz":
            arrays: dict[str, Any] = {} if labels is None else {"labels": labels.numpy()}
            np.savez_compressed(parsed.out, samples=pictures.numpy(), **arrays)
        elif parsed.out.suffix == ".png":
            save_grid(pictures, parsed.out)
        else:
            save_folder(pictures, parsed.out, labels)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
