"""What a run of a user's own parts is looked at with: samples of its teacher's own sampler, or data without a teacher.

The run keeps these samples (`samples.npz`), so that its student is measured anew without the teacher, which is the
user's code.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vardistill.domains.base import Finished
from vardistill.errors import UsageError, first_line
from vardistill.metrics.energy_distance import energy_distance, energy_test
from vardistill.metrics.evaluate import PERMUTATIONS
from vardistill.metrics.precision_recall import precision_recall
from vardistill.objectives import Objective
from vardistill.students import MLP, DenoisingMLP, NetworkStudent, Student, load_student
from vardistill.training import config_files, identity
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Samples, teacher_samples
from vardistill.training.folder import UNREADABLE, RunFolder

POINTS, VALUES, FEWEST = 5000, 2**17, 100
"""Samples that a student is compared with: so many points, and of large data so many values, but no fewer samples."""

CURVE = 1000
"""Of these, those that are compared while the run trains."""

STEPS, STEPS_OF_PICTURES = 40, 18
"""Of the teacher's sampler, Heun's method."""

SOURCES = ("teacher", "data")
"""What the samples may be of; their array in `samples.npz` is the name and `_samples`."""

LOADABLE: dict[str, type[Student]] = {kind.__name__: kind for kind in (MLP, DenoisingMLP, NetworkStudent)}
"""Students that load without their user's code."""


@dataclass(frozen=True)
class Reference:
    """Samples that a student is compared with.

    Attributes:
        source: one of `SOURCES`.
        samples: (m, *data) on the CPU.
        labels: (m,) of a conditional student; None for another.
    """

    source: str
    samples: Tensor
    labels: Tensor | None = None


class Own:
    """The parts of a run in Python.

    Args:
        student: of the run.
        training: for its seed.
        objective: with its teacher; None for a run that is read from its folder.
        data: where its real samples come from.
        conditions: of a conditional student.
        kept: the samples of a run that is read from its folder.
    """

    problem = None

    def __init__(
        self,
        student: Student,
        training: TrainingConfig,
        objective: Objective | None = None,
        data: Samples | None = None,
        conditions: Conditions | None = None,
        kept: Reference | None = None,
    ) -> None:
        self.student, self.seed, self.eval_samples = student, training.seed, training.eval_samples
        self.objective, self.data, self.conditions, self.kept = objective, data, conditions, kept

    @cached_property
    def reference(self) -> Reference | None:
        """What the student is compared with; None without a teacher and data, or where its sampler fails."""
        if self.objective is None or not self.drawn:
            return self.kept
        try:
            return self._draw(self.objective)
        except (UsageError, RuntimeError, TypeError, ValueError) as error:
            print(f"vardistill: there are no samples to compare with: {first_line(error)}", file=sys.stderr)
            return None

    @property
    def drawn(self) -> bool:
        """Whether the student's samples can be drawn: under no conditions, or labels."""
        return set(self.student.condition_names) <= {"labels"}

    def _draw(self, objective: Objective) -> Reference | None:
        shape, like = self.student.data_shape, next(self.student.parameters())
        n = min(POINTS, self.eval_samples, max(FEWEST, VALUES // max(1, torch.Size(shape).numel())))
        rng = torch.Generator(like.device).manual_seed(self.seed + 2)
        if objective.teacher is not None:
            steps = STEPS if len(shape) == 1 else STEPS_OF_PICTURES
            found = teacher_samples(objective.teacher, shape, n, rng, steps, self.conditions, like.dtype)
            drawn = Reference("teacher", found.data.cpu(), None if found.labels is None else found.labels.cpu())
        elif self.data is not None:
            condition: Mapping[str, Tensor] = {} if self.conditions is None else self.conditions(n, rng)
            labels = condition.get("labels")
            drawn = Reference("data", self.data(n, rng, **condition).cpu(), None if labels is None else labels.cpu())
        else:
            return None
        if not drawn.samples.isfinite().all():
            raise UsageError(f"those of the {drawn.source} hold NaN or infinity")
        return drawn

    def labels(self, n: int) -> Tensor | None:
        """(n,) labels, those of the samples to compare with in turn; None for an unconditional student."""
        if not self.student.classes:
            return None
        known = None if self.reference is None else self.reference.labels
        return torch.arange(n) % self.student.classes if known is None else known[torch.arange(n) % len(known)]

    def metrics(self, average: Student) -> dict[str, float]:
        """The student's distance from the samples, as the run goes."""
        if self.reference is None:
            return {}
        n = min(CURVE, len(self.reference.samples))
        table = self._table(average.sample(n, self.seed + 1, labels=self.labels(n)).cpu(), 0)
        if "energy_distance_teacher" in table:  # as a share of how far the teacher's samples are apart: `warning_signs`
            spread = float(torch.pdist(self.reference.samples[:n].flatten(1)).mean())
            table["teacher_excess"] = table["energy_distance_teacher"] / max(spread, 1e-30)
        return table

    def finish(self, student: Student, objective: Objective) -> Finished:
        """Samples, beside those that they are compared with, and metrics."""
        if not self.drawn:
            return Finished({}, {})
        reference = self.reference
        n = self.eval_samples if reference is None else len(reference.samples)
        samples = student.sample(n, self.seed + 1, labels=self.labels(n)).cpu()
        found = {"samples": samples}
        if reference is not None:
            found[f"{reference.source}_samples"] = reference.samples
            found |= {} if reference.labels is None else {"labels": reference.labels}
        return Finished(found, self._table(samples, PERMUTATIONS) | {"samples": n})

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Metrics of n samples."""
        if self.reference is None:
            raise UsageError("the run has kept no samples of a teacher or of data: there is nothing to measure against")
        return self._table(student.sample(n, seed, labels=self.labels(n)).cpu(), PERMUTATIONS) | {"samples": n}

    def _table(self, samples: Tensor, permutations: int) -> dict[str, float]:
        reference = self.reference
        if reference is None or not samples.isfinite().all():
            return {}
        name, other = f"energy_distance_{reference.source}", reference.samples.to(samples)
        if permutations:
            test = energy_test(samples, other, permutations, torch.Generator().manual_seed(self.seed + 3))
            table = {name: test.distance, "energy_distance_std": test.std, "energy_p_value": test.p_value}
        else:
            table = {name: energy_distance(samples, other[: len(samples)])}
        if min(len(samples), len(other)) >= FEWEST:
            table |= precision_recall(samples[:CURVE], other[:CURVE])._asdict()
        return table

    def beside(self) -> dict[str, dict[str, float]]:
        """Nothing: the distance is that to the teacher itself."""
        return {}


def load_own(folder: RunFolder) -> Own:
    """The parts of a finished run in Python, as far as its folder has them.

    Raises:
        UsageError: where its files cannot be read, or its student is of the user's own code.
    """
    said = identity.read(folder)
    kind = str(said["student"].get("kind"))
    if kind not in LOADABLE:
        raise UsageError(
            f"{folder.path} holds the weights of a {kind}, which the command line cannot build: in Python, build the "
            f"student as for the run, then `safetensors.torch.load_model(student, {str(weights(folder))!r})` and "
            "`student.eval().sample(16)`"
        )
    student = load_student(folder.generator, LOADABLE[kind])
    training = config_files.from_dict(TrainingConfig, said["training"], "training")
    return Own(student, training, kept=kept_samples(folder.path))


def weights(folder: RunFolder) -> Path:
    """The file of the generator's weights."""
    return folder.generator / "model.safetensors"


def kept_samples(run: Path) -> Reference | None:
    """The samples that a run was compared with; None where there are none.

    Raises:
        UsageError: where they cannot be read.
    """
    path = run / "samples.npz"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            source = next((name for name in SOURCES if f"{name}_samples" in arrays), None)
            if source is None:
                return None
            labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
            return Reference(source, torch.from_numpy(arrays[f"{source}_samples"]), labels)
    except UNREADABLE as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}") from error
