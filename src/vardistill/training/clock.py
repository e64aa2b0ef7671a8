"""How far a run is: steps done or, with a budget, time spent, whichever is further; and in which phase."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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


def length(training: TrainingConfig) -> str:
    """Of a run, in words."""
    steps = f"{training.steps:,} step{'s' if training.steps > 1 else ''}"
    if training.max_minutes is None:
        return steps
    what = "minutes" if training.clock == "wall" else "minutes of processor time"
    return f"{training.max_minutes:g} {what}, or {steps} where these end first"


def time_left(spent: float, first: Sequence[float], now: Sequence[float]) -> float:
    """Seconds to the first end, ∞ where nothing is done.

    Args:
        spent: seconds since the start.
        first: shares done at the start, each of its own measure.
        now: the same now.
    """
    paces = [(b - a) / spent if spent > 0 else 0.0 for a, b in zip(first, now, strict=True)]
    return min((max(1 - b, 0.0) / pace for b, pace in zip(now, paces, strict=True) if pace > 0), default=math.inf)


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

    def start(self, step: int = 0) -> None:
        """Begin to count, with so many steps done before."""
        self.started, self.cpu_started = time.monotonic(), time.process_time()
        self.first = self._ways(step)

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

    def _ways(self, step: int) -> list[float]:
        """Shares of the steps and, with a budget, of its time that are spent."""
        by_steps = step / self.config.steps
        if self.config.max_minutes is None:
            return [by_steps]
        elapsed = self.cpu_elapsed() if self.config.clock == "cpu" else self.elapsed()
        return [by_steps, elapsed / (60 * self.config.max_minutes)]

    def progress(self, step: int) -> float:
        """In [0, 1]; the same on every process."""
        by_steps, *by_time = self._ways(step)
        if by_time and self.accelerator.num_processes > 1:
            by_time = [float(broadcast(torch.tensor(by_time[0], device=self.accelerator.device)))]
        return min(max(by_steps, *by_time, 0.0), 1.0)

    def left(self, step: int) -> float:
        """Seconds to the end of the steps or of the budget, whichever is nearer at the pace so far."""
        return time_left(time.monotonic() - self.started, self.first, self._ways(step))
