"""What has to fit together in a run, told in a line before any work is lost."""

from __future__ import annotations

import torch
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import NoiseLevels
from vardistill.errors import UsageError, first_line
from vardistill.objectives import Objective, VarDiU
from vardistill.posteriors.few import Prior
from vardistill.runs.config import TrainingConfig
from vardistill.students.student import Student
from vardistill.training.data import Conditions, Labels, Samples, StoredSamples, check_samples


def check_settings(
    generator: Student,
    objective: Objective,
    levels: NoiseLevels,
    training: TrainingConfig,
    conditions: Conditions | None,
    processes: int,
) -> None:
    """Raise UsageError unless the parts of a run fit, as far as they tell without a forward pass."""
    check_generator(generator, conditions)
    check_objective(objective)
    check_batch(training.batch, processes, objective, levels)
    check_accumulation(training, processes, objective)
    check_conditions(conditions, generator, objective)
    if objective.teacher is not None:
        for some in (levels, *objective.other_levels):
            check_schedules(objective.teacher, some)
    check_spread(objective)
    check_head_start(training, objective)


def check_networks(generator: Student, objective: Objective, conditions: Conditions | None) -> None:
    """Raise UsageError unless the generator takes its latents, and the objective's networks what it makes of them."""
    check_forward(generator, conditions)
    objective.check(generator, conditions)


def check_generator(generator: Student, conditions: Conditions | None = None) -> None:
    """Raise UsageError for what is no generator that can be trained, or without the conditions that it takes."""
    needed = ("latent_shape", "data_shape", "data_std", "latents", "classes")
    missing = [name for name in needed if not hasattr(generator, name)]
    if missing or not isinstance(generator, nn.Module):
        raise UsageError(
            "the generator must be a vardistill.students.Student with latent_shape, data_shape and data_std, the "
            f"data's standard deviation, but {type(generator).__name__} has no {', '.join(missing) or 'parameters'}"
        )
    for name in ("latent_shape", "data_shape"):
        shape = getattr(generator, name)
        if not (isinstance(shape, tuple) and all(isinstance(size, int) and size > 0 for size in shape)):
            raise UsageError(f"the generator's {name} must be a tuple of positive whole numbers, but is {shape!r}")
    parameter = next(generator.parameters(), None)
    if parameter is None:
        raise UsageError(f"the generator must have parameters to train, but {type(generator).__name__} has none")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"the generator must be in single or double precision, but is in {parameter.dtype}: give it as "
            "generator.float(), and precision='bf16' for networks that compute in bfloat16"
        )
    if (conditions is None) != (not generator.classes):
        raise UsageError(
            "the generator is conditional: give conditions, e.g. vardistill.data.Labels(torch.ones(classes))"
            if generator.classes
            else "conditions are for a conditional generator, but this one takes no labels"
        )
    if isinstance(conditions, Labels) and len(conditions.frequencies) > generator.classes:
        raise UsageError(
            f"the conditions are {len(conditions.frequencies)} labels, but the generator takes {generator.classes}"
        )


def check_objective(objective: Objective) -> None:
    """Raise UsageError for what is no objective."""
    if not isinstance(objective, Objective):
        raise UsageError(
            f"the objective must be a vardistill.objectives.Objective, but is {type(objective).__name__}: give a "
            "denoiser as teacher"
        )


def check_tracker(training: TrainingConfig) -> None:
    """Raise UsageError for a tracker that is not installed: Accelerate would go on without one."""
    name = training.tracker
    if name != "none" and name not in map(str, get_available_trackers()):
        raise UsageError(f"the tracker {name} is not installed: pip install {name}, or choose another or none")


def check_forward(generator: Student, conditions: Conditions | None = None) -> None:
    """Send two latents through the generator; raise UsageError unless samples of its data shape come back, finite."""
    rng = torch.Generator(next(generator.parameters()).device).manual_seed(0)
    z = generator.latents(2, rng)
    try:
        with torch.enable_grad():
            x = generator(z, **({} if conditions is None else conditions(2, rng)))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        under = "" if conditions is None else " under the conditions"
        raise UsageError(
            f"the generator does not take its latents, {tuple(z.shape)}{under}: {first_line(error)}"
        ) from error
    if tuple(x.shape) != (2, *generator.data_shape) or x.dtype != z.dtype:
        raise UsageError(
            f"the generator's data_shape is {tuple(generator.data_shape)}, but for {tuple(z.shape)} of {z.dtype} it "
            f"returns {tuple(x.shape)} of {x.dtype}"
        )
    if not x.isfinite().all():
        raise UsageError("the generator returns NaN or infinity")
    if not x.requires_grad and any(p.requires_grad for p in generator.parameters()):
        raise UsageError("no gradient reaches the generator's parameters: its forward cuts the graph, e.g. by no_grad")


def check_spread(objective: Objective) -> None:
    """Raise UsageError for a bound that is all of the objective and has nothing that keeps the samples apart."""
    if isinstance(objective, VarDiU) and isinstance(objective.posterior, Prior) and not objective.candidates:
        raise UsageError(
            "VarDiU with the prior as its posterior and no candidates lets the student collapse, for nothing keeps "
            "samples apart: give candidates='batch' or their number, or a posterior that is learned"
        )


def check_schedules(teacher: Denoiser, levels: NoiseLevels) -> None:
    """Raise UsageError unless the noise levels follow the teacher's schedule."""
    if teacher.schedule != levels.schedule:
        raise UsageError(
            f"the teacher's schedule is {teacher.schedule}, but the noise levels' is {levels.schedule}: "
            "give both the same, or wrap the teacher in vardistill.denoisers.reschedule"
        )


def check_batch(batch: int, processes: int, objective: Objective, levels: NoiseLevels) -> None:
    """Raise UsageError unless the batch splits evenly and is large enough for the objective."""
    for name, latents in (("batch", batch), ("pool", objective.pool_latents)):
        if latents % processes:
            raise UsageError(f"{name} must be divisible by the {processes} processes, but is {latents}")
    if batch < objective.smallest_batch:
        name = type(objective).__name__
        raise UsageError(f"{name} needs a batch of at least {objective.smallest_batch}, but batch={batch}")
    if objective.compares_groups and not levels.shared:
        raise UsageError(f"{type(objective).__name__} compares groups of one level: share the levels, e.g. shared=8")
    for shared in {some.shared for some in (levels, *objective.other_levels)} - {0}:
        if batch % (shared * processes):
            raise UsageError(
                f"batch must be divisible by {shared * processes}, shared levels times processes, but is {batch}"
            )
        if batch // shared < 2:
            raise UsageError(f"groups need at least 2 latents each, but batch={batch} has {shared} shared levels")


def check_accumulation(training: TrainingConfig, processes: int, objective: Objective) -> None:
    """Raise UsageError unless the batch splits into the parts, and no row's loss depends on the others."""
    parts = training.accumulate * processes
    if training.accumulate > 1 and objective.smallest_batch > 1:
        raise UsageError(
            f"{type(objective).__name__} compares the rows of a batch, which accumulate={training.accumulate} would "
            "part: set accumulate=1"
        )
    if training.batch % parts:
        raise UsageError(f"batch must be divisible by {parts}, accumulate times processes, but is {training.batch}")


def check_head_start(training: TrainingConfig, objective: Objective) -> None:
    """Raise UsageError for a head start of an objective without critic steps: it would be made of nothing."""
    if training.head_start and not objective.critic_steps:
        raise UsageError(
            f"a head start is for the objective's own networks, but {type(objective).__name__} has no steps of their "
            "own: set head_start=0, or for a learned posterior posterior_steps of at least 2"
        )


def check_conditions(conditions: Conditions | None, generator: Student, objective: Objective) -> None:
    """Raise UsageError unless the objective takes the conditions of a conditional generator."""
    classes = generator.classes
    for part in objective.parts if conditions is not None else ():
        if getattr(part, "candidates", 0) == "batch":
            raise UsageError(
                "candidates of the batch have other labels: use candidates=0 or K with a conditional generator"
            )
        if getattr(part, "classes", classes) < classes:
            raise UsageError(f"the generator takes {classes} labels: tell {type(part).__name__}, classes={classes}")


def real_samples(
    data: Samples | Tensor | None,
    objective: Objective,
    generator: Student,
    like: Tensor,
    conditions: Conditions | None = None,
) -> Samples | None:
    """Where an objective that needs real samples has them from; None for the others."""
    if not objective.needs_real:
        return None
    if data is None:
        raise UsageError(
            f"{type(objective).__name__} compares with real samples: give data, a tensor of them or a function "
            "(vardistill.data.teacher_samples makes some of a teacher)"
        )
    if isinstance(data, Tensor):
        data = StoredSamples(data)
    if isinstance(data, StoredSamples):
        data = data.to(like)
        known = generator.classes if data.by_label is None else len(data.by_label.counts)
        if known < generator.classes:
            raise UsageError(f"the data have samples of {known} labels, but the generator takes {generator.classes}")
    check_samples(data, generator.data_shape, like.device, conditions)
    return data
