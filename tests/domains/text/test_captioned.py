"""Folders of captioned pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vardistill.domains.text.captioned import CaptionedImages, read_captions, save_captioned
from vardistill.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, rng: torch.Generator) -> Path:
    save_captioned(2 * torch.rand(3, 3, 8, 8, generator=rng) - 1, ["a dog", "a cat", "a dog"], tmp_path)
    return tmp_path


def test_labels_are_the_captions(folder: Path) -> None:
    images = CaptionedImages(folder)
    assert images.class_names == ("a dog", "a cat")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0]
    assert images.shape == (3, 8, 8)


def test_pictures_come_back_in_eight_bits(folder: Path, rng: torch.Generator) -> None:
    pictures = 2 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(rng.initial_seed())) - 1
    found = CaptionedImages(folder).take(torch.arange(3))
    assert (found - pictures).abs().max() <= 1 / 255 + 1e-6


def test_a_picture_that_cannot_be_read_is_left_out_with_its_caption(folder: Path) -> None:
    (folder / "00001.png").write_bytes(b"none")
    images = CaptionedImages(folder)
    assert images.class_names == ("a dog",)
    assert len(images) == 2
    assert any("00001.png" in remark for remark in images.remarks)


@pytest.mark.parametrize("name", ["text", "caption", "prompt"])
def test_captions_by_any_of_three_names_with_single_blanks(name: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", name: " a  big\ndog"}) + "\n\n")
    assert list(read_captions(tmp_path)) == [("x.png", "a big dog")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nothing", "line 1: give"),
        ("[1]", "line 1: give"),
        ('{"file_name": "x.png"}', "line 1: give"),
        ('{"text": "x"}', "line 1: give"),
        ('{"file_name": "x.png", "text": null}', "line 1: give"),
        ('{"file_name": "../x.png", "text": "x"}', "line 1: ../x.png is outside the folder"),
        ('{"file_name": "/x.png", "text": "x"}', "line 1: /x.png is outside the folder"),
    ],
)
def test_lines_that_are_none_are_told(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UsageError, match=told):
        list(read_captions(tmp_path))


def test_a_folder_without_captions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the captions"):
        list(read_captions(tmp_path))
