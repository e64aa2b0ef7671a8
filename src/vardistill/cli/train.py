"""`vardistill train PRESET|--config FILE|--resume RUN [--flags]`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vardistill.cli.arguments import parse, take_positional, value_of
from vardistill.cli.ends import run_to_end
from vardistill.domains.pictures.config import ImagesConfig
from vardistill.domains.pictures.presets import IMAGE_PRESETS
from vardistill.domains.points.presets import PRESETS, SCALES, adapted
from vardistill.errors import UsageError, unknown
from vardistill.runs.config import Config
from vardistill.training.config_files import read

if TYPE_CHECKING:
    from vardistill.training.folder import RunFolder

USAGE = "\n".join(
    [
        "usage: vardistill train PRESET [--flags]        `vardistill train PRESET --help` lists the flags",
        "       vardistill train --config FILE [--flags] repeat a run from its config.yaml",
        "       vardistill train --resume RUN            go on with a run that was interrupted",
        "",
        "presets:",
        *(f"  {name:<30}{preset.about}" for name, preset in {**PRESETS, **IMAGE_PRESETS}.items()),
    ]
)


@dataclass(frozen=True)
class Arguments:
    """Train a one-step generator."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/PRESET-NUMBER."""
    run: Config = field(default_factory=Config)


@dataclass(frozen=True)
class ImageArguments:
    """Train a one-step generator of pictures."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/PRESET-NUMBER."""
    run: ImagesConfig = field(default_factory=ImagesConfig)


def main(arguments: list[str]) -> int:
    """Train, and say where the result is."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--resume":
        return _resume(arguments[1:])
    name, config, rest = _start(arguments)
    about = "Train a one-step generator."
    parsed: Arguments | ImageArguments
    if isinstance(config, ImagesConfig):
        parsed = parse(ImageArguments, rest, f"train {name}", about, ImageArguments(run=config))
    else:
        parsed = parse(Arguments, rest, f"train {name}", about, Arguments(run=config))
    return train(parsed.run, parsed.out or free_folder(name))


def train(config: Config | ImagesConfig, out: Path, resume: bool = False) -> int:
    """Run an experiment with its ends told to the user; returns the exit code."""
    from vardistill.cli.tables import print_run

    return run_to_end(lambda: _run(config, out, resume), print_run, f"vardistill train --resume {out}")


def _run(config: Config | ImagesConfig, out: Path, resume: bool) -> RunFolder:
    if isinstance(config, ImagesConfig):
        from vardistill.domains.pictures.experiment import run_images

        return run_images(config, out, resume)
    from vardistill.runs.experiment import run_experiment

    return run_experiment(config, out, resume)


def free_folder(name: str) -> Path:
    """The first of runs/NAME-001, runs/NAME-002, ... that does not exist."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need to be told their common run folder: give --out")
    number = 1
    while (path := Path("runs") / f"{name}-{number:03d}").exists():
        number += 1
    return path


def _start(arguments: list[str]) -> tuple[str, Config | ImagesConfig, list[str]]:
    """The run's name, the configuration to start from and the flags that change it."""
    if arguments[0] == "--config":
        if len(arguments) < 2:
            raise UsageError("--config needs a file: the config.yaml of a run")
        path = Path(arguments[1])
        return path.resolve().parent.name, read((Config, ImagesConfig), path), arguments[2:]
    name, rest = take_positional(arguments)
    if name is None:
        raise UsageError("train needs a preset before its flags; `vardistill train --help` lists them")
    if name in IMAGE_PRESETS:
        return name, IMAGE_PRESETS[name].config, rest
    if name not in PRESETS:
        raise unknown("preset", name, {**PRESETS, **IMAGE_PRESETS})
    config = PRESETS[name].config
    problem = value_of("--problem", rest)  # the noise levels to start from depend on it
    return name, adapted(config, problem) if problem in SCALES and problem != config.problem else config, rest


def _resume(rest: list[str]) -> int:
    if len(rest) != 1:
        raise UsageError("--resume takes one run folder, and no flags: a run goes on as it was configured")
    from vardistill.training.folder import open_run

    folder = open_run(Path(rest[0]))
    return train(read((Config, ImagesConfig), folder.config), folder.path, resume=True)
