"""A run's samples as a picture: points in the plane, or grids of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vardistill.domains.pictures.figures import save_grids
from vardistill.domains.points.problems import Problem
from vardistill.files import whole
from vardistill.reports.contents import BESIDE
from vardistill.reports.figures import samples_figure


def save_samples(samples: Mapping[str, Tensor], problem: Problem | None, path: Path) -> None:
    """Draw sets of samples by name, the student's own as `samples`: pictures (n, C, H, W) side by side, or points."""
    own = samples["samples"]
    if own.ndim == 4:
        save_grids({"Student": own, **{BESIDE[name]: v for name, v in samples.items() if name in BESIDE}}, path)
    else:
        with whole(path) as partial:
            samples_figure(own, problem).savefig(partial, dpi=120)
