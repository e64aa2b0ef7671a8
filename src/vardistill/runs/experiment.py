"""A whole experiment: from a configuration to a run folder with its generator, metrics, figures and report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from vardistill.training import config_files
from vardistill.runs.build import build_empirical, build_exact, build_generator, build_levels, build_network_denoiser, build_objective, build_problem, build_real_samples, build_schedule, takes_teacher
from vardistill.training.checks import check_networks, check_settings, check_tracker
from vardistill.runs.config import Config, TeachConfig
from vardistill.denoisers import GaussianMixture, reschedule
from vardistill.diffusion.denoiser import Denoiser, DensityDenoiser
from vardistill.devices import find_device
from vardistill.errors import UsageError, first_line
from vardistill.reports.figures import samples_figure
from vardistill.students.perceptron import MLP
from vardistill.students.student import Student
from vardistill.metrics import bound_gap, evaluate
from vardistill.metrics.bound import LARGEST_LATENT, diffusive_kl
from vardistill.metrics.critic import critic_bias
from vardistill.objectives import DiffInstruct, Objective, VarDiU
from vardistill.students.network import NetworkStudent
from vardistill.domains.points.presets import teacher_fit_of
from vardistill.domains.points.problems import Problem
from vardistill.processes import alone, launched, several_on_cpu
from vardistill.reports.page import write_report
from vardistill.training.folder import RunFolder, create, open_run, write_whole
from vardistill.domains.points.teach import load_teacher, teach, teacher_errors
from vardistill.training.loop import Evaluate, Run, Trainer

G = TypeVar("G", MLP, NetworkStudent)

BOUND_RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Noise-to-signal ratios at which a finished run's bound is compared with the diffusive KL."""

GAP_RATIOS = (1.0, 4.0, 16.0)
"""Those over which the curves of a run's bound, KL and gap are averaged."""

BOUND_DRAWS = 2048
"""Draws at each of these for the bound, the KL and the gap, at least."""

CRITIC_DRAWS = 2048
"""Draws at each of these for the critic's bias: the mean gradients that it compares are small beside their noise."""


def run_experiment(config: Config, out: Path, resume: bool = False) -> RunFolder:
    """Train what `config` says in the run folder `out` and leave samples, metrics, figures and a report there.

    Raises:
        UsageError: for a folder or a configuration that cannot be used.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    problem = build_problem(config.problem, config.levels.schedule)
    check(config, problem)
    with PartialState(cpu=several_on_cpu(config.training.device)).main_process_first():
        folder = prepare_folder(config, out, resume)
        teacher = build_teacher(config, problem, folder)
        objective = build_objective(config, problem, teacher)
    student, levels = build_generator(config, problem), build_levels(config.levels, problem)
    target = build_problem(config.problem, config.levels.schedule)  # stays on the CPU; the teacher moves
    metrics = problem_metrics(config, target, objective, student)
    data = build_real_samples(config, target, teacher)
    trainer = Trainer(student, objective, levels, config.training, metrics, folder, data)
    run = trainer.run(resume and any(folder.checkpoints.glob("step-*")))
    if trainer.accelerator.is_main_process:
        with alone():
            write_bound(folder, objective, student, max(2, config.training.batch))
            finish(config, target, folder, run)
    trainer.accelerator.wait_for_everyone()
    return folder


def check(config: Config, problem: Problem) -> None:
    """Raise the UsageError that the run would end with, before a folder is made or a teacher fitted."""
    student, levels = build_generator(config, problem), build_levels(config.levels, problem)
    if not takes_teacher(config) and config.teacher.teacher != "true":
        kind = config.teacher.teacher
        raise UsageError(f"VarFlow from the problem's data takes no teacher, but teacher is {kind!r}: leave it out")
    teacher = build_ready_teacher(config, problem)
    if teacher is None and takes_teacher(config):
        teacher = build_network_denoiser(TeachConfig(schedule=config.levels.schedule), problem)
    objective = build_objective(config, problem, teacher)
    check_settings(student, objective, levels, config.training, None, launched())
    check_networks(student, objective, None)
    check_tracker(config.training)
    find_device(config.training.device)


def prepare_folder(config: object, out: Path, resume: bool) -> RunFolder:
    """The run's folder: an existing one to resume, or a new one with its configuration, made by the main process."""
    if resume:
        folder = open_run(out)
        if PartialState().is_main_process and not any(folder.checkpoints.glob("step-*")):
            folder.rewind(0)  # killed before its first checkpoint: it starts anew
        return folder
    if not PartialState().is_main_process:
        return RunFolder(out)
    folder = create(out)
    config_files.write(config, folder.config)
    return folder


def build_teacher(config: Config, problem: Problem, folder: RunFolder) -> Denoiser | None:
    """The teacher that `config` names; a learned one without a run of its own is fitted first, below `folder`.

    A fit that was stopped goes on. None for an objective that takes none.
    """
    teacher = build_ready_teacher(config, problem)
    if teacher is not None or not takes_teacher(config):
        return teacher
    if not (folder.teacher / "evaluation.json").exists():  # what `teach` writes last
        begun = RunFolder(folder.teacher).config.is_file()
        if not begun:
            shutil.rmtree(folder.teacher, ignore_errors=True)
        teach(teacher_fit_of(config), folder.teacher, resume=begun)
    return load_teacher(folder.teacher)


def build_ready_teacher(config: Config, problem: Problem) -> Denoiser | None:
    """The teacher that `config` names, None for one that has yet to be fitted and an objective that takes none."""
    if not takes_teacher(config):
        return None
    if config.teacher.teacher == "true":
        return build_exact(problem)
    if config.teacher.teacher == "empirical":
        return build_empirical(config, problem)
    if config.teacher.teacher_run is not None:
        return reschedule(load_teacher(config.teacher.teacher_run), build_schedule(config.levels.schedule))
    return None


def problem_metrics(config: Config, problem: Problem, objective: Objective, student: Student) -> Evaluate:
    """What a run measures as it goes: its samples against the problem, and the student's divergence from the teacher.

    The samples are the averaged generator's; divergence, bound and critic are those of the `student` in training,
    whose auxiliary networks they are.
    """
    teacher_error: dict[str, float] = {}
    exact = build_problem(config.problem, config.levels.schedule)  # a copy, which moves to where the student is

    def measure(average: Student) -> dict[str, float]:
        samples = average.sample(config.training.eval_samples, seed=config.training.seed + 1).cpu()
        rng = torch.Generator().manual_seed(config.training.seed + 2)
        table: dict[str, float] = dict(evaluate(samples, problem, rng, p_value=False))
        rng = torch.Generator(device_of(student)).manual_seed(config.training.seed + 3)
        if not teacher_error and config.teacher.teacher != "true" and exact.denoiser is not None:
            assert objective.teacher is not None
            errors = teacher_errors(objective.teacher, exact, device_of(student))["relative_score_error"]
            teacher_error["teacher_error"] = sum(errors) / len(errors)
        n = max(2, config.training.batch)
        return table | teacher_error | student_divergence(objective, student, exact.denoiser, rng, n)

    return measure


def student_divergence(
    objective: Objective, student: Student, truth: GaussianMixture | None, rng: torch.Generator, n: int
) -> dict[str, float]:
    """The diffusive KL at `GAP_RATIOS`, and what the objective's parts make of it, where they can be computed exactly.

    The KL and the bound need the teacher's density, which a network has not; a critic's errors its score alone. An
    objective without a teacher is measured against the truth.
    """
    if math.prod(student.latent_shape) > LARGEST_LATENT:
        return {}
    teacher: Denoiser | None = objective.teacher
    if teacher is None and truth is not None:
        teacher = truth.to(device_of(student))
    table: dict[str, float] = {}
    for part in objective.parts:
        if isinstance(part, VarDiU) and isinstance(part.teacher, DensityDenoiser):
            size, batches = bound_batches(part, n)
            gap = bound_gap(part, student, GAP_RATIOS, rng, size, nodes=128, batches=batches)
            table |= {name: float(getattr(gap, name).mean()) for name in ("diu", "dikl", "gap")}
        elif isinstance(part, DiffInstruct):
            bias = critic_bias(part, student, GAP_RATIOS, rng, CRITIC_DRAWS, nodes=128)
            table |= {"critic_error": float(bias.critic_error.mean()), "gradient_bias": float(bias.gradient_bias)}
    if "dikl" not in table and isinstance(teacher, DensityDenoiser):
        table["dikl"] = float(diffusive_kl(teacher, student, GAP_RATIOS, rng, BOUND_DRAWS, nodes=128).mean())
    return table


def bound_batches(objective: VarDiU, n: int) -> tuple[int, int]:
    """The size and the number of the batches of `BOUND_DRAWS` draws: those of a run, n, where they are candidates."""
    return (n, math.ceil(BOUND_DRAWS / n)) if objective.candidates == "batch" else (max(n, BOUND_DRAWS), 1)


def device_of(generator: Student) -> torch.device:
    """Where the generator's parameters are."""
    return next(generator.parameters()).device


def finish(config: Config, problem: Problem, folder: RunFolder, run: Run) -> None:
    """Write what a reader of the run looks at: samples, final metrics, the bound's gap, the report."""
    samples = run.generator.sample(config.training.eval_samples, seed=config.training.seed + 1).cpu()
    np.savez_compressed(folder.path / "samples.npz", samples=samples.numpy())
    samples_figure(samples, problem).savefig(folder.path / "samples.png", dpi=120)
    table = final_metrics(samples, problem, seed=config.training.seed + 3)
    write_report(folder, evaluation=table)
    _keep_evaluation(folder, table)  # the last: a run that has it is finished


def write_evaluation(folder: RunFolder, samples: Tensor, problem: Problem, seed: int) -> dict[str, Any]:
    """Measure samples against the problem, keep the table as `evaluation.json` and return it."""
    table = final_metrics(samples, problem, seed)
    _keep_evaluation(folder, table)
    return table


def final_metrics(samples: Tensor, problem: Problem, seed: int) -> dict[str, Any]:
    """The metrics of samples against the problem, and the samples' number."""
    return {**evaluate(samples, problem, torch.Generator().manual_seed(seed)), "samples": len(samples)}


def _keep_evaluation(folder: RunFolder, table: Mapping[str, Any]) -> None:
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))


def write_bound(folder: RunFolder, objective: Objective, student: Student, n: int) -> None:
    """DiU, DiKL and their gap at `BOUND_RATIOS` over batches of n draws as `bound.json`, where densities are exact."""
    few_latents = math.prod(student.latent_shape) <= LARGEST_LATENT
    for part in objective.parts:
        if few_latents and isinstance(part, VarDiU) and isinstance(part.teacher, DensityDenoiser):
            rng = torch.Generator(device_of(student)).manual_seed(0)
            size, batches = bound_batches(part, n)
            gap = bound_gap(part, student, BOUND_RATIOS, rng, size, batches=batches)
            table = {f.name: getattr(gap, f.name).tolist() for f in dataclasses.fields(gap)}
            write_whole(folder.path / "bound.json", json.dumps(table, indent=2))


def load_run(path: Path) -> tuple[RunFolder, Config, MLP]:
    """A finished run: its folder, configuration and generator.

    Raises:
        UsageError: where `path` is no run, the run is not finished, or its generator is not one.
    """
    folder = open_run(path)
    config: Config = config_files.read(Config, folder.config)
    if not folder.generator.is_dir():
        raise UsageError(f"{path} has no finished generator yet: go on with `vardistill train --resume {path}`")
    return folder, config, load_generator(folder.generator, MLP)


def load_generator(path: Path, kind: type[G]) -> G:
    """The generator of this kind saved in `path`; raises UsageError where it is truncated or foreign."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise UsageError(f"{path} leads out of its run folder: refused")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the hub's mixin prints, and stdout may be JSON
            generator: G = kind.from_pretrained(path)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the generator in {path} is truncated or not one of vardistill's: {first_line(error)}"
        ) from error
    return generator.eval()
