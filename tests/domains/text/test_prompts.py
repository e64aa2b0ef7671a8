"""Prompts of tables, data sets and folders of captioned pictures are those of a text file with the same lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vardistill.domains.text.config import TextConfig
from vardistill.domains.text.prompts import Prompts, Source, read_prompts
from vardistill.errors import UsageError

datasets = pytest.importorskip("datasets", reason="needs datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

ENTRIES = ["a  red, dog", None, 'a "cat"\nin a hat', "", "a red, dog", "Кот"]
WANTED = Prompts(("a red, dog", 'a "cat" in a hat', "Кот"), (2, 1))


def write_csv(path: Path, entries: list[str | None] = ENTRIES) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["id", "caption"], *([i, entry] for i, entry in enumerate(entries))])
    return path


def write_jsonl(path: Path, column: str = "caption") -> Path:
    entries = [entry or "" for entry in ENTRIES] if column == "text" else ENTRIES  # a caption is there
    lines = [json.dumps({"file_name": f"{i}.png", column: entry}) for i, entry in enumerate(entries)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def table() -> dict[str, list[str] | list[str | None]]:
    return {"id": [str(i) for i in range(len(ENTRIES))], "caption": ENTRIES}


def every_source(folder: Path) -> dict[str, str]:
    """The same prompts in every form."""
    pyarrow.parquet.write_table(pyarrow.table(table()), folder / "x.parquet")
    data = datasets.Dataset.from_dict(table())
    data.save_to_disk(folder / "one")
    others = datasets.Dataset.from_dict({"caption": ["another"]})
    datasets.DatasetDict({"test": others, "train": data}).save_to_disk(folder / "splits")
    (folder / "pictures").mkdir()
    write_jsonl(folder / "pictures" / "metadata.jsonl", "text")
    (folder / "pictures" / "0.png").write_bytes(b"")
    return {
        "csv": f"{write_csv(folder / 'x.csv')}:caption",
        "jsonl": f"{write_jsonl(folder / 'x.jsonl')}:caption",
        "parquet": f"{folder / 'x.parquet'}:caption",
        "hub": f"hf:{folder / 'one'}:caption",
        "splits": f"hf:{folder / 'splits'}:caption",
        "pictures": str(folder / "pictures"),
    }


def test_every_source_gives_the_same_prompts(tmp_path: Path) -> None:
    found = {name: read_prompts(source) for name, source in every_source(tmp_path).items()}
    assert found == dict.fromkeys(found, WANTED)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("text", "place", "column"),
    [
        ("prompts.txt", "prompts.txt", ""),
        ("C:\\prompts.txt", "C:\\prompts.txt", ""),
        ("a.CSV:my column", "a.CSV", "my column"),
        ("hf:owner/name:text", "hf:owner/name", "text"),
        ("hf:owner/name", "hf:owner/name", ""),
        ("12:30.txt", "12:30.txt", ""),
    ],
)
def test_the_column_stands_behind_a_colon(text: str, place: str, column: str) -> None:
    assert Source.parse(text) == Source(place, column)


def test_a_configuration_keeps_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "x.csv")
    monkeypatch.chdir(tmp_path)
    config = TextConfig(prompts="x.csv:caption")
    assert config.prompts == f"{tmp_path / 'x.csv'}:caption"
    assert config.labels[1] == "x"
    assert TextConfig(prompts="hf:a/b:text").prompts == "hf:a/b:text"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv:text", "id,caption\n0,a\n", r"x\.csv has no column 'text': it has id, caption"),
        ("x.csv", "id,caption\n0,a\n", r"say which one has the prompts, as in .*x\.csv:id, of id, caption"),
        ("x.csv:caption", "", r"x\.csv is empty: it has no columns"),
        ("x.csv:caption", "id,caption\n", r"x\.csv holds no text in 'caption'"),
        ("x.csv:caption", "id,caption\n0,a\n1\n", r"damaged in line 3: it has 1 fields, but the first line names 2"),
        ("x.csv:caption", 'id,caption\n0,"a\n', "damaged in line 2: unexpected end of data"),
        ("x.csv:caption", b"id,caption\n0,\xff\n", "no text in UTF-8"),
        ("x.jsonl:text", '{"caption": "a"}\n', r"has no column 'text': it has caption"),
        ("x.jsonl", '{"id": 0, "caption": "a"}\n', r"say which one has the prompts"),
        ("x.jsonl:caption", "\n", "holds no text in 'caption'"),
        ("x.jsonl:caption", '{"caption": "a"}\n\n{"capt', r"damaged in line 3: Unterminated string"),
        ("x.jsonl:caption", '{"caption": "a"}\n["b"]\n', "damaged in line 2: it is no object of JSON"),
        ("x.jsonl:caption", '{"caption": "a"}\n{"id": 1}\n', "damaged in line 2: it has no 'caption'"),
        (
            "x.jsonl:caption",
            '{"caption": "a"}\n{"caption": ["b"]}\n',
            "'caption' must be a text, but is a list",
        ),
        ("x.parquet:caption", b"PAR1", r"x\.parquet cannot be read as \.parquet"),
        ("none.csv:caption", None, r"cannot read the prompts .*none\.csv: No such file"),
    ],
)
def test_what_holds_no_prompts_gets_a_line(name: str, content: str | bytes | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / Source.parse(name).place).write_bytes(data)
    with pytest.raises(UsageError, match=told) as error:
        read_prompts(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)


def test_columns_of_other_kinds_are_told(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="row 0: 'id' must be a text, but is a int"):
        read_prompts(f"{tmp_path / 'x.parquet'}:id")
    with pytest.raises(UsageError, match=r"x\.parquet has no column 'caption': it has id, text"):
        read_prompts(f"{tmp_path / 'x.parquet'}:caption")
    datasets.DatasetDict({"a": (d := datasets.Dataset.from_dict({"text": ["a"]})), "b": d}).save_to_disk(tmp_path / "d")
    with pytest.raises(UsageError, match="has the sets a, b, and not one training set"):
        read_prompts(f"hf:{tmp_path / 'd'}:text")
    d.save_to_disk(tmp_path / "one")
    with pytest.raises(UsageError, match="one has no column 'caption': it has text"):
        read_prompts(f"hf:{tmp_path / 'one'}:caption")
    with pytest.raises(UsageError, match=r"cannot read the captions, .*metadata\.jsonl: .*No such file"):
        read_prompts(tmp_path)
