"""Configurations of runs on text to image. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vardistill.domains.pictures.config import PicturesConfig
from vardistill.domains.text.prompts import Source
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.errors import require
from vardistill.files import located
from vardistill.training.config import TrainingConfig

SHAPES = "shapes"
"""The data that `vardistill teach shapes` draws."""


@dataclass(frozen=True)
class TextConfig(PicturesConfig):
    """Pictures under prompts: a text-to-image pipeline, prompts and a student.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "text"
    built_in: ClassVar[tuple[str, ...]] = (SHAPES,)
    teacher: str = ""
    """A pipeline's folder or hub id, or a folder of `vardistill teach shapes`."""
    prompts: str = ""
    """A text file with a prompt in each line; FILE.csv:COLUMN, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or
    hf:NAME:COLUMN; or a folder of captioned pictures, with metadata.jsonl; default: the captions of --data."""
    data: str | None = None
    """A folder of captioned pictures, with metadata.jsonl: real samples, and what others are measured against; default,
    and what `shapes` stands for: the teacher's own, where it comes with some."""
    features: str | None = None
    """What distances to --data are measured with: a classifier's folder, or a transformers vision model's folder or hub
    id."""
    clip_model: str | None = None
    """A CLIP model's folder or hub id, for the CLIP score."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts:
            object.__setattr__(self, "prompts", Source.parse(self.prompts).found)
        if self.clip_model:
            object.__setattr__(self, "clip_model", located(self.clip_model))
        for name in ("size", "mirrored"):
            value = getattr(self, name)
            require(name, value, not value, "left out: captioned pictures get the pipeline's size")
        require("start", self.student.start, self.student.start == "teacher", "'teacher'")

    @property
    def labels(self) -> tuple[str, str]:
        """Teacher and target in a word each."""
        return Path(self.teacher).name or "none", Source.parse(self.prompts or self.data or self.teacher).label

    def learns_from(self, training: TrainingConfig) -> ShapesTeachConfig | None:
        """The fit of a teacher of shapes where none is given, for benches; else None."""
        if self.teacher or self.data != SHAPES:
            return None
        return ShapesTeachConfig(seed=training.seed, device=training.device)
