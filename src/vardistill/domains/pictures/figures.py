"""Pictures side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vardistill.files import check_free, whole


def grid(pictures: Tensor, columns: int = 10) -> NDArray[np.uint8]:
    """Pictures (n, C, H, W) in [−1, 1] as one of rows of `columns`, (height, width, 3), a pixel apart.

    Of more than three channels the first three are shown, as red, green and blue; of two the first.
    """
    pictures = pictures[:, : 3 if pictures.shape[1] >= 3 else 1]
    x = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    n, _, height, width = x.shape
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 128, dtype=np.uint8)
    for i, picture in enumerate(x):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = picture.transpose(1, 2, 0)  # one channel is repeated
    return canvas


def grids_figure(grids: Mapping[str, Tensor]) -> Figure:
    """Pictures (n, C, H, W) by title, side by side."""
    figure = Figure(figsize=(4.6 * len(grids), 4.9), layout="constrained")
    for axes, (title, pictures) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        axes.imshow(grid(pictures), interpolation="nearest")
        axes.set_title(title)
        axes.set_axis_off()
    return figure


def save_grids(grids: Mapping[str, Tensor], path: Path) -> None:
    """`grids_figure` as a file."""
    with whole(path) as partial:
        grids_figure(grids).savefig(partial, dpi=120)


def save_grid(pictures: Tensor, path: Path) -> None:
    """One grid as a file, each pixel four times as wide and high below 64 pixels."""
    picture = Image.fromarray(grid(pictures, columns=max(1, round(math.sqrt(len(pictures))))))
    factor = 4 if pictures.shape[-1] < 64 else 1
    with whole(path) as partial:
        picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(partial)


def save_folder(pictures: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Every picture as a file 00000.png, ..., in subfolders by label where there are any.

    Raises:
        UsageError: where the folder is not empty or cannot be written.
    """
    with whole(path, folder=True) as partial:
        check_free(path)
        for i, picture in enumerate(pictures):
            folder = partial if labels is None else partial / str(int(labels[i]))
            folder.mkdir(exist_ok=True)
            Image.fromarray(grid(picture[None], columns=1)).save(folder / f"{i:05d}.png")
