"""How far a run is: steps done or, with a budget, time spent, whichever is further; and in which phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from vardistill.training.config import TrainingConfig


class Phase(NamedTuple):
    """How far a run is in its head start or in its main part, in [0, 1], and in which."""

    progress: float
    head_start: bool


def phase(training: TrainingConfig, progress: float) -> Phase:
    """The phase at this progress ∈ [0, 1] of the whole run; in each, levels and learning rates go from start to end."""
    share = training.head_start
    if progress < share:
        return Phase(progress / share, True)
    return Phase((progress - share) / (1 - share), False)


class Clock:
    """Wall-clock and processor time of a run, those before a resume included.

    Processor time is this process's over all its threads, and stands still while books are kept (evaluation, logging,
    checkpoints): it is what training costs, whoever else is on the machine.
    """

    def __init__(self, training: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = training, accelerator
        self.spent, self.cpu_spent = 0.0, 0.0
        self.pause_began: float | None = None
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self.started, self.cpu_started = time.monotonic(), time.process_time()

    def elapsed(self) -> float:
        """Seconds spent."""
        return self.spent + time.monotonic() - self.started

    def cpu_elapsed(self) -> float:
        """Processor seconds spent on training."""
        now = time.process_time() if self.pause_began is None else self.pause_began
        return self.cpu_spent + now - self.cpu_started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Processor time does not count within."""
        self.pause_began = time.process_time()
        try:
            yield
        finally:
            self.cpu_started += time.process_time() - self.pause_began
            self.pause_began = None

    @property
    def planned(self) -> int | None:
        """Steps of the run; None under a budget, which says how long they go on."""
        return self.config.steps if self.config.max_minutes is None else None

    def progress(self, step: int) -> float:
        """In [0, 1]; the same on every process."""
        by_steps = step / self.config.steps
        if self.config.max_minutes is None:
            return min(by_steps, 1.0)
        elapsed = self.cpu_elapsed() if self.config.clock == "cpu" else self.elapsed()
        if self.accelerator.num_processes > 1:
            elapsed = float(broadcast(torch.tensor(elapsed, device=self.accelerator.device)))
        return min(max(by_steps, elapsed / (60 * self.config.max_minutes)), 1.0)
