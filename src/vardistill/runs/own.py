"""Objectives of a user's own file, FILE.py:CLASS. Importing this module does not import torch.

A file runs where it is named: on the command line, or in a configuration that trains. Other commands read what
`OwnConfig` keeps of it, and run nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import traceback
import types
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vardistill.errors import UsageError, first_line, unknown
from vardistill.objectives.registry import OwnConfig, PartConfig, SumConfig, singles
from vardistill.runs.config import Config
from vardistill.training import config_files


def own(source: str, options: Mapping[str, Any], others: Collection[str] = ()) -> tuple[OwnConfig, Any]:
    """What a run keeps of an objective's configuration from a user's file, and the configuration itself.

    Args:
        source: FILE.py:CLASS, the file as seen from here.
        options: of the class; those that are not said have its defaults.
        others: names of options that are none of the class's, and are meant for something else.

    Raises:
        UsageError: for a file, class or option that there is not, or that cannot be used.
    """
    file, _, name = source.rpartition(":")
    path = Path(file.strip()).expanduser().resolve()
    kind, digest = load_class(path, name)
    known = {f.name for f in dataclasses.fields(kind)}
    mine = {key: value for key, value in options.items() if key in known or key not in others}
    config = config_files.from_dict(kind, mine, source)
    kept = config_files.plain(config_files.to_dict(config))
    try:
        yaml.safe_dump(kept)
    except yaml.YAMLError as error:
        raise UsageError(f"the fields of {source} must be numbers, texts or lists of such: {kept}") from error
    return OwnConfig(f"{path}:{name}", kept, getattr(config, "takes_teacher", True), digest), config


def opened(config: Config) -> Config:
    """The configuration with the objectives of users' files themselves, in the place of what is kept of them.

    Raises:
        UsageError: where a file cannot be used, or is no longer what it was when the configuration was made.
    """
    if isinstance(config.objective, SumConfig):
        return replace(config, objective=SumConfig(tuple(map(_opened_part, config.objective.parts))))
    return replace(config, objective=_opened(config.objective))


def _opened_part(part: PartConfig) -> PartConfig:
    return replace(part, objective=_opened(part.objective))


def _opened(objective: Any) -> Any:
    if not isinstance(objective, OwnConfig):
        return objective
    now, config = own(objective.source, objective.options)
    if objective.digest not in (None, now.digest):
        raise UsageError(
            f"{objective.file} is not what it was when the run began: put it back, or start a new run of it (of its "
            "config.yaml by --config, without the line `digest`)"
        )
    return config


def check_resumed(config: Config, folder: Path) -> None:
    """Raise UsageError where going on would run a file that came with the run's folder, or any that is there."""
    for single in singles(config.objective):
        if not isinstance(single, OwnConfig):
            continue
        inside = single.file.resolve().is_relative_to(folder.resolve())
        if inside or not single.file.is_absolute() or single.digest is None:
            raise UsageError(
                f"the run's config.yaml names {single.file} as its objective's file, and not as a run of your own does "
                "(outside its folder, by its whole path and digest): what a folder brings is not run"
            )


def load_class(path: Path, name: str) -> tuple[type[Any], str]:
    """A configuration's class from a user's file, which is run, and the file's SHA-256.

    Raises:
        UsageError: for a file that cannot be read or run, a class that there is not, or one that is no dataclass with
            a `build`.
    """
    if path.suffix != ".py":
        raise UsageError(f"an objective of your own is FILE.py:CLASS, but {path.name}:{name} names no Python file")
    try:
        code = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the objective's file {path}: {error.strerror}") from error
    digest = hashlib.sha256(code).hexdigest()
    module = _run(path, code, f"vardistill_own_{digest[:16]}")
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        own = [key for key, v in vars(module).items() if isinstance(v, type) and hasattr(v, "build")]
        raise unknown(f"class of {path.name}", name, own)
    if not callable(getattr(kind, "build", None)):
        raise UsageError(f"{name} of {path.name} has no build(parts): name the class of the objective's configuration")
    if not dataclasses.is_dataclass(kind):
        raise UsageError(f"{name} of {path.name} is no dataclass: write @dataclass(frozen=True) above it")
    return kind, digest


def _run(path: Path, code: bytes, name: str) -> types.ModuleType:
    """The file as a module; of unchanged code the one that was run before."""
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look their types up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # it may import its neighbours
    try:
        exec(compile(code, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else lines[-1:]
        where = f", line {line if isinstance(line, int) else line[0]}" if line else ""
        raise UsageError(f"{path}{where}: {type(error).__name__}: {first_line(error)}") from error
    return module
