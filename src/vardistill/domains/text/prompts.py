"""Prompts from a text file, from a column of a table or of a data set, or from a folder of captioned pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vardistill.errors import UsageError, first_line
from vardistill.files import located

TABLES = (".csv", ".jsonl", ".parquet")
"""Files that have columns."""

HOW = "FILE.txt with one a line, FILE.csv:COLUMN, FILE.jsonl:COLUMN, FILE.parquet:COLUMN, hf:NAME:COLUMN or a FOLDER"
"""How prompts are named."""


@dataclass(frozen=True)
class Source:
    """Where prompts are: a file, a folder or hf:NAME, and the column in it, "" for none."""

    place: str
    column: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """From PLACE or PLACE:COLUMN."""
        place, colon, column = text.rpartition(":")
        named = place.startswith("hf:") or place.lower().endswith(TABLES)
        return cls(place, column) if colon and named else cls(text)

    @property
    def found(self) -> str:
        """The same in one text, with an absolute path where it is here."""
        return located(self.place) + (f":{self.column}" if self.column else "")

    @property
    def label(self) -> str:
        """In a word."""
        return Path(self.place).stem


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


def read_prompts(source: str | Path) -> Prompts:
    """The lines of a text file, or the entries of a column, without repetitions.

    Args:
        source: one of

            - a text file in UTF-8, with a prompt in each line;
            - `FILE.csv:COLUMN`, with the columns' names in the first line, `FILE.jsonl:COLUMN` or
              `FILE.parquet:COLUMN`;
            - `FOLDER`, of captioned pictures, with `metadata.jsonl`; see `captioned`;
            - `hf:NAME:COLUMN`, of a data set of the Hugging Face hub, or a folder that `save_to_disk` wrote, read with
              `datasets`: of several splits the training set.

    Raises:
        UsageError: for what is not there or cannot be read, a column that is not there or holds other than texts, a
            damaged line, or no prompt.
    """
    where = Source.parse(str(source))
    lines = [text or "" for text in _entries(where)]
    texts = [text for line in lines if (text := " ".join(line.split()))]
    different = tuple(dict.fromkeys(texts))
    if not different:
        what = f"no text in '{where.column}'" if where.column else "no prompt: give one in each line"
        raise UsageError(f"{where.place} holds {what}")
    return Prompts(different, (len(lines) - len(texts), len(texts) - len(different)))


def _entries(source: Source) -> list[str | None]:
    place, column = source.place, source.column
    if place.startswith("hf:"):
        return _hub(place.removeprefix("hf:"), column)
    path = Path(place)
    if path.is_dir():
        return [text for _, text in import_module("vardistill.domains.text.captioned").read_captions(path)]
    reader = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    try:
        if reader is not None:
            return reader(path, column)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8: {first_line(error)}") from error
    except OSError as error:
        raise UsageError(f"cannot read the prompts {path}: {error.strerror or first_line(error)}") from error
    if any("\0" in line for line in lines):
        raise UsageError(f"{path} is no text: it holds zeros")
    return list(lines)


def _csv(path: Path, column: str) -> list[str | None]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            _check_column(path, column, names)
            place, found = names.index(column), []
            for row in reader:
                if row and len(row) != len(names):
                    raise csv.Error(f"it has {len(row)} fields, but the first line names {len(names)}")
                found.append(row[place] if row else None)
        except csv.Error as error:
            raise UsageError(f"{path} is damaged in line {reader.line_num}: {error}") from error
    return found


def _jsonl(path: Path, column: str) -> list[str | None]:
    found: list[str | None] = []
    for number, row in _rows(path):
        if not found:
            _check_column(path, column, list(row))
        if column not in row:
            raise UsageError(f"{path} is damaged in line {number}: it has no '{column}'")
        found.append(_text(row[column], f"{path}, line {number}", column))
    return found


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON, one a line, with their lines' numbers; empty lines are passed over."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path} is damaged in line {number}: {first_line(error)}") from error
            if not isinstance(row, dict):
                raise UsageError(f"{path} is damaged in line {number}: it is no object of JSON")
            yield number, row


def _parquet(path: Path, column: str) -> list[str | None]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow: pip install 'vardistill[datasets]'") from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            names = table.schema_arrow.names
            values = table.read([column]).column(0).to_pylist() if column in names else []
        except Exception as error:  # of its header, its compression, or its values
            raise UsageError(f"{path} cannot be read as .parquet: {first_line(error)}") from error
    _check_column(path, column, names)
    return [_text(value, f"{path}, row {i}", column) for i, value in enumerate(values)]


def _hub(name: str, column: str) -> list[str | None]:
    from vardistill.domains.pictures.sources import load_hub, roles

    data, source = load_hub(name), f"hf:{name}"
    if isinstance(data, dict):
        training = roles(list(data))[0] or (list(data) if len(data) == 1 else [])
        if len(training) != 1:
            raise UsageError(f"{source} has the sets {', '.join(data)}, and not one training set")
        data = data[training[0]]
    _check_column(source, column, list(data.features))
    values = data.select_columns([column]).with_format(None)[column][:]
    return [_text(value, f"{source}, row {i}", column) for i, value in enumerate(values)]


def _check_column(source: str | Path, column: str, names: list[str]) -> None:
    """Raise UsageError where there is no such column, with those that there are."""
    if not names:
        raise UsageError(f"{source} is empty: it has no columns")
    known = ", ".join(names)
    if not column:
        raise UsageError(f"{source} has columns: say which one has the prompts, as in {source}:{names[0]}, of {known}")
    if column not in names:
        raise UsageError(f"{source} has no column '{column}': it has {known}")


def _text(value: object, where: str, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{where}: '{column}' must be a text, but is a {type(value).__name__}")
    return value
