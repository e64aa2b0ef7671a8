"""What a run will take in memory and time, told by ten of its steps; nothing is fitted, and no folder made."""

from __future__ import annotations

import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO

import torch

from vardistill.objectives import Objective
from vardistill.processes import join
from vardistill.progress import phase
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, check, real_source
from vardistill.runs.own import opened
from vardistill.students import Student
from vardistill.training.clock import phase as phase_at
from vardistill.training.data import Samples, StoredSamples
from vardistill.training.loop import Trainer
from vardistill.training.memory import held, predicted_memory

STEPS = 10
"""That are timed, spread over the run; one more warms up."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run takes.

    Attributes:
        trained: parameters of the networks that are trained, by name.
        parameters: in all, of the frozen ones, too; shared ones once.
        memory: bytes by their use, as `predicted_memory`.
        peak: the most bytes that were in use on an accelerator; None on a processor.
        seconds: of a step.
        samples: of the student, in a second.
        left: seconds to the end of the steps or of the budget; without the teacher's fit and samples, and metrics.
    """

    trained: dict[str, int]
    parameters: int
    memory: dict[str, int]
    peak: int | None
    seconds: float
    samples: float
    left: float


def rehearse(config: Config) -> Rehearsal:
    """Take ten steps of a run, with stand-ins for a teacher that has yet to be fitted and for its samples.

    Raises:
        UsageError: as `run_experiment`, for what cannot be used.
    """
    training = config.training
    with phase("checking the settings", kept=False):
        config = opened(config)
        domain = build_domain(config)
        check(config, domain)
    join(training.device)
    domain.load(None)
    objective: Objective = config.objective.build(domain)
    levels, source = config.levels.build(domain.schedule, domain.data_std), real_source(config, objective)
    data = None
    if source is not None:
        data = domain.real("data", 0, 0) if source.real == "data" else stand_in(domain.student, training.batch)
    with redirect_stderr(StringIO()):  # without its doubts, which are about stand-ins here
        trainer = Trainer(domain.student, objective, levels, training, None, None, data, domain.conditions)
    frozen = [objective.teacher, *objective.frozen]
    memory = predicted_memory(trainer.networks, frozen, average=training.ema > 0)
    seconds, peak = timed(trainer)
    left = training.steps * seconds
    if training.max_minutes is not None:
        left = min(left, 60 * training.max_minutes)
    return Rehearsal(
        {name: sum(p.numel() for p in trainer.trainable[name]) for name in trainer.optimizers},
        parameters([*trainer.networks.values(), *frozen]),
        memory,
        peak,
        seconds,
        training.batch / seconds,
        left,
    )


def stand_in(student: Student, n: int) -> Samples:
    """Noise in the place of the teacher's samples, at least one of each label: what they are costs a step nothing."""
    n = max(n, student.classes)
    labels = torch.arange(n) % student.classes if student.classes else None
    return StoredSamples(torch.randn(n, *student.data_shape, generator=torch.Generator().manual_seed(0)), labels)


def timed(trainer: Trainer) -> tuple[float, int | None]:
    """Seconds of a step, over all phases of the run, and the peak of an accelerator's memory in bytes."""
    device = trainer.skipped.device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    trainer.advance(1.0)
    wait(device)
    started = time.perf_counter()
    for i in range(STEPS):
        trainer.advance(*phase_at(trainer.config, i / STEPS))
    wait(device)
    return (time.perf_counter() - started) / STEPS, torch.cuda.max_memory_allocated(device) if is_cuda else None


def wait(device: torch.device) -> None:
    """For what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parameters(modules: list[object]) -> int:
    """How many the modules have, each tensor counted once."""
    found = {
        id(v): v.numel()
        for module in modules
        if isinstance(module, torch.nn.Module)
        for v in held(module)
        if isinstance(v, torch.nn.Parameter)
    }
    return sum(found.values())
