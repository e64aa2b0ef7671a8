"""`vardistill train PRESET|--config FILE [--flags]|--resume RUN [--steps N]`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import get_args, get_type_hints

from vardistill.cli.arguments import parse, take_positional, take_value, value_of
from vardistill.cli.ends import run_to_end
from vardistill.cli.main import entries
from vardistill.domains.points.config import SCALES, PointsConfig, TeacherConfig
from vardistill.errors import UsageError
from vardistill.files import is_path, reason, typed
from vardistill.launch import is_first, launched
from vardistill.progress import phase
from vardistill.runs.config import Config
from vardistill.runs.own import check_resumed
from vardistill.runs.presets import (
    AT_SIZE,
    PICTURE_SETS,
    PICTURES,
    POINT_TARGETS,
    POINTS,
    TEXT,
    adapted,
    find_preset,
    with_objective,
)
from vardistill.training.config import NetworkConfig
from vardistill.training.config_files import read

KINDS = get_args(get_type_hints(TeacherConfig)["teacher"])
"""Of teachers of points."""


def presets(targets: Iterable[str], recipes: dict[str, str]) -> list[str]:
    """Lines of the usage: a domain's recipes and their targets."""
    return [
        *entries(
            {f"TARGET-{name}": about for name, about in recipes.items()} | {"TARGET is one of": ", ".join(targets)}
        ),
    ]


USAGE = "\n".join(
    [
        "usage: vardistill train PRESET [--flags]         PRESET --help lists the flags",
        "       vardistill train --config FILE [--flags]  repeat a run exactly",
        "       vardistill train --resume RUN             go on with an interrupted run",
        "       vardistill train --resume RUN --steps N   train for longer, to step N",
        "",
        "any PRESET takes another objective, or a sum of several:",
        "  --objective 'diff-instruct + 6..1*varflow(beta=0.5)'",
        "",
        "presets of points:",
        *presets(POINT_TARGETS, {name: recipe.about for name, recipe in POINTS.items()}),
        "presets of pictures (images: of a --teacher that is given):",
        *presets(PICTURE_SETS, {name: recipe.about for name, recipe in PICTURES.items()}),
        "presets of text to image (of a --teacher; text with --prompts):",
        *presets(["text", "shapes"], {name: recipe.about for name, recipe in TEXT.items()}),
        "presets of models at their size (--prompts are given):",
        *entries({name: recipe.about for name, recipe in AT_SIZE.items()}),
    ]
)


@dataclass(frozen=True)
class Arguments:
    """Train a generator of one or a few steps."""

    out: Path | None = None
    """Run folder, new or empty; default: the first free runs/PRESET-NUMBER."""
    dry_run: bool = False
    """Take ten steps, say what the run would take in memory and time, and leave nothing."""
    run: Config = field(default_factory=Config)


@dataclass(frozen=True)
class Longer:
    """What a run that goes on may be given more of."""

    steps: int | None = None
    """Steps of the whole run, those that it has among them."""
    max_minutes: float | None = None
    """Minutes of the whole run, likewise."""


def main(arguments: list[str]) -> int:
    """Train, and say where the result is."""
    if not arguments or arguments in (["--help"], ["-h"]):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--resume":
        return _resume(arguments[1:])
    if "--resume" in arguments:
        raise UsageError("--resume stands first, with no preset: vardistill train --resume RUN")
    name, config, rest = _start(arguments)
    check_networks(rest)
    about = "Train a generator of one or a few steps; --objective replaces the objective, with levels and rates."
    parsed = parse(Arguments, rest, f"train {name}", about, Arguments(run=config))
    if parsed.dry_run:
        return dry_run(parsed.run)
    with run_folder(parsed.out, name) as out:
        return train(parsed.run, out)


def dry_run(config: Config) -> int:
    """Say what a run would take; returns the exit code."""
    with phase("loading PyTorch", kept=False):
        from vardistill.cli.tables import print_rehearsal
        from vardistill.runs.rehearsal import rehearse

    rehearsal = rehearse(config)
    if is_first():
        print_rehearsal(rehearsal, config.training.steps)
    return 0


def train(config: Config, out: Path, resume: bool = False) -> int:
    """Run an experiment with its ends told to the user; returns the exit code."""
    with phase("loading PyTorch", kept=False):
        from vardistill.cli.tables import print_run
        from vardistill.runs.experiment import run_experiment

    return run_to_end(lambda: run_experiment(config, out, resume), print_run, f"vardistill train --resume {typed(out)}")


def check_networks(words: list[str]) -> None:
    """Raise the UsageError of settings of networks that cannot be read: for one in a list, tyro tells another."""
    flagged = False
    for word in words:
        flag, _, value = word.partition("=")
        if word.startswith("--"):
            flagged, word = flag == "--networks", value
        if flagged and word:
            NetworkConfig.parse([word])


@contextmanager
def run_folder(out: Path | None, name: str) -> Iterator[Path]:
    """`out` or, without, the first of runs/NAME-001, ... that was not there: made at once, as others may start, too.

    It goes again where the run was refused and left nothing in it.
    """
    if out is not None:
        yield out
        return
    if launched() > 1:
        raise UsageError("several processes need to be told their common run folder: give --out")
    parent = Path("runs")
    is_new = not parent.exists()
    for number in count(1):
        path = parent / f"{name}-{number:03d}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"cannot write the run folder {path}: {reason(error)}") from error
    try:
        yield path
    finally:
        with suppress(OSError):  # it is not empty: a run's
            path.rmdir()
            if is_new:
                parent.rmdir()


def _start(arguments: list[str]) -> tuple[str, Config, list[str]]:
    """The run's name, the configuration to start from and the flags that change it."""
    objective, arguments = take_value("--objective", arguments)
    from_file = bool(arguments) and arguments[0] == "--config"
    if from_file:
        if len(arguments) < 2:
            raise UsageError("--config needs a file: the config.yaml of a run")
        path = Path(arguments[1])
        name, config, rest = path.resolve().parent.name, read(Config, path), arguments[2:]
        if value_of("--problem", rest) not in (None, getattr(config.domain, "problem", None)):
            raise UsageError(f"--problem moves presets of mog40, not the noise levels of {path}: write them in it")
    else:
        preset, rest = take_positional(arguments)
        if preset is None:
            raise UsageError("train needs a preset before its flags; `vardistill train --help` lists them")
        name, config = preset, find_preset(preset)
        problem = value_of("--problem", rest)  # the noise levels to start from depend on it
        if isinstance(config.domain, PointsConfig) and problem in SCALES and problem != config.domain.problem:
            if config.domain.problem != "mog40":
                recipe = next(r for t in POINT_TARGETS for r in POINTS if preset == f"{t}-{r}")
                raise UsageError(f"--problem moves presets of mog40: give mog40-{recipe}")
            config = adapted(config, problem)
    teacher = value_of("--teacher", rest)
    if isinstance(config.domain, PointsConfig) and teacher is not None and teacher not in KINDS and is_path(teacher):
        raise UsageError(
            f"--teacher of points is {', '.join(KINDS)}: a folder is given as --teacher learned --teacher-run {teacher}"
        )
    return name, config if objective is None else with_objective(config, objective, not from_file), rest


def _resume(arguments: list[str]) -> int:
    run, rest = take_positional(arguments)
    if run is None:
        raise UsageError("--resume needs one run folder: vardistill train --resume RUN")
    more = parse(Longer, rest, "train --resume RUN", "Go on with a run, where it stopped or for longer.")
    from vardistill.training.folder import open_run

    folder = open_run(Path(run))
    if not folder.config.is_file():
        raise UsageError(
            f"{folder.path} was made in Python, by parts that the command line does not have: go on there, with "
            f"vd.distill(..., out={str(folder.path)!r}, resume=True), for longer with more steps"
        )
    config: Config = read(Config, folder.config)
    check_resumed(config, folder.path)
    given = {name: v for name, v in asdict(more).items() if v is not None}
    if given and config.training.max_minutes is not None and more.max_minutes is None:
        raise UsageError(f"the run ends after {config.training.max_minutes:g} minutes: give --max-minutes, too")
    return train(replace(config, training=replace(config.training, **given)), folder.path, resume=True)
