r"""Pictures with captions: a folder with `metadata.jsonl`, as `datasets` calls an image folder.

    {"file_name": "00000.png", "text": "a small red circle top left"}

A caption is a label, as a prompt is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from vardistill.domains.pictures.figures import grid
from vardistill.domains.pictures.sources import EncodedImages, Size
from vardistill.errors import UsageError, first_line

METADATA = "metadata.jsonl"

CAPTIONS = ("text", "caption", "prompt")
"""Names of a caption, the first that is there."""


class CaptionedImages(EncodedImages):
    """Pictures of a folder, decoded on demand; the label of each is its caption's number.

    Args:
        root: the folder, with `metadata.jsonl`.
        size: see `EncodedImages`.

    Attributes:
        class_names: the different captions, in the order of the file.

    Raises:
        UsageError: for a folder without captions, a damaged line, or a picture outside the folder; see `EncodedImages`.
    """

    def __init__(self, root: Path, size: Size | None = None) -> None:
        self.root, found = root, list(read_captions(root))
        self.files = [file for file, _ in found]
        super().__init__(range(len(found)), size, None, {})
        captions = [found[place][1] for place in self.places]
        self.class_names = tuple(dict.fromkeys(captions))
        number = {text: i for i, text in enumerate(self.class_names)}
        self.labels = torch.tensor([number[text] for text in captions])

    def encoded(self, place: int) -> tuple[str, str]:
        """The name in the file, and the path."""
        return self.files[place], str(self.root / self.files[place])


def read_captions(root: Path) -> Iterator[tuple[str, str]]:
    """File names below `root` and their captions, blanks in these as one.

    Raises:
        UsageError: where `metadata.jsonl` cannot be read, or a line of it is no picture of the folder with its caption.
    """
    path = root / METADATA
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the captions, {path}: {first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file = str(entry["file_name"])
            text = " ".join(next(entry[name] for name in CAPTIONS if name in entry).split())
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
            raise UsageError(
                f'{path}, line {number}: give {{"file_name": "1.png", "text": "a caption"}} in each line'
            ) from error
        if not (root / file).resolve().is_relative_to(root.resolve()):
            raise UsageError(f"{path}, line {number}: {file} is outside the folder")
        yield file, text


def save_captioned(pictures: torch.Tensor, captions: Sequence[str], root: Path) -> None:
    """Write pictures (n, C, H, W) in [−1, 1] and a caption of each into the folder `root`."""
    lines = []
    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        file = f"{i:05d}.png"
        Image.fromarray(grid(picture[None], columns=1)).save(root / file)
        lines.append(json.dumps({"file_name": file, "text": text}, ensure_ascii=False))
    (root / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")
