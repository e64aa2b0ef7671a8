"""Teachers of pictures and runs on them in seconds: a U-Net of 8 and 16 channels, a few steps, a few samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

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


def pixels(n: int, channels: int = 3, height: int = 4, width: int = 5, seed: int = 0) -> Tensor:
    """Random bytes; no two pictures are equal but for a chance of 256^−20 n²."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, height, width), generator=rng, dtype=torch.uint8)


def picture(x: Tensor) -> Image.Image:
    """(C, H, W) bytes as a picture."""
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy())


def save(x: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(x).save(path)
    return path


def bytes_of(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().to(torch.uint8)


def everything(images: Any) -> Tensor:
    return images.take(torch.arange(len(images)))
