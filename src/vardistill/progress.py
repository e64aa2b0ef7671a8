"""What a user sees while work is under way, on stderr: phases with their seconds, and bars.

A terminal has one line that is rewritten. Elsewhere, in a file for example, there are plain lines without control
characters, of a bar two a minute. Of several processes the first one speaks. Importing this module imports no torch.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vardistill.launch import is_first

if TYPE_CHECKING:
    from tqdm import tqdm

WIDTH = 120
"""Columns of a bar, at most."""

LEAST = 20
"""Columns that texts are broken into, however few a terminal says that it has."""

COUNTED = 40
"""Of these, for the bar and its counts."""


def say(*lines: str) -> None:
    """Lines on stderr, above a bar where there is one."""
    if is_first():
        from tqdm import tqdm

        tqdm.write("\n".join(lines), file=sys.stderr)


@contextmanager
def phase(what: str, kept: bool = True) -> Iterator[None]:
    """Name what is being done and, when it is done, its seconds.

    Args:
        what: in a few words.
        kept: leave a line; else it is there on a terminal alone, as long as it lasts. Work that fails leaves none.
    """
    terminal, started = sys.stderr.isatty() and is_first(), time.monotonic()
    if terminal:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        kept = False
        raise
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if kept:
            say(f"{what}: {time.monotonic() - started:.1f} s")


class _Lines:
    """Takes what a bar writes to a terminal, and writes its text as lines."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                print(line.rstrip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def bar(
    of: Iterable[Any] | None = None, *, total: int | None = None, unit: str, name: str = "", initial: int = 0
) -> tqdm[Any]:
    """A progress bar over `of`, with the time that is left, or one that its user moves on.

    The latter tells what `set_postfix_str` says, the time among it; `fitting` says how much of that has a place.
    """
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    head = f"{name}: " if name else ""
    counts = f"{{n_fmt}}/{{total_fmt}} {unit}" + ("{postfix}" if of is None else ", {remaining} left")
    return tqdm(
        of, total=total, initial=initial, disable=not is_first(), leave=True, mininterval=0.5 if terminal else 30.0,
        bar_format=f"{head}{{percentage:3.0f}}% {'{bar} ' if terminal else ''}{counts}",
        file=None if terminal else _Lines(), ncols=min(WIDTH, columns()) if terminal else None, nrows=24,
    )  # fmt: skip


def columns() -> int:
    """Of the terminal, one less than it has: a full line would break."""
    return max(LEAST, shutil.get_terminal_size().columns - 1)


def fitting(figures: Iterable[str]) -> str:
    """As many of the figures, the first ones, as a bar of this terminal has a place for; whole ones."""
    width, kept = (min(WIDTH, columns()) if sys.stderr.isatty() else 10**6) - COUNTED, []
    for figure in figures:
        width -= len(figure) + 2
        if width < 0:
            break
        kept.append(figure)
    return ", ".join(kept)


def clock(seconds: float) -> str:
    """A duration, as 4:07 or 1:02:45; "?" for one without an end."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
