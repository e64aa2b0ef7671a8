"""What a bench measures: cells, one for every objective, teacher, problem and seed, under one budget.

Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from vardistill.choices import check_choices
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.errors import UsageError, require
from vardistill.runs.config import Config

UNLIMITED = 10**9
"""Steps that no budget of minutes reaches."""

MILESTONES = 10
"""Points of a curve under a budget."""

Direction = Literal["lower", "higher", "zero"]
"""Which values of a metric are good: low ones, high ones, those near zero."""

Changes = Mapping[str, Any]
"""Fields of a domain's configuration and what they become: {"teacher": TeacherConfig("learned")}, {"data": "mnist"}."""


class Row(NamedTuple):
    """A row of the table: what its seeds share."""

    objective: str
    teacher: str
    problem: str


@dataclass(frozen=True)
class Cell:
    """One run of a bench.

    Attributes:
        objective: label.
        teacher: label.
        problem: label.
        seed: label.
        config: what is run.
    """

    objective: str
    teacher: str
    problem: str
    seed: int
    config: Config

    @property
    def row(self) -> Row:
        """The labels without the seed."""
        return Row(self.objective, self.teacher, self.problem)

    @property
    def name(self) -> str:
        """The labels as the name of a folder."""
        words = (re.sub(r"[^A-Za-z0-9.+]+", "-", label).strip("-.") for label in self.row)
        return "_".join((*words, f"seed{self.seed}"))


@dataclass(frozen=True)
class Budget:
    """What every cell may spend: the same number of steps, of minutes, or of minutes of training's processor time.

    Attributes:
        kind: what is counted.
        amount: steps or minutes; None, for steps alone: each configuration's own.

    Raises:
        UsageError: for an unknown kind, or an amount that is missing, not positive or infinite.
    """

    kind: Literal["steps", "wall", "cpu"] = "steps"
    amount: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.kind != "steps" or self.amount is not None:
            require(
                f"the {self.unit} of a budget", self.amount, 0 < (self.amount or 0) < math.inf, "positive and finite"
            )

    @property
    def unit(self) -> str:
        """Of the amount."""
        return "steps" if self.kind == "steps" else "minutes"

    @property
    def about(self) -> str:
        """In words."""
        if self.amount is None:
            return "its own number of steps"
        counted = {"steps": "steps", "wall": "minutes", "cpu": "minutes of processor time"}
        return f"{self.amount:,g} {counted[self.kind]}"

    def limit(self, config: Config, milestones: int = MILESTONES) -> Config:
        """The configuration under this budget, without a tracker; evaluated at the same shares of it as any other."""
        training = replace(config.training, tracker="none")
        if self.amount is not None:
            training = replace(training, eval_every=0, milestones=milestones)
        if self.kind != "steps":
            training = replace(training, steps=UNLIMITED, max_minutes=self.amount, clock=self.kind)
        elif self.amount is not None:
            training = replace(training, steps=int(self.amount), max_minutes=None)
        return replace(config, training=training)


@dataclass(frozen=True)
class Settings:
    """What was asked of a bench; `bench.json` in its folder.

    Attributes:
        bench: its name.
        seeds: of each row.
        budget: of each cell.
        jobs: cells at a time.
        threads: of each.
        data: the pictures that its cells take instead of the bench's; None for these.
    """

    bench: str
    seeds: int
    budget: Budget
    jobs: int = 1
    threads: int = 1
    data: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("seeds", "jobs", "threads"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class Bench:
    """A comparison: its cells and how they are shown.

    `measure` and `figures` are names, "module:function", so that a bench is declared without importing torch.

    Attributes:
        name: in the command line.
        about: in a line.
        cells: of the number of seeds, with budgets yet to come.
        metrics: columns of the table.
        curves: metrics that are plotted over training.
        seeds: by default.
        budget: by default.
        better: which values are good, for metrics that `significance.DIRECTIONS` does not know.
        measure: what a cell does instead of being trained: a function of its `Config` and of its `RunFolder` that
            returns values by name. It may log lines of kind "eval" there, which make curves.
        figures: further pictures: a function of the `Results` that returns figures of matplotlib by title.
        one_teacher: whether all seeds learn from the first seed's teacher, where it is one to be fitted.
        milestones: points of a curve under a budget.
        one_process: whether the cells of a job share a process, one after another: for those that take less time than
            the start of one.
    """

    name: str
    about: str
    cells: Callable[[int], Sequence[Cell]]
    metrics: tuple[str, ...]
    curves: tuple[str, ...] = ()
    seeds: int = 3
    budget: Budget = Budget()
    better: Mapping[str, Direction] = field(default_factory=dict)
    measure: str | None = None
    figures: str | None = None
    one_teacher: bool = False
    milestones: int = MILESTONES
    one_process: bool = False

    def plan(self, seeds: int | None = None, budget: Budget | None = None, data: str | None = None) -> list[Cell]:
        """The cells under a budget; seeds, budget and pictures are the bench's own by default.

        Raises:
            UsageError: for cells that share a folder's name, and for pictures where a cell has none.
        """
        limit = (budget or self.budget).limit
        seeds = self.seeds if seeds is None else seeds
        cells = [replace(cell, config=limit(cell.config, self.milestones)) for cell in self.cells(seeds)]
        for name, count in Counter(cell.name for cell in cells).items():
            if count > 1:
                raise UsageError(f"{count} cells of the bench {self.name} are named {name}: tell their labels apart")
        return cells if data is None else [self._with_data(cell, data) for cell in cells]

    def _with_data(self, cell: Cell, data: str) -> Cell:
        domain = cell.config.domain
        if not isinstance(domain, PicturesConfig):
            raise UsageError(f"{self.name} has cells without pictures, {cell.name} for example: leave out --data")
        return replace(cell, config=replace(cell.config, domain=replace(domain, data=data)))


def grid(
    objectives: Mapping[str, Config],
    teachers: Mapping[str, Changes] | None = None,
    problems: Mapping[str, Changes] | None = None,
    seeds: int = 3,
) -> list[Cell]:
    """Every objective with every teacher on every problem, for every seed.

    Args:
        objectives: whole configurations by label, whose seed is replaced.
        teachers: what each changes in the configurations' domain, by label; default: their own, under its own label.
        problems: the same.
        seeds: their number; they count from 0, and the first seed's cells come first.
    """
    cells = []
    for seed, (label, config) in itertools.product(range(seeds), objectives.items()):
        own_teacher, own_problem = config.domain.labels
        choices = itertools.product((teachers or {own_teacher: {}}).items(), (problems or {own_problem: {}}).items())
        for (teacher, of_teacher), (problem, of_problem) in choices:
            domain = replace(config.domain, **of_teacher, **of_problem)
            whole = replace(config, domain=domain, training=replace(config.training, seed=seed))
            cells.append(Cell(label, teacher, problem, seed, whole))
    return cells


def load(reference: str) -> Any:
    """The function that "module:function" names; raises UsageError where there is none."""
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"there is no function {reference}: {error}") from error
