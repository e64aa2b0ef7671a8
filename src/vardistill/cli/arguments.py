"""Flags from dataclasses, by tyro, with mistakes told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import tyro

from vardistill.errors import UsageError, unknown
from vardistill.progress import LEAST, columns

T = TypeVar("T")

OPTIONAL = r"Error parsing (--\S+): no type matching \{None\}\|(INT|FLOAT) could be instantiated from \['(.*?)'\]"
"""What tyro says of a text that is no number, of a flag that may be left out."""

NUMBERS = {
    r"invalid literal for int\(\) with base 10": "a whole number",
    "could not convert string to float": "a number",
}
"""What Python says of a text that is no number, and what was wanted."""


def parse(cls: type[T], arguments: list[str], command: str, about: str, default: T | None = None) -> T:
    """An instance of `cls` from flags, nested dataclasses' flags without prefixes.

    Args:
        cls: a dataclass; its fields' docstrings are the help.
        arguments: the words of the command line after the command's own.
        command: for the usage line.
        about: first line of the help.
        default: values of the flags that are not given.

    Raises:
        UsageError: for an unknown flag, with the nearest known ones, or a value that does not fit its flag.
        SystemExit: after printing the help.
    """
    _refuse_unknown_flags(cls, arguments, default)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), wide_enough():
            parsed = tyro.cli(
                cls,
                args=arguments,
                prog=f"vardistill {command}",
                description=textwrap.fill(about, columns()),
                default=default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
            return cast(T, parsed)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(errors.getvalue())) from None


@contextlib.contextmanager
def wide_enough() -> Iterator[None]:
    """In a terminal of `LEAST` columns at least: of one column tyro's help has no end."""
    told = os.environ.get("COLUMNS")
    if shutil.get_terminal_size().columns < LEAST:
        os.environ["COLUMNS"] = str(LEAST)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if told is not None:
            os.environ["COLUMNS"] = told


def take_positional(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The first word, unless it is a flag, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def value_of(flag: str, arguments: list[str]) -> str | None:
    """What the words say for a flag, which other flags' defaults depend on; None where it is not among them."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=False):  # of no words there is none after
        name, _, value = word.partition("=")
        if name == flag:
            return value or after
    return None


def take_value(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """What the words say for a flag, None where it is not among them, and the words without it."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == flag:
            if equals:
                return value, [*arguments[:i], *arguments[i + 1 :]]
            if i + 1 == len(arguments):
                raise UsageError(f"{flag} needs a value")
            return arguments[i + 1], [*arguments[:i], *arguments[i + 2 :]]
    return None, arguments


def _refuse_unknown_flags(cls: type, arguments: list[str], default: Any) -> None:
    known = {"help", *flags(cls, default)}
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            name = word[2:].split("=", 1)[0].replace("_", "-")
            if name not in known and name.removeprefix("no-") not in known:
                error = unknown("flag", name, known)
                raise UsageError(
                    str(error) if "did you mean" in str(error) else f"unknown flag '{word}': --help lists them"
                )


def flags(cls: Any, default: Any = None) -> set[str]:
    """The names of the flags of a dataclass and the dataclasses in it; a union's are those of its default."""
    found: set[str] = set()
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name, None)
        part = type(value) if dataclasses.is_dataclass(value) else hints[field.name]
        if dataclasses.is_dataclass(part):
            found |= flags(part, value)
        else:
            found.add(field.name.replace("_", "-"))
    return found


def _one_line(message: str) -> str:
    """Tyro's framed message without its frame, its title and its pointers to the help."""
    text = " ".join(re.sub(r"[│╭╮╰╯─]+|-{3,}", " ", message).split())
    text = re.split(r"Argument helptext:|For full helptext|Full help", text)[0].strip()
    text = re.sub(r"^(Value error|Parsing error|Invalid choice|Missing argument|Unrecognized options) ", "", text)
    if found := re.match(OPTIONAL, text):
        return f"{found[1]} must be {'a whole number' if found[2] == 'INT' else 'a number'}, but is '{found[3]}'"
    for told, meant in NUMBERS.items():
        text = re.sub(rf"^Error parsing (--\S+): {told}: ", rf"\1 must be {meant}, but is ", text)
    return re.sub(r"^Error parsing [^-]\S*: ", "", text)
