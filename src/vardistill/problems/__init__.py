"""Named targets with samples, an exact density and an exact teacher."""

from vardistill.problems.base import Problem, Reference
from vardistill.problems.mog40 import MoG40

PROBLEMS: dict[str, type[MoG40]] = {MoG40.name: MoG40}
"""Every problem, by name; each takes the teacher's `schedule`."""

__all__ = ["PROBLEMS", "MoG40", "Problem", "Reference"]
