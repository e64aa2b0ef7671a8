"""Configurations of runs on text to image. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vardistill.domains.pictures.config import PicturesConfig, PicturesTeachConfig
from vardistill.errors import require
from vardistill.files import located
from vardistill.training.config import TrainingConfig


@dataclass(frozen=True)
class TextConfig(PicturesConfig):
    """Pictures under prompts: a text-to-image pipeline, prompts and a student.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "text"
    prompts: str = ""
    """A text file with a prompt in each line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts:
            object.__setattr__(self, "prompts", located(self.prompts))
        for name in ("data", "features"):
            value = getattr(self, name)
            require(name, value, value is None, "left out: text to image learns from its teacher and prompts alone")
        require("start", self.student.start, self.student.start == "teacher", "'teacher'")

    @property
    def labels(self) -> tuple[str, str]:
        """Teacher and target in a word each."""
        return Path(self.teacher).name or "none", Path(self.prompts).stem

    def learns_from(self, training: TrainingConfig) -> PicturesTeachConfig | None:
        """Nothing is fitted."""
        return None
