"""Teachers of pictures and runs on them in seconds: a U-Net of 8 and 16 channels, a few steps, a few samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vardistill.domains.pictures import parts, teach
from vardistill.domains.pictures.config import PicturesTeachConfig, UNetConfig
from vardistill.runs import experiment

TEACH = PicturesTeachConfig(
    network=UNetConfig((8, 16)), steps=4, batch=8, checkpoint_every=2, eval_samples=12, device="cpu"
)

QUICK = ["--steps", "2", "--batch", "8", "--eval-samples", "12", "--tracker", "none", "--device", "cpu"]
"""Flags of `vardistill train`."""


@contextmanager
def quick() -> Iterator[None]:
    """Within, a classifier is fitted in a few steps, teachers' pictures take two or three, and there is no report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach, "fit_classifier", partial(teach.fit_classifier, steps=20))
        patch.setattr(teach, "STEPS", (2, 3))
        patch.setattr(parts, "TEACHER_STEPS", 2)
        patch.setattr(parts, "TIMED", 4)
        patch.setattr(experiment, "write_report", lambda *ignored: None)
        yield


def save_npz(path: Path, n: int = 80, classes: int = 0, size: int = 8, channels: int = 1) -> Path:
    """Random pictures of uint8, with labels in turn where there are classes."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, size, size, channels), generator=rng, dtype=torch.uint8).numpy()
    labels = {"labels": np.arange(n) % classes} if classes else {}
    np.savez(path, images=pixels, **labels)
    return path
