"""Prompts from a text file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vardistill.errors import UsageError, first_line


@dataclass(frozen=True)
class Prompts:
    """Different prompts, in the order of their file.

    Attributes:
        texts: the prompts.
        left_out: how many lines were empty, and how many said what one before them did.
    """

    texts: tuple[str, ...]
    left_out: tuple[int, int] = (0, 0)

    @property
    def told(self) -> str:
        """What was read, in a line."""
        empty, repeated = self.left_out
        out = [f"{n} {what}" for n, what in ((empty, "empty"), (repeated, "repeated")) if n]
        return f"{len(self.texts)} prompts" + (f" (left out: {', '.join(out)})" if out else "")


def read_prompts(path: Path) -> Prompts:
    """The lines of a text file, without repetitions.

    Raises:
        UsageError: for a file that is not there, is no text, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"cannot read the prompts {path}: {error.strerror}") from error
    if any("\0" in line for line in lines):
        raise UsageError(f"{path} is no text: it holds zeros")
    texts = [text for line in lines if (text := " ".join(line.split()))]
    different = tuple(dict.fromkeys(texts))
    if not different:
        raise UsageError(f"{path} holds no prompt: give one in each line")
    return Prompts(different, (len(lines) - len(texts), len(texts) - len(different)))
