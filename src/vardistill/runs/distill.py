"""A run of a user's own parts, in Python."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from vardistill.diffusion import Denoiser, NoiseLevels
from vardistill.domains.own import Own
from vardistill.errors import UsageError, require
from vardistill.objectives import Objective
from vardistill.processes import launched, on_main
from vardistill.runs.experiment import finish
from vardistill.students import Student
from vardistill.training.checks import check_objective, check_student, numbers
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Samples
from vardistill.training.defaults import default_objective, with_default_levels
from vardistill.training.folder import RunFolder, create
from vardistill.training.loop import Evaluate, Run, Trainer


@torch.inference_mode(False)
@torch.enable_grad()
def distill(
    student: Student,
    *,
    teacher: Denoiser | None = None,
    objective: Objective | None = None,
    data: Samples | Tensor | None = None,
    conditions: Conditions | None = None,
    levels: NoiseLevels | None = None,
    training: TrainingConfig | None = None,
    evaluate: Evaluate | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Distil a diffusion model into a generator of one step, or of as many as the student has.

    Args:
        student: its weights are trained in place, with dropout silent.
        teacher: the denoiser to distil with `default_objective`.
        objective: instead of `teacher`, an objective that knows its own, or needs none.
        data: real samples for objectives that compare with them: a tensor (n, *data), or a function of their number
            and a generator of random numbers (see `vardistill.data`).
        conditions: what a conditional student and its teacher are told, `vardistill.data.Labels` for example.
        levels: noise levels; default `default_levels` for the student's `data_std`; the parts of a sum that compare
            groups get shared ones of their own.
        training: optimisation settings.
        evaluate: metrics of the (averaged) student, called at intervals.
        out: a new or empty folder for the run; None keeps nothing on disk. A student that is no hub mixin leaves
            its weights there alone, without a configuration.
        resume: go on from the latest checkpoint in `out`.

    Raises:
        UsageError: for not exactly one of `teacher` and `objective`, a teacher that has no default objective for the
            student, a student that is none or gives no samples of its data shape, a teacher, posterior or critic
            that does not fit it, levels that the teacher's schedule does not reach, data beside a teacher alone, a
            run folder that cannot be used, or a checkpoint that is damaged or of another run.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    training = TrainingConfig() if training is None else training
    if not isinstance(training, TrainingConfig):
        raise UsageError(f"training must be a vardistill.TrainingConfig, but is {type(training).__name__}")
    if (teacher is None) == (objective is None):
        raise UsageError("give either a teacher (for the default objective) or an objective, not both and not neither")
    if teacher is not None and data is not None:
        raise UsageError("no default objective compares with data: leave data out, or give objective=, e.g. VarFlow")
    check_student(student, conditions)
    if objective is None:
        assert teacher is not None
        objective = default_objective(teacher, student)
    check_objective(objective)
    if levels is None:
        shares = training.batch // launched(), training.batch // 2  # of a process; of groups that are pairs
        objective, levels = with_default_levels(objective, student, math.gcd(*shares, 8))
    require("evaluate", evaluate, evaluate is None or callable(evaluate), "a function of the student")
    require("out", out, out is None or (isinstance(out, str | Path) and "\0" not in str(out)), "a path")
    if resume and out is None:
        raise UsageError("resume needs the run folder: give it as out")
    folder = None
    with ExitStack() as held:
        if out is not None:
            folder = RunFolder(Path(out)) if resume else create(Path(out))
            held.enter_context(folder.held())
        trainer = Trainer(student, objective, levels, training, evaluate, folder, data, conditions)
        if folder is None:
            return trainer.run()
        own = Own(student, training, objective, trainer.draws.data, conditions)
        trainer.evaluate = lambda average: (
            own.metrics(average) | ({} if evaluate is None else numbers(evaluate(average)))
        )
        run = trainer.run(resume)
        on_main(lambda: finish(own, folder, run, objective))
    return run
