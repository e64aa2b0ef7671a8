"""Small runs that the tests of the trainer share; `small_runs.py TASKS.json` makes them in a process of its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardistill import checkpoints
from vardistill.config import TrainingConfig
from vardistill.denoisers import GaussianMixture
from vardistill.generators import MLP, Generator
from vardistill.levels import LogNormal
from vardistill.noise_levels import Draw, NoiseLevels
from vardistill.objectives import Objective, VarDiU
from vardistill.posteriors import DiagonalGaussian, FullGaussian, Prior
from vardistill.runs import RunFolder
from vardistill.schedules import VE
from vardistill.training import Diverged, Interrupted, Trainer

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
KINDS = ("batch", "pool", "learned", "drawn")


def generator() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(latent=2, data=2, depth=1, width=8, data_std=2.0).double()


def teacher() -> GaussianMixture:
    return GaussianMixture(MEANS, std=0.5, schedule=VE())


def objective(kind: str = "batch") -> VarDiU:
    """The batch's candidates, alone and with a pool; a posterior with critic steps; candidates drawn from one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind in ("batch", "pool"):
            return VarDiU(teacher(), Prior(), candidates="batch", pool=6 if kind == "pool" else 0)
        if kind == "learned":
            return VarDiU(teacher(), FullGaussian(2, 2, 2.0, depth=1, width=8).double(), posterior_steps=2)
        return VarDiU(teacher(), DiagonalGaussian(2, 2, 2.0, depth=1, width=8).double(), candidates=3)


def levels(**options: Any) -> NoiseLevels:
    options = {"draws": 2, "antithetic": True} | options
    return NoiseLevels(VE(), LogNormal(base_start=2.0, base_end=0.5), lambda alpha, sigma: sigma**2, **options)


def config(**options: Any) -> TrainingConfig:
    defaults = {"steps": 20, "batch": 8, "log_every": 2, "eval_every": 5, "checkpoint_every": 4, "lr": 1e-2}
    return TrainingConfig(**{"device": "cpu", "tracker": "none"} | defaults | options)


def evaluate(student: Generator) -> dict[str, float]:
    return {"mean": float(student.sample(16, seed=1).mean())}


@torch.no_grad()
def bound(student: Generator, objective: VarDiU) -> float:
    rng = torch.Generator().manual_seed(2)
    z, noise = student.latents(16, rng), levels().draw((2,), 16, 0.5, rng, torch.float64)
    return float(objective.bound(Draw(noise.rows(z), noise.rows(student(z)), noise, student)).mean())


def trainer(kind: str = "batch", folder: RunFolder | None = None, **options: Any) -> Trainer:
    return Trainer(generator(), objective(kind), levels(), config(**options), evaluate, folder)


@dataclass
class Task:
    """A run to make, and what befalls it: `event` at the `at`-th step, save or line, on process `rank`.

    With `bound`, its evaluations take the bound of 16 samples, a loss that in training is the processes' common work.
    """

    result: str
    kind: str = "batch"
    out: str | None = None
    resume: bool = False
    event: str | None = None
    at: int = 0
    rank: int = 0
    bound: bool = False
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """How a run ended."""

    outcome: str
    step: int
    skipped: float
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def run(task: Task) -> None:
    """Make the run and leave a `Result` behind."""
    folder = None if task.out is None else RunFolder(Path(task.out))
    job = trainer(task.kind, folder, **task.training)
    if task.event and job.accelerator.process_index == task.rank:
        EVENTS[task.event](job.objective, task.at)
    if task.bound:
        job.evaluate = lambda student: {"mean": bound(student, job.objective)}
    outcome = "finished"
    try:
        job.run(task.resume)
    except (Interrupted, Diverged) as stop:
        outcome = type(stop).__name__
    path = Path(f"{task.result}-{job.accelerator.process_index}")
    tensors = {f"{section}/{name}": v for section, part in job._tensors().items() for name, v in part.items()}
    save_file({name: v.clone() for name, v in tensors.items()}, path.with_suffix(".safetensors"))
    facts = {"outcome": outcome, "step": job.step, "skipped": float(job.skipped), "history": job.history}
    path.with_suffix(".json").write_text(json.dumps(facts))


def result(task: Task, rank: int = 0) -> Result:
    path = Path(f"{task.result}-{rank}")
    return Result(
        **json.loads(path.with_suffix(".json").read_text()), tensors=load_file(path.with_suffix(".safetensors"))
    )


def kill(*ignored: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c(*ignored: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def cut_and_kill(path: Path) -> None:
    """Leave the first half of a file, and die."""
    os.truncate(path, path.stat().st_size // 2)
    kill()


def before(number: int, act: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with `act` before the `number`-th time."""
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            act(*arguments, **options)
        return call(*arguments, **options)

    return wrapped


def after(number: int, act: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with `act` after the `number`-th time."""
    calls = itertools.count(1)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        value = call(*arguments, **options)
        if next(calls) == number:
            act(*arguments, **options)
        return value

    return wrapped


def kill_in_step(objective: Objective, at: int) -> None:
    objective.generator_loss = before(at, kill, objective.generator_loss)


def kill_after_save(objective: Objective, at: int) -> None:
    checkpoints.save = after(at, kill, checkpoints.save)


def kill_in_save(objective: Objective, at: int) -> None:
    checkpoints.save_file = after(at, lambda tensors, path, metadata: cut_and_kill(path), checkpoints.save_file)


def kill_in_log(objective: Objective, at: int) -> None:
    RunFolder.log = after(at, lambda folder, *line: cut_and_kill(folder.metrics), RunFolder.log)


def interrupt(objective: Objective, at: int) -> None:
    objective.generator_loss = before(at, press_ctrl_c, objective.generator_loss)


def lose_number(objective: Objective, at: int) -> None:
    """A loss that is NaN with a finite gradient, once."""
    loss, calls = objective.generator_loss, itertools.count(1)
    objective.generator_loss = lambda draw: loss(draw) + (float("nan") if next(calls) == at else 0.0)


EVENTS = {
    "kill in step": kill_in_step,
    "kill after save": kill_after_save,
    "kill in save": kill_in_save,
    "kill in log": kill_in_log,
    "interrupt": interrupt,
    "nan": lose_number,
}


def tasks_file(folder: Path, tasks: list[Task]) -> Path:
    path = folder / "tasks.json"
    path.write_text(json.dumps([dataclasses.asdict(task) for task in tasks]))
    return path


if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run(Task(**entry))
