"""What configurations have to know of a problem. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from vardistill.diffusion.levels import LogNormal
from vardistill.domains.points.config import PointsTeachConfig, ProblemName


@dataclass(frozen=True)
class Scale:
    """What a configuration has to know of a problem.

    Attributes:
        dimension: d of the data.
        blurring: noise that makes one mode of all. In two dimensions modes have near neighbours; above, all points are
            far apart, and it is half of two points' distance, √(d/2) times the data's standard deviation.
        finest: the standard deviation of the finest structure.
    """

    dimension: int
    blurring: float
    finest: float


SCALES: dict[ProblemName, Scale] = {
    "mog40": Scale(2, 15.0, 1.31),
    "mog9": Scale(2, 3.0, 0.5),
    "moons": Scale(2, 0.5, 0.1),
    "mixture2": Scale(2, 10.0, 1.0),
    "mixture8": Scale(8, 18.0, 1.0),
    "mixture32": Scale(32, 19.5, 1.0),
    "mixture128": Scale(128, 36.0, 1.0),
    "digits": Scale(64, 3.1, 0.15),
}
"""Every problem's, rounded."""


def teacher_fit(problem: ProblemName) -> PointsTeachConfig:
    """A perceptron denoiser, its noise levels around the problem's finest structure."""
    base = 1.15 * SCALES[problem].finest
    return PointsTeachConfig(problem=problem, distribution=LogNormal(base_start=base, base_end=base, spread=1.4))
