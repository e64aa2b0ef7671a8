"""Configurations as YAML: a file names its type, and is read with its types, choices and unknown keys checked.

Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from vardistill.choices import options_of
from vardistill.errors import UsageError, first_line, unknown
from vardistill.files import write_whole
from vardistill.training.folder import UNREADABLE


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data; what may be of several types carries its type's name as `kind`."""
    hints = typing.get_type_hints(type(config))
    return {f.name: _plain(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)}


def _plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value):
        several = len(_dataclasses(options_of(hint))) > 1
        return ({"kind": kind_of(type(value))} if several else {}) | to_dict(value)
    if isinstance(value, tuple):
        return tuple(_plain(v, typing.get_args(hint)[0]) for v in value)
    return str(value) if isinstance(value, Path) else value


def _dataclasses(options: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(option for option in options if dataclasses.is_dataclass(option))


def from_dict(cls: Any, data: Any, where: str = "config") -> Any:
    """The inverse of `to_dict`; raises UsageError for unknown keys (with the nearest) and values of a wrong type."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} must be a mapping, but is {data!r}")
    hints, known = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise unknown(f"key in {where}", str(key), known)
    if hasattr(cls, "check_partial"):
        cls.check_partial(data, where)
    for f in dataclasses.fields(cls):
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where} needs a {f.name}")
    return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def kind_of(cls: type) -> str:
    """The name of a configuration's type in files: its own or the class's, less `Config`."""
    return str(getattr(cls, "name", cls.__name__.removesuffix("Config")))


def _value(hint: Any, value: Any, where: str) -> Any:
    options = options_of(hint)
    if kinds := _dataclasses(options):
        if value is None and types.NoneType in options:
            return None
        return _dataclass(kinds, value, where)
    for option in options:
        if typing.get_origin(option) is tuple and _dataclasses(options_of(_item(option))):
            if not isinstance(value, (list, tuple)):
                raise UsageError(f"{where} must be a list, but is {value!r}")
            return tuple(_value(_item(option), v, f"{where}[{i}]") for i, v in enumerate(value))
        matched, converted = _match(option, value)
        if matched:
            return converted
    raise UsageError(f"{where} must be {_describe(options)}, but is {value!r}")


def _item(option: Any) -> Any:
    """What a tuple of any length holds, without its annotations."""
    item = typing.get_args(option)[0]
    return typing.get_args(item)[0] if typing.get_origin(item) is typing.Annotated else item


def _dataclass(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if len(options) == 1:
        return from_dict(options[0], value, where)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be a mapping, but is {value!r}")
    kinds = {kind_of(option): option for option in options}
    rest = dict(value)
    kind = str(rest.pop("kind", kind_of(options[0])))
    if kind not in kinds:
        raise unknown(f"kind of {where}", kind, kinds)
    return from_dict(kinds[kind], rest, where)


def _match(option: Any, value: Any) -> tuple[bool, Any]:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option), value
    if option is float:
        return _number(value)
    if typing.get_origin(option) is tuple:
        return _tuple(typing.get_args(option)[0], value)
    if option is Path:
        return isinstance(value, str), Path(str(value))
    return type(value) is (typing.get_origin(option) or option), value


def _tuple(item: Any, value: Any) -> tuple[bool, Any]:
    """Whether a tuple of such items is meant, and which."""
    if not isinstance(value, (list, tuple)):
        return False, value
    matches = [_match(item, v) for v in value]
    return all(matched for matched, _ in matches), tuple(converted for _, converted in matches)


def _number(value: Any) -> tuple[bool, Any]:
    """Whether a float is meant, and which; YAML 1.1 reads 1e-3, without a point, as a string."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return True, float(value)
    return False, value


def _describe(options: tuple[Any, ...]) -> str:
    return " or ".join(map(_describe_one, options))


def _describe_one(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return str(option.__args__)
    return f"a list of {option.__args__[0].__name__}" if typing.get_origin(option) is tuple else str(option.__name__)


KINDS = {
    "": "a run",
    "PointsTeach": "a teacher of points",
    "PicturesTeach": "a teacher of pictures",
    "ShapesTeach": "a text-to-image teacher",
}
"""What a file's kind, its first line, says that it configures; of a run it says nothing."""

EARLIER = {"Images": "a run on pictures", "Teach": "a teacher of points", "ImagesTeach": "a teacher of pictures"}
"""Kinds of earlier versions."""


def write(config: Any, path: Path) -> None:
    """Write the configuration as YAML, its type's name first; raises UsageError where it cannot be written."""
    kind = {"kind": name} if (name := kind_of(type(config))) else {}
    write_whole(path, yaml.safe_dump(kind | plain(to_dict(config)), sort_keys=False, allow_unicode=True))


def plain(data: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, tuple) else data


class _Loader(yaml.SafeLoader):
    """Plain data, with no key of a mapping twice: the second would take the first one's place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and keys[i] in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def read(classes: Any, path: Path) -> Any:
    """Read a configuration of a type, or of one of several; a file that names no kind is of a `Config`.

    Raises:
        UsageError: where the file is missing, or not such a configuration.
    """
    try:
        data = yaml.load(path.read_text("utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageError(f"cannot read the configuration {path}{line}: {error.problem}") from error
    except UNREADABLE as error:
        raise UsageError(f"cannot read the configuration {path}: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} must be a mapping, but is {data!r}")
    kinds = {kind_of(option): option for option in (classes if isinstance(classes, tuple) else (classes,))}
    kind = str(data.pop("kind", ""))
    if kind in EARLIER or (kind == "" and "generator" in data):
        raise UsageError(
            f"{path} is the configuration of {EARLIER.get(kind, 'a run on points')} of an earlier version: write it "
            "anew, from a preset (`vardistill list`) whose config.yaml shows today's names"
        )
    if kind not in kinds:
        wanted = " or ".join(KINDS[name] for name in kinds)
        there = KINDS.get(kind, f"an unknown kind, {kind!r}")
        raise UsageError(f"{path} is the configuration of {there}, but wanted here is that of {wanted}")
    return from_dict(kinds[kind], data, path.name)
