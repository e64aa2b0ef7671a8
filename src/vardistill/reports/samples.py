"""A run's samples as a picture: points in the plane, or grids of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vardistill.domains.pictures.figures import save_grids
from vardistill.domains.points.problems import Problem
from vardistill.files import whole
from vardistill.reports.contents import BESIDE
from vardistill.reports.figures import pair_figure, samples_figure

SHOWN = 100
"""Pictures of a grid."""


def save_samples(samples: Mapping[str, Tensor], problem: Problem | None, path: Path) -> None:
    """Draw sets of samples by name, the student's own as `samples`: pictures (n, C, H, W) side by side, or points."""
    own, beside = samples["samples"], {BESIDE[name]: v for name, v in samples.items() if name in BESIDE}
    if own.ndim == 4:
        save_grids({"Student": own[:SHOWN]} | {title: v[:SHOWN] for title, v in beside.items()}, path)
        return
    if problem is None and beside and is_plane(own):
        figure = pair_figure(own, *next(iter(beside.items())))
    elif problem is not None or own.shape[1:] == (2,):
        figure = samples_figure(own, problem)
    else:
        return
    with whole(path) as partial:
        figure.savefig(partial, dpi=120)


def is_plane(points: Tensor) -> bool:
    """Whether these are points (n, d) that a plane shows."""
    return points.ndim == 2 and points.shape[1] >= 2
