"""Named targets: mixtures whose density and teacher are exact, and data."""

from collections.abc import Callable
from functools import partial

from vardistill.domains.points.problems.base import (
    HeldOutReference,
    MixtureProblem,
    ModeReference,
    Modes,
    Problem,
    Reference,
)
from vardistill.domains.points.problems.digits import Digits
from vardistill.domains.points.problems.mixture import Mixture
from vardistill.domains.points.problems.mog9 import MoG9
from vardistill.domains.points.problems.mog40 import MoG40
from vardistill.domains.points.problems.moons import Moons

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "mog40": MoG40,
    "mog9": MoG9,
    "moons": Moons,
    "mixture2": partial(Mixture, 2),
    "mixture8": partial(Mixture, 8),
    "mixture32": partial(Mixture, 32),
    "mixture128": partial(Mixture, 128),
    "digits": Digits,
}
"""Every problem, by name; each takes the teacher's `schedule`."""

__all__ = [
    "PROBLEMS",
    "Digits",
    "HeldOutReference",
    "Mixture",
    "MixtureProblem",
    "MoG9",
    "MoG40",
    "ModeReference",
    "Modes",
    "Moons",
    "Problem",
    "Reference",
]
