"""What a domain is: it provides the parts of a run, and differs from others in nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from vardistill.objectives.base import Objective, Parts
from vardistill.students.student import Student
from vardistill.training.data import Conditions, Samples
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Evaluate


@dataclass(frozen=True)
class Finished:
    """What a finished run is looked at by.

    Attributes:
        samples: sets of samples (n, *data) by name, the student's own as `samples`.
        table: metrics and costs.
        extras: further tables by the name of their file.
    """

    samples: Mapping[str, Tensor]
    table: Mapping[str, Any]
    extras: Mapping[str, Any] = field(default_factory=dict)


class Measures(Protocol):
    """What a run's student is measured and looked at with."""

    @property
    def student(self) -> Student:
        """Of the run."""
        ...

    @property
    def problem(self) -> Any:
        """Whose truth is known exactly, for points; None where there is none."""

    def finish(self, student: Student, objective: Objective) -> Finished:
        """The samples and tables of a finished run's averaged student."""
        ...

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Metrics of n samples; raises UsageError where there is nothing to measure against."""
        ...

    def beside(self) -> dict[str, dict[str, float]]:
        """Metrics of others that a student's are shown beside (its teacher's own), by title."""
        ...


class Domain(Parts, Measures, Protocol):
    """The parts of one run; they are built anew by every `load`, from the run's seed."""

    @property
    def conditions(self) -> Conditions | None:
        """What steps draw for a conditional student; None for another."""

    def load(self, folder: RunFolder | None) -> None:
        """Build the parts; what has yet to be fitted is read from the run's folder or, without one, stood in for.

        Raises:
            UsageError: for a teacher or data that cannot be used, or do not fit each other.
        """

    def check(self) -> None:
        """Raise the UsageError that the run would end with, before anything is fitted."""

    def prepare(self, folder: RunFolder) -> None:
        """Fit what the run lacks (a teacher, a classifier) and keep it in the folder: the first process's work."""

    def real(self, source: Literal["teacher", "data"], n: int, steps: int) -> Samples:
        """Real samples: the data's, or n of the teacher's own in so many steps of its sampler.

        Raises:
            UsageError: where there are no data.
        """
        ...

    def metrics(self, objective: Objective) -> Evaluate | None:
        """What the run measures as it goes, of the averaged student; None where there is nothing to measure with."""
        ...

    def load_student(self, path: Path) -> Student:
        """A saved student of this domain; raises UsageError where the folder is none."""
        ...


def fit_once(path: Path, fit: Callable[[bool], object]) -> None:
    """Fit a teacher in the folder `path`, where there is none that is finished; one that was begun goes on.

    Args:
        path: below the run's folder.
        fit: told whether it goes on with what the folder holds.
    """
    if (path / "evaluation.json").exists():  # what a fit writes last
        return
    begun = RunFolder(path).config.is_file()
    if not begun:
        shutil.rmtree(path, ignore_errors=True)
    fit(begun)
