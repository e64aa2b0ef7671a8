"""`vardistill teach PRESET|DATA|--resume RUN [--flags]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vardistill.cli.arguments import parse, take_positional, value_of
from vardistill.cli.ends import run_to_end
from vardistill.cli.main import entries
from vardistill.cli.train import run_folder
from vardistill.domains.pictures.config import PicturesTeachConfig, fit_of
from vardistill.domains.points.config import SCALES, PointsTeachConfig, teacher_fit
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.errors import UsageError, unknown
from vardistill.files import is_path, typed
from vardistill.progress import phase
from vardistill.runs.config import TeachConfig
from vardistill.runs.presets import TEACHERS
from vardistill.training.config_files import read

USAGE = "\n".join(
    [
        "usage: vardistill teach PRESET [--flags]     PRESET --help lists the flags",
        "       vardistill teach DATA [--flags]       pictures: FILE.npz, FOLDER, hf:NAME",
        "       vardistill teach --resume RUN         go on with an interrupted teacher",
        "",
        "presets:",
        *entries({name: preset.about for name, preset in TEACHERS.items()}),
    ]
)

ABOUT = "Fit a teacher denoiser by denoising score matching."


@dataclass(frozen=True)
class Points:
    """Fit a teacher denoiser of points."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: PointsTeachConfig = field(default_factory=PointsTeachConfig)


@dataclass(frozen=True)
class Pictures:
    """Fit a teacher denoiser of pictures."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: PicturesTeachConfig = field(default_factory=PicturesTeachConfig)


@dataclass(frozen=True)
class Shapes:
    """Fit a text-to-image teacher of shapes."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: ShapesTeachConfig = field(default_factory=ShapesTeachConfig)


ARGUMENTS: dict[type, Any] = {PointsTeachConfig: Points, PicturesTeachConfig: Pictures, ShapesTeachConfig: Shapes}
"""What the command line takes, by the fit."""


def main(arguments: list[str]) -> int:
    """Fit the teacher, and say where it is and how good."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--resume":
        return _resume(arguments[1:])
    if "--resume" in arguments:
        raise UsageError("--resume stands first, with no preset: vardistill teach --resume RUN")
    name, rest = take_positional(arguments)
    if name is None:
        raise UsageError("teach needs a preset or data before its flags; `vardistill teach --help` lists them")
    config = _start(name, rest)
    arguments_of = ARGUMENTS[type(config)]
    parsed = parse(arguments_of, rest, f"teach {name}", ABOUT, arguments_of(run=config))
    with run_folder(parsed.out, f"teacher-{Path(name).stem}") as out:
        return teach(parsed.run, out)


def _start(name: str, rest: list[str]) -> TeachConfig:
    """The preset of this name, or the fit to pictures of a source."""
    if name in TEACHERS:
        config: TeachConfig = TEACHERS[name].config
        problem = value_of("--problem", rest)  # the noise levels to start from depend on it
        if isinstance(config, PointsTeachConfig) and problem in SCALES:
            return teacher_fit(problem)
        return config
    if name.startswith("hf:") or Path(name).exists():
        return fit_of(name)
    if is_path(name):
        raise UsageError(
            f"there is no file or folder {name}: vardistill teach takes FILE.npz, a FOLDER, hf:NAME or a preset"
        )
    raise unknown("preset or data", name, TEACHERS)


def teach(config: TeachConfig, out: Path, resume: bool = False) -> int:
    """Fit a teacher and say how good it is; of several processes the first one does. Returns the exit code."""
    with phase("loading PyTorch", kept=False):
        from vardistill.cli.tables import print_picture_teacher, print_teacher
        from vardistill.domains.pictures.teach import teach_images
        from vardistill.domains.points import teach as points
        from vardistill.domains.text.shapes.teach import teach_shapes
        from vardistill.processes import join, on_main
        from vardistill.training.folder import RunFolder

    def run() -> RunFolder:
        join(config.device)
        fits: dict[type, Any] = {
            PointsTeachConfig: points.teach, PicturesTeachConfig: teach_images, ShapesTeachConfig: teach_shapes
        }  # fmt: skip
        on_main(lambda: fits[type(config)](config, out, resume))
        return RunFolder(out)

    show = print_teacher if isinstance(config, PointsTeachConfig) else print_picture_teacher
    return run_to_end(run, show, f"vardistill teach --resume {typed(out)}")


def _resume(rest: list[str]) -> int:
    if len(rest) != 1:
        raise UsageError("--resume takes one run folder, and no flags: a teacher goes on as it was configured")
    from vardistill.training.folder import open_run

    folder = open_run(Path(rest[0]))
    return teach(read(tuple(ARGUMENTS), folder.config), folder.path, resume=True)
