"""Small runs that the tests of the trainer share; `small_runs.py TASKS.json` makes them in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linear_gaussian import ByLabel, Linears, pick
from vardistill.denoisers import GaussianMixture, Preconditioned
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.diffusion.schedules import VE
from vardistill.networks import LevelMLP
from vardistill.objectives import DiffInstruct, Objective, Part, Update, VarDiU, VarFlow, WeightedSum
from vardistill.posteriors.few import DiagonalGaussian, FullGaussian, Prior
from vardistill.runs.distill import distill
from vardistill.students.denoising import DenoisingStudent, default_times
from vardistill.students.perceptron import MLP
from vardistill.students.student import Student
from vardistill.training import checkpoints
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Labels, Samples
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Diverged, Interrupted, Run, Trainer

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
KINDS = ("batch", "pool", "learned", "drawn", "varflow", "diff-instruct", "sum")
CONDITIONAL = ("labels", "labels-varflow", "labels-paired-varflow", "labels-diff-instruct")
"""Kinds whose generator and teacher take labels."""
FEW = ("few-pool", "few-learned", "few-varflow", "few-diff-instruct", "few-sum")
"""Kinds whose student has `STEPS` steps."""
STEPS = 3


def generator_of(kind: str) -> Student:
    if kind in FEW:
        return few_steps(STEPS)
    return labelled_generator() if kind in CONDITIONAL else generator()


def few_steps(steps: int) -> DenoisingStudent:
    """A small learned denoiser at a few times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double()
    return DenoisingStudent(denoiser, (2,), 2.0, default_times(VE(), steps, 2.0))


def labelled_generator() -> Linears:
    A = torch.tensor([[[1.1, 0.2], [-0.4, 0.7]], [[0.5, -0.3], [0.6, 0.9]]], dtype=torch.float64)
    return Linears(A, torch.tensor([[0.5, 0.0], [-0.3, 0.2]], dtype=torch.float64))


def labelled_teacher() -> ByLabel:
    """Under the label 0 one of the teacher's modes, under 1 the others."""
    return ByLabel([GaussianMixture(means, std=0.5, schedule=VE()) for means in (MEANS[:1], MEANS[1:])])


def conditions(kind: str = "labels") -> Conditions | None:
    return Labels(torch.tensor([1.0, 2.0])) if kind in CONDITIONAL else None


def generator() -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLP(latent=2, data=2, depth=1, width=8, data_std=2.0).double()


def teacher() -> GaussianMixture:
    return GaussianMixture(MEANS, std=0.5, schedule=VE())


def objective(kind: str = "batch", steps: int | None = None) -> Any:
    """VarDiU with the batch's candidates, alone and with a pool; with a posterior that has steps of its own, and with
    candidates drawn from one; and the other objectives. A sum's second part has levels of its own; `CONDITIONAL` ones
    take labels; learned posteriors are for students of so many `steps`, default the kind's.
    """
    steps = steps or (STEPS if kind in FEW else 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return OBJECTIVES[kind.removeprefix("few-")](steps)


def learned(steps: int) -> VarDiU:
    posteriors = [FullGaussian(2, 2, 2.0, depth=1, width=8).double() for _ in range(steps)]
    return VarDiU(teacher(), posteriors, posterior_steps=2)


def diff_instruct(steps: int) -> DiffInstruct:
    critic = Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double()
    return DiffInstruct(teacher(), critic, critic_steps=2, sigma_data=2.0)


def labelled_diff_instruct(steps: int) -> DiffInstruct:
    critics = [Preconditioned(LevelMLP(2, 2, depth=1, width=8), 2.0, VE()).double() for _ in range(2)]
    return DiffInstruct(labelled_teacher(), ByLabel(critics), critic_steps=2, sigma_data=2.0)


def weighted_sum(steps: int) -> WeightedSum:
    own = levels(draws=1, antithetic=False, stratified=True, shared=4)
    return WeightedSum([Part(learned(steps)), Part(VarFlow(beta=0.7), lambda progress: 2 - progress, own)])


OBJECTIVES: dict[str, Callable[[int], Objective]] = {
    "batch": lambda steps: VarDiU(teacher(), Prior(), candidates="batch"),
    "pool": lambda steps: VarDiU(teacher(), Prior(), candidates="batch", pool=6),
    "learned": learned,
    "drawn": lambda steps: VarDiU(teacher(), DiagonalGaussian(2, 2, 2.0, depth=1, width=8).double(), candidates=3),
    "varflow": lambda steps: VarFlow(),
    "diff-instruct": diff_instruct,
    "sum": weighted_sum,
    "labels": lambda steps: VarDiU(labelled_teacher(), Prior(), candidates=3),
    "labels-varflow": lambda steps: VarFlow(classes=2, label_distance=0.5),
    "labels-paired-varflow": lambda steps: VarFlow(cross="paired", classes=2),
    "labels-diff-instruct": labelled_diff_instruct,
}


class OfSamples(nn.Sequential):
    """A map of features that is blind to times."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        features: Tensor = super().forward(x_t)
        return features


def data(kind: str = "batch") -> Samples:
    """The teacher's law, for objectives that compare with real samples."""
    return labelled_data if kind in CONDITIONAL else teacher().sample


def labelled_data(n: int, rng: torch.Generator, labels: Tensor) -> Tensor:
    return pick([mixture.sample(n, rng) for mixture in labelled_teacher().of_label], labels)


def levels(kind: str = "batch", **options: Any) -> NoiseLevels:
    options = {"draws": 2, "antithetic": True, "shared": 2 if kind.endswith("varflow") else 0} | options
    return NoiseLevels(VE(), LogNormal(base_start=2.0, base_end=0.5), lambda alpha, sigma: sigma**2, **options)


def config(**options: Any) -> TrainingConfig:
    defaults = {
        "steps": 20,
        "batch": 8,
        "eval_samples": 100,
        "log_every": 2,
        "eval_every": 5,
        "checkpoint_every": 4,
        "lr": 1e-2,
    }
    return TrainingConfig(**{"device": "cpu", "tracker": "none"} | defaults | options)


def evaluate(student: Student) -> dict[str, float]:
    labels = torch.arange(16) % student.classes if student.classes else None
    return {"mean": float(student.sample(16, seed=1, labels=labels).mean())}


@torch.no_grad()
def bound(student: Student, objective: VarDiU) -> float:
    rng = torch.Generator().manual_seed(2)
    z, noise = student.latents(16, rng), levels().draw((2,), 16, 0.5, rng, torch.float64)
    return float(objective.bound(Draw(noise.rows(z), noise.rows(student(z)), noise, student)).mean())


def trainer(kind: str = "batch", folder: RunFolder | None = None, **options: Any) -> Trainer:
    training = config(**options)
    return Trainer(
        generator_of(kind), objective(kind), levels(kind), training, evaluate, folder, data(kind), conditions(kind)
    )


def state(job: Trainer, *left_out: str) -> dict[str, Tensor]:
    """A copy of what a checkpoint keeps, by section and name, but for the time spent, which no two runs share."""
    return {
        f"{section}/{name}": v.clone()
        for section, part in job._tensors().items()
        if section not in left_out
        for name, v in part.items()
        if name != "cpu_seconds"
    }


def launched(processes: int, rank: int = 0) -> dict[str, str]:
    """What torchrun tells a process by its environment."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank), **place}


def run_small(kind: str = "batch", folder: Path | None = None, **options: Any) -> tuple[dict[str, Tensor], Trainer]:
    """The final state of a small run, by name, and its trainer."""
    job = trainer(kind, None if folder is None else RunFolder(folder), **options)
    job.run()
    return state(job), job


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, v in a.items():
        assert torch.equal(v, b[name]), name


def small_distill(student: Student | None = None, **options: Any) -> Run:
    options = {"teacher": teacher(), "training": config(steps=2)} | options
    return distill(generator() if student is None else student, **options)


@dataclass
class Task:
    """A run to make, and what befalls it: `event` at the `at`-th step, save or line, on process `rank`.

    With `bound`, its evaluations take the bound of 16 samples, a loss that in training is the processes' common work.
    With `counted`, what its updates train and what the processes reduce in them is noted. Before it is made, processes
    that make it are killed after each of `lives`, in seconds: the task's end is what goes on from what they left.
    """

    result: str
    kind: str = "batch"
    out: str | None = None
    resume: bool = False
    event: str | None = None
    at: int = 0
    rank: int = 0
    bound: bool = False
    counted: bool = False
    lives: list[float] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """How a run ended; `reduced` are the bytes of what each update trains, and of all that is reduced in it."""

    outcome: str
    step: int
    skipped: float
    history: list[dict[str, Any]]
    reduced: list[tuple[int, int]]
    tensors: dict[str, Tensor]


def run(task: Task) -> None:
    """Make the run and leave a `Result` behind."""
    folder = None if task.out is None else RunFolder(Path(task.out))
    job = trainer(task.kind, folder, **task.training)
    if task.event and job.accelerator.process_index == task.rank:
        EVENTS[task.event](job.objective, task.at)
    if task.bound:
        job.evaluate = lambda student: {"mean": bound(student, job.objective)}
    outcome, reduced = "finished", []
    try:
        with count_reduced(job, reduced) if task.counted else contextlib.nullcontext():
            job.run(task.resume)
    except (Interrupted, Diverged) as stop:
        outcome = type(stop).__name__
    path = Path(f"{task.result}-{job.accelerator.process_index}")
    save_file(state(job), path.with_suffix(".safetensors"))
    facts = {
        "outcome": outcome,
        "step": job.step,
        "skipped": float(job.skipped),
        "history": job.history,
        "reduced": reduced,
    }
    path.with_suffix(".json").write_text(json.dumps(facts))


def survive(task: Task) -> None:
    """Make the run in processes that are killed after each of the task's lives, then to its end."""
    assert task.out is not None
    for life in task.lives:
        child = os.fork()
        if child == 0:
            go_on(task)
            os._exit(0)
        time.sleep(life)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended before it was killed"
    go_on(task)


def go_on(task: Task) -> None:
    """From the latest checkpoint; without one the run begins anew."""
    folder = RunFolder(Path(str(task.out)))
    kept = any(folder.checkpoints.glob("step-*"))
    if not kept:
        folder.rewind(0)
    run(dataclasses.replace(task, resume=kept))


@contextlib.contextmanager
def count_reduced(job: Trainer, reduced: list[Any]) -> Iterator[None]:
    """Add a pair to `reduced` for every update within."""
    update, all_reduce, total = job.update, dist.all_reduce, 0

    def counting(v: Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal total
        total += v.nbytes
        return all_reduce(v, *arguments, **options)

    def noting(made: Update, progress: float, number: int) -> None:
        before = total
        update(made, progress, number)
        trained = sum(p.nbytes for name in made.trains for p in job.trainable[name])
        reduced.append((trained, total - before))

    job.update, dist.all_reduce = noting, counting
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


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


Loss = Callable[[Draw], Tensor]


def in_training(objective: Objective, change: Callable[[Loss], Loss]) -> None:
    """Put `change(loss)` in the place of the loss of the student's update, which the books do not take."""
    updates = objective.updates
    changed = change(updates()[-1].loss)

    def with_change(progress: float = 0.0) -> list[Update]:
        *others, student = updates(progress)
        return [*others, dataclasses.replace(student, loss=changed)]

    objective.updates = with_change


def kill_in_step(objective: Objective, at: int) -> None:
    in_training(objective, lambda loss: before(at, kill, loss))


def kill_after_save(objective: Objective, at: int) -> None:
    checkpoints.save = after(at, kill, checkpoints.save)


def kill_in_save(objective: Objective, at: int) -> None:
    checkpoints.save_file = after(at, lambda tensors, path, metadata: cut_and_kill(path), checkpoints.save_file)


def kill_in_log(objective: Objective, at: int) -> None:
    RunFolder.log = after(at, lambda folder, *line: cut_and_kill(folder.metrics), RunFolder.log)


def interrupt(objective: Objective, at: int) -> None:
    in_training(objective, lambda loss: before(at, press_ctrl_c, loss))


def lose_number(objective: Objective, at: int) -> None:
    """A loss that is NaN with a finite gradient, once."""
    calls = itertools.count(1)
    in_training(objective, lambda loss: lambda draw: loss(draw) + (float("nan") if next(calls) == at else 0.0))


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
        task = Task(**entry)
        survive(task) if task.lives else run(task)
