"""What has to fit together in a run, told in a line before any work is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vardistill.diffusion import Denoiser, NoiseLevels, require_denoiser, same_schedule
from vardistill.diffusion.schedules import expand
from vardistill.errors import UsageError, first_line, require, require_type, unknown
from vardistill.objectives import Objective, VarDiU
from vardistill.objectives.base import STUDENT
from vardistill.students.student import Student
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Labels, Samples, StoredSamples, check_samples


def check_settings(
    student: Student,
    objective: Objective,
    levels: NoiseLevels,
    training: TrainingConfig,
    conditions: Conditions | None,
    processes: int,
) -> None:
    """Raise UsageError unless the parts of a run fit, as far as they tell without a forward pass."""
    check_student(student, conditions)
    check_objective(objective)
    require_type("levels", levels, NoiseLevels, "vardistill.NoiseLevels(teacher.schedule, ...)")
    if processes > 1 and ":" in training.device:
        raise UsageError(
            f"{processes} processes have a device each: set device to auto or {training.device.partition(':')[0]}, not "
            f"{training.device}"
        )
    check_batch(training.batch, processes, objective, levels)
    check_accumulation(training, processes, objective, levels)
    check_optimisers(training, objective)
    if objective.teacher is not None:
        for some in levels_of(objective, levels):
            check_schedules(objective.teacher, some)
    check_statistics(training, processes, student, objective)
    check_spread(objective)
    check_head_start(training, objective)


def check_networks(student: Student, objective: Objective, conditions: Conditions | None) -> None:
    """Raise UsageError unless the student takes its latents, and the objective's networks what it makes of them."""
    condition = two_conditions(student, conditions)
    check_forward(student, condition)
    objective.check(student, condition)


def check_student(student: Student, conditions: Conditions | None = None) -> None:
    """Raise UsageError for what is no generator that can be trained, or without the conditions that it takes."""
    needed = ("latent_shape", "data_shape", "data_std", "latents", "classes")
    missing = [name for name in needed if not hasattr(student, name)]
    if missing or not isinstance(student, nn.Module):
        raise UsageError(
            "the generator must be a vardistill.students.Student with latent_shape, data_shape and data_std, the "
            f"data's standard deviation, but {type(student).__name__} has no {', '.join(missing) or 'parameters'}"
        )
    for name in ("latent_shape", "data_shape"):
        shape = getattr(student, name)
        if not (isinstance(shape, tuple) and all(isinstance(size, int) and size > 0 for size in shape)):
            raise UsageError(f"the generator's {name} must be a tuple of positive whole numbers, but is {shape!r}")
    parameter = next(student.parameters(), None)
    if parameter is None:
        raise UsageError(f"the generator must have parameters to train, but {type(student).__name__} has none")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"the generator must be in single or double precision, but is in {parameter.dtype}: give it as "
            "generator.float(), and precision='bf16' for networks that compute in bfloat16"
        )
    if any(p.is_inference() for p in student.parameters()):
        raise UsageError("the generator was made within torch.inference_mode, and cannot be trained: make it outside")
    names = student.condition_names
    if (conditions is None) != (not names):
        example = "vardistill.data.Labels(torch.ones(classes))" if names == ("labels",) else f"of {', '.join(names)}"
        raise UsageError(
            f"the generator is conditional: give conditions, e.g. {example}"
            if names
            else "conditions are for a conditional generator, but this one takes none"
        )
    if isinstance(conditions, Labels) and 0 < student.classes < len(conditions.frequencies):
        raise UsageError(
            f"the conditions are {len(conditions.frequencies)} labels, but the generator takes {student.classes}"
        )


def numbers(values: object) -> dict[str, float]:
    """What `evaluate` returned, as numbers by name; raises UsageError for other than a mapping of names to numbers."""
    rule = "a mapping of names to numbers"
    require_type("what evaluate returns", values, Mapping, rule)
    found: dict[str, float] = {}
    assert isinstance(values, Mapping)
    for name, value in values.items():
        try:
            require("what evaluate returns", name, isinstance(name, str), f"{rule}, with a text for each name")
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:  # the last of tensors of several numbers
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"what evaluate returns must be {rule}, but {name} is {type(value).__name__}") from error
    return found


def two_conditions(student: Student, conditions: Conditions | None) -> Mapping[str, Tensor]:
    """Conditions of two rows by name; raises UsageError unless they are those that the student takes."""
    return drawn_conditions(student, conditions, 2)


def drawn_conditions(student: Student, conditions: Conditions | None, n: int) -> Mapping[str, Tensor]:
    """Conditions of n rows by name; raises UsageError unless they are those that the student takes."""
    if conditions is None:
        return {}
    require("conditions", conditions, callable(conditions), "a function of (n, rng), such as vardistill.data.Labels")
    try:
        drawn = conditions(n, torch.Generator(next(student.parameters()).device).manual_seed(0))
    except Exception as error:  # a user's own may raise anything
        raise UsageError(f"the conditions are no function of (n, rng): {first_line(error)}") from error
    require_type("what conditions return", drawn, Mapping, "tensors by name, such as {'labels': (n,)}")
    if set(drawn) != set(student.condition_names):
        raise UsageError(
            f"the conditions are {', '.join(sorted(map(str, drawn))) or 'none'}, but the generator takes "
            f"{', '.join(sorted(student.condition_names)) or 'none'}"
        )
    for name, v in drawn.items():
        require_type(f"the condition {name}", v, Tensor, f"a tensor ({n}, ...)")
        if v.ndim < 1 or len(v) != n:
            raise UsageError(f"the condition {name} must have a row for each of {n}, but has shape {tuple(v.shape)}")
    labels = drawn.get("labels")
    if labels is not None and student.classes:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise UsageError(f"labels must be ({n},) of int64, but are {tuple(labels.shape)} of {labels.dtype}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < student.classes:
            raise UsageError(
                f"labels must be in [0, {student.classes}), but go from {int(labels.min())} to {int(labels.max())}"
            )
    return drawn


ROWS, VALUES = 256, 4096
"""Rows on which a teacher is looked at, at most, and about how many values these have, but at least 8 rows."""

DOUBTED = (0.25, 1.0, 4.0)
"""Noise levels for that, in standard deviations of the data."""

OF_DATA, OF_START = 1.5, 4.0
"""Mean squared errors of a teacher that are doubted, in variances: of data's own samples, where the data's mean has 1,
and of a student's start, which may lie elsewhere, so that even an exact teacher reaches 2 (noise itself: 16)."""


UNITS = 4.0
"""Times the generator's data_std, or parts of it, that the data's standard deviation may be."""


@torch.no_grad()
def doubts(
    teacher: Denoiser | None, student: Student, data: Samples | None, conditions: Conditions | None
) -> list[str]:
    """Lines where data do not vary or are in other units, or a teacher denoises worse than a constant would.

    Noise is added to data, or else to samples of the student as it is, at three levels. This costs the teacher some 24
    rows of pictures, of points 768.

    Raises:
        UsageError: for a teacher that returns NaN or infinity there, or changes its input.
    """
    if teacher is None and data is None:
        return []
    like = next(student.parameters())
    n = min(ROWS, max(8, VALUES // math.prod(student.data_shape)))
    condition = drawn_conditions(student, conditions, n)
    rng = torch.Generator(like.device).manual_seed(0)
    x = student(student.latents(n, rng), **condition) if data is None else data(n, rng, **condition).to(like)
    variance = float((x - x.mean(0)).square().mean())
    lines = []
    if data is None:
        variance = max(variance, student.data_std**2)
    elif not variance > 0:
        return [f"the data do not vary: {n} samples of them are all the same"]
    elif not 1 / UNITS <= math.sqrt(variance) / student.data_std <= UNITS:
        lines.append(
            f"the data go from {float(x.min()):.3g} to {float(x.max()):.3g}, with mean {float(x.mean()):.3g} and "
            f"standard deviation {math.sqrt(variance):.3g}, but the generator's data_std is {student.data_std:.3g}: "
            "are they in its units?"
        )
    if teacher is None:
        return lines
    worst, limit = 0.0, OF_START if data is None else OF_DATA
    for level in DOUBTED:
        ratio = x.new_full((n,), level * math.sqrt(variance))
        t = teacher.schedule.time(ratio).clamp(0, 1)
        alpha, sigma = teacher.schedule(t)
        eps = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
        if not torch.allclose(sigma, alpha * ratio, rtol=0.1):  # out of the schedule's reach
            continue
        x_t = expand(alpha, x) * x + expand(sigma, x) * eps
        given = x_t.clone()
        denoised = teacher(given, t, **condition)
        if not torch.equal(given, x_t):
            raise UsageError("the teacher's network changes its input in place: let it work on a copy")
        if not denoised.isfinite().all():
            raise UsageError(f"the teacher returns NaN or infinity at t = {float(t[0]):.3g}")
        worst = max(worst, float((denoised - x).square().mean()) / variance)
    if worst <= limit:
        return lines
    of = "the data" if data is not None else "the generator's start"
    lines.append(
        f"the teacher denoises {of} {math.sqrt(worst):.3g} times worse than their mean would, root mean square over "
        "noise of 1/4 to 4 standard deviations: is it trained, and are predicts=, time= (which a network of 1000 steps "
        "needs), its schedule and data_std right?"
    )
    return lines


def check_objective(objective: Objective) -> None:
    """Raise UsageError for what is no objective, or trains networks that it has not."""
    if not isinstance(objective, Objective):
        raise UsageError(
            f"the objective must be a vardistill.objectives.Objective, but is {type(objective).__name__}: give a "
            "denoiser as teacher"
        )
    if objective.scores_by_teacher:
        require_denoiser(objective.teacher, "teacher")
    for name, network in objective.networks.items():
        require_type(f"the {name} of {type(objective).__name__}", network, nn.Module, "an nn.Module")
    if STUDENT in objective.networks:
        raise UsageError(f"'{STUDENT}' is the student's name: call {type(objective).__name__}'s own network another")
    for name in trained_networks(objective) - {STUDENT}:
        if name not in objective.networks:
            raise unknown(f"network in the updates of {type(objective).__name__}", name, [STUDENT, *objective.networks])


def trained_networks(objective: Objective) -> set[str]:
    """The names of the networks that any update trains, at the start or at the end of a run."""
    return {name for progress in (0.0, 1.0) for update in objective.updates(progress) for name in update.trains}


def check_tracker(training: TrainingConfig) -> None:
    """Raise UsageError for a tracker that is not installed: Accelerate would go on without one."""
    name = training.tracker
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UsageError(f"the tracker {name} is not installed: pip install {name}, or choose another or none")


def check_forward(student: Student, condition: Mapping[str, Tensor]) -> None:
    """Send two latents through each of the student's steps, twice.

    Raises:
        UsageError: unless samples of its data shape come back, finite, the same both times, and with a gradient.
    """
    rng = torch.Generator(next(student.parameters()).device).manual_seed(0)
    z = student.latents(2, rng)
    for step in range(1, student.steps + 1):
        which = {} if step == 1 else {"step": step}
        try:
            with torch.enable_grad():
                x, again = student(z, **which, **condition), student(z, **which, **condition)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            under = " under the conditions" if condition else ""
            raise UsageError(
                f"the generator does not take its latents, {tuple(z.shape)}{under}: {first_line(error)}"
            ) from error
        if tuple(x.shape) != (2, *student.data_shape) or x.dtype != z.dtype:
            raise UsageError(
                f"the generator's data_shape is {tuple(student.data_shape)}, but for {tuple(z.shape)} of {z.dtype} it "
                f"returns {tuple(x.shape)} of {x.dtype}"
            )
        if not x.isfinite().all():
            raise UsageError("the generator returns NaN or infinity")
        if not torch.equal(x, again):
            raise UsageError(
                "the generator is random beside its latents (dropout that ignores evaluation mode?): neither a seed "
                "nor a checkpoint would hold its numbers"
            )
        if not x.requires_grad and any(p.requires_grad for p in student.parameters()):
            raise UsageError(
                "no gradient reaches the generator's parameters: its forward cuts the graph, e.g. by no_grad"
            )


def check_spread(objective: Objective) -> None:
    """Raise UsageError for a bound that is all of the objective and has nothing that keeps the samples apart."""
    if isinstance(objective, VarDiU) and not objective.learned and not objective.candidates:
        raise UsageError(
            "VarDiU with the prior as its posterior and no candidates lets the student collapse, for nothing keeps "
            "samples apart: give candidates='batch' or their number, or a posterior that is learned"
        )


def check_schedules(teacher: Denoiser, levels: NoiseLevels) -> None:
    """Raise UsageError unless the noise levels follow the teacher's schedule."""
    if not same_schedule(teacher.schedule, levels.schedule):
        raise UsageError(
            f"the teacher's schedule is {teacher.schedule}, but the noise levels' is {levels.schedule}: "
            "give both the same, or wrap the teacher in vardistill.denoisers.reschedule"
        )


def levels_of(objective: Objective, levels: NoiseLevels) -> list[NoiseLevels]:
    """The noise levels of a run: its own and those of single updates."""
    needs = [update.needs for update in objective.updates()]
    return [levels, *(own for n in needs for own in (n.levels, *n.other_levels) if own is not None)]


def check_batch(batch: int, processes: int, objective: Objective, levels: NoiseLevels) -> None:
    """Raise UsageError unless the batch splits evenly and is large enough for the objective."""
    needs, name = [update.needs for update in objective.updates()], type(objective).__name__
    for kind, latents in (("batch", batch), *(("pool", n.pool) for n in needs)):
        if latents % processes:
            raise UsageError(f"{kind} must be divisible by the {processes} processes, but is {latents}")
    smallest = max(n.smallest_batch for n in needs)
    if batch < smallest:
        raise UsageError(f"{name} needs a batch of at least {smallest}, but batch={batch}")
    if any(n.groups and not (n.levels or levels).shared for n in needs):
        raise UsageError(f"{name} compares groups of one level: share the levels, e.g. shared=8")
    for shared in {some.shared for some in levels_of(objective, levels)} - {0}:
        if batch % (shared * processes):
            raise UsageError(
                f"batch must be divisible by {shared * processes}, shared levels times processes, but is {batch}"
            )
        if batch // shared < 2:
            raise UsageError(f"groups need at least 2 latents each, but batch={batch} has {shared} shared levels")
        for m in {n.per_condition for n in needs} - {0}:
            if batch % (shared * processes * m):
                raise UsageError(
                    f"batch must be divisible by {shared * processes * m}, shared levels times processes times the {m} "
                    f"latents of a condition, but is {batch}"
                )


def check_accumulation(training: TrainingConfig, processes: int, objective: Objective, levels: NoiseLevels) -> None:
    """Raise UsageError unless the batch splits into the parts, with the levels that its rows share."""
    parts = training.accumulate * processes
    if training.batch % parts:
        raise UsageError(f"batch must be divisible by {parts}, accumulate times processes, but is {training.batch}")
    for shared in {some.shared for some in levels_of(objective, levels)} - {0}:
        if training.accumulate > 1 and training.batch % (parts * shared):
            raise UsageError(
                f"batch must be divisible by {parts * shared}, accumulate times processes times shared levels, but is "
                f"{training.batch}"
            )


def check_statistics(training: TrainingConfig, processes: int, student: Student, objective: Objective) -> None:
    """Raise UsageError for batch normalisation where a batch is parted: its statistics would be those of the parts."""
    if training.accumulate * processes == student.steps == 1:
        return
    for network in (student, *objective.networks.values()):
        norm = next((module for module in network.modules() if isinstance(module, _BatchNorm)), None)
        if norm is not None:
            raise UsageError(
                f"{type(network).__name__} has {type(norm).__name__}, whose statistics are those of a whole batch: set "
                "accumulate=1, with one process and a student of one step, or give it GroupNorm"
            )


def check_head_start(training: TrainingConfig, objective: Objective) -> None:
    """Raise UsageError for a head start of an objective without updates of its own: it would be made of nothing."""
    if training.head_start and all(update.trains_student for update in objective.updates()):
        raise UsageError(
            f"a head start is for the objective's own networks, but {type(objective).__name__} has no steps of their "
            "own: set head_start=0, or for a learned posterior posterior_steps of at least 2"
        )


def check_optimisers(training: TrainingConfig, objective: Objective) -> None:
    """Raise UsageError for settings of networks that are not there."""
    known = ["student", *objective.networks]
    for own in training.networks:
        if own.name not in known and own.name not in [name.rpartition(".")[2] for name in known]:
            raise unknown("network", own.name, known)


def real_samples(
    data: Samples | Tensor | None,
    objective: Objective,
    student: Student,
    like: Tensor,
    conditions: Conditions | None = None,
) -> Samples | None:
    """Where an objective that needs real samples has them from; None for the others."""
    if not any(update.needs.real for update in objective.updates()):
        return None
    if data is None:
        raise UsageError(
            f"{type(objective).__name__} compares with real samples: give data, a tensor of them or a function "
            "(vardistill.data.teacher_samples makes some of a teacher)"
        )
    if not isinstance(data, StoredSamples) and (isinstance(data, Tensor) or not callable(data)):
        data = StoredSamples(data)  # which says what it wants
    if isinstance(data, StoredSamples):
        data = data.to(like)
        known = student.classes if data.by_label is None else len(data.by_label.counts)
        if known < student.classes:
            raise UsageError(f"the data have samples of {known} labels, but the generator takes {student.classes}")
    check_samples(data, student.data_shape, like.device, conditions)
    return data
