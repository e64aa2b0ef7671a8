"""What a bench's subprocess does: `python -m vardistill.bench.work train|teach|measure ... [--then ...]`.

It stops, with a checkpoint, when its standard input ends: that is when the bench that started it is gone.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable
from pathlib import Path

from vardistill.bench.cells import load
from vardistill.errors import UsageError
from vardistill.files import write_whole
from vardistill.runs.config import Config, TeachConfig
from vardistill.training.config_files import read
from vardistill.training.folder import RunFolder, environment

THEN = "--then"
"""Between the words of a task and those of the next."""


def main(words: list[str]) -> int:
    """Do what the words say, one task after another until one fails.

    Returns:
        The exit code: 0 success, 1 diverged, 2 a mistake, 130 interrupted.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a bench in the background may have it ignored
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        for i, (action, folder, *rest) in enumerate(tasks_of(words)):
            if i:
                say_into(log_file(Path(folder)))
            if code := ACTIONS[action](Path(folder), *rest):
                return code
        return 0
    except UsageError as error:
        print(f"vardistill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def tasks_of(words: list[str]) -> list[list[str]]:
    """The words of each task."""
    return [list(task) for then, task in itertools.groupby(words, lambda word: word == THEN) if not then]


def log_file(folder: Path) -> Path:
    """What the process of a task in this folder says."""
    return folder.with_name(f"{folder.name}.log")


def say_into(log: Path) -> None:
    """Have all that this process says go there from now on."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        with log.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())


def stop_with_parent() -> None:
    """Interrupt this process when its standard input ends."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


def train(folder: Path) -> int:
    """Begin the run of the folder's configuration, or go on with it."""
    from vardistill.cli.train import train

    config: Config = read(Config, RunFolder(folder).config)
    return train(config, folder, resume=True)


def teach(folder: Path, source: str) -> int:
    """Fit the teacher that the file `source` describes."""
    from vardistill.cli.teach import teach

    return teach(read(typing.get_args(TeachConfig), Path(source)), folder)


def measure(folder: Path, function: str) -> int:
    """Keep what a function returns of the folder's configuration, as `evaluation.json`."""
    run = RunFolder(folder)
    run.rewind(-1)
    write_whole(run.environment, json.dumps(environment(), indent=2))
    values = load(function)(read(Config, run.config), run)
    finite = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
    write_whole(folder / "evaluation.json", json.dumps(finite, indent=2))
    return 0


ACTIONS: dict[str, Callable[..., int]] = {"train": train, "teach": teach, "measure": measure}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
