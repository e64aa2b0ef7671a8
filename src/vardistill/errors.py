"""The one exception that means "the user can mend this", and other errors in a line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real

SHOWN = 100
"""Characters of a value that an error still shows."""


class UsageError(ValueError):
    """A user's mistake, told in one line: what was wrong and what would be right.

    The command line prints the line without a traceback and exits with status 2.
    """


def require(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise a UsageError that names the value unless its rule holds."""
    if not holds:
        text = str(value)
        shown = text if len(text) < SHOWN and "\n" not in text else f"a {type(value).__name__}"
        raise UsageError(f"{name} must be {rule}, but is {shown}")


def require_type(name: str, value: object, kind: type | tuple[type, ...], rule: str) -> None:
    """Raise a UsageError that names the value's type unless it is of this kind."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be {rule}, but is {type(value).__name__}")


def require_positive(name: str, value: object) -> None:
    """Raise a UsageError that names the value unless it is a positive, finite number."""
    require(name, value, isinstance(value, Real) and 0 < float(value) < math.inf, "a number, positive and finite")


def require_whole(name: str, value: object, least: int = 1) -> None:
    """Raise a UsageError that names the value unless it is a whole number of at least this size."""
    require(name, value, isinstance(value, Integral) and not isinstance(value, bool), "a whole number")
    require(name, value, isinstance(value, Integral) and int(value) >= least, f"at least {least}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the processor's or an accelerator's memory did not suffice; torch has no one type for it."""
    told = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """An error for a `name` that is not among the `known` ones; it names the nearest."""
    if not isinstance(name, str):
        return UsageError(f"a {kind} is told by its name, but is {type(name).__name__}")
    names = sorted(known)
    folded = {own.casefold(): own for own in names}
    nearest = [folded[own] for own in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} '{name}': {hint}")
