"""`vardistill teach PRESET|DATA|--resume RUN [--flags]`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from vardistill.cli.arguments import parse, take_positional, value_of
from vardistill.cli.ends import run_to_end
from vardistill.cli.train import free_folder
from vardistill.domains.pictures.config import ImagesTeachConfig
from vardistill.domains.pictures.presets import IMAGE_TEACHERS
from vardistill.domains.points.presets import TEACHERS
from vardistill.errors import UsageError, unknown
from vardistill.runs.config import TeachConfig
from vardistill.training.config_files import read

PICTURES = {**IMAGE_TEACHERS}
POINTS = {name if name not in PICTURES else f"{name}-points": preset for name, preset in TEACHERS.items()}

USAGE = "\n".join(
    [
        "usage: vardistill teach PRESET [--flags]        `vardistill teach PRESET --help` lists the flags",
        "       vardistill teach DATA [--flags]          pictures: FILE.npz, FOLDER, hf:NAME",
        "       vardistill teach --resume RUN            go on with a teacher that was interrupted",
        "",
        "presets:",
        *(f"  {name:<30}{preset.about}" for name, preset in {**PICTURES, **POINTS}.items()),
    ]
)

ABOUT = "Fit a teacher denoiser by denoising score matching."


@dataclass(frozen=True)
class Arguments:
    """Fit a teacher denoiser."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: TeachConfig = field(default_factory=TeachConfig)


@dataclass(frozen=True)
class ImageArguments:
    """Fit a teacher denoiser of pictures."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/teacher-PRESET-NUMBER."""
    run: ImagesTeachConfig = field(default_factory=ImagesTeachConfig)


def main(arguments: list[str]) -> int:
    """Fit the teacher, and say where it is and how good."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--resume":
        return _resume(arguments[1:])
    name, rest = take_positional(arguments)
    if name is None:
        raise UsageError("teach needs a preset or data before its flags; `vardistill teach --help` lists them")
    if name in POINTS:
        preset = TEACHERS.get(value_of("--problem", rest) or "", POINTS[name])  # of that problem's noise levels
        parsed = parse(Arguments, rest, f"teach {name}", ABOUT, Arguments(run=preset.config))
        return teach_points(parsed.run, parsed.out or free_folder(f"teacher-{name}"))
    config = _pictures(name)
    pictures = parse(ImageArguments, rest, f"teach {name}", ABOUT, ImageArguments(run=config))
    return _teach_pictures(pictures.run, pictures.out or free_folder(f"teacher-{Path(name).stem}"))


def _pictures(name: str) -> ImagesTeachConfig:
    """The preset of this name, or that of MNIST for other pictures."""
    if name in PICTURES:
        return PICTURES[name].config
    if name.startswith("hf:") or Path(name).exists():
        return replace(PICTURES["mnist"].config, data=name)
    raise unknown("preset or data", name, {**PICTURES, **POINTS})


def teach_points(config: TeachConfig, out: Path, resume: bool = False) -> int:
    """Fit a teacher of points and say how good it is; returns the exit code."""
    from vardistill.cli.tables import print_teacher
    from vardistill.domains.points.teach import teach
    from vardistill.training.folder import RunFolder

    def run() -> RunFolder:
        teach(config, out, resume)
        return RunFolder(out)

    return run_to_end(run, lambda folder: print_teacher(folder.path), f"vardistill teach --resume {out}")


def _teach_pictures(config: ImagesTeachConfig, out: Path, resume: bool = False) -> int:
    from vardistill.cli.tables import print_image_teacher
    from vardistill.domains.pictures.teach import teach_images

    return run_to_end(
        lambda: teach_images(config, out, resume), print_image_teacher, f"vardistill teach --resume {out}"
    )


def _resume(rest: list[str]) -> int:
    if len(rest) != 1:
        raise UsageError("--resume takes one run folder, and no flags: a teacher goes on as it was configured")
    from vardistill.training.folder import open_run

    folder = open_run(Path(rest[0]))
    config = read((ImagesTeachConfig, TeachConfig), folder.config)
    goes_on = teach_points if isinstance(config, TeachConfig) else _teach_pictures
    return goes_on(config, folder.path, resume=True)
