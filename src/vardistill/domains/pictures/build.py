"""From a configuration of a run on pictures to its parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vardistill.denoisers import Guided, Mixed
from vardistill.denoisers.diffusers import DiffusersDenoiser, from_diffusers, network_name
from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import NoiseLevels
from vardistill.domains.pictures.config import (
    ImageDiffInstructConfig,
    ImagesConfig,
    ImagesTeachConfig,
    ImageSumConfig,
    ImageVarDiUConfig,
    ImageVarFlowConfig,
)
from vardistill.domains.pictures.data import ImageData, image_samples, label_frequencies, load_images
from vardistill.domains.pictures.features import ClassifierFeatures, Features
from vardistill.domains.pictures.spaces import ClassifierSpace, EncoderSpace
from vardistill.errors import UsageError
from vardistill.export.pipelines import PARTS
from vardistill.objectives import DiffInstruct, Objective, Part, VarDiU, VarFlow, WeightedSum
from vardistill.posteriors.pictures import ConvGaussian, CouplingFlow
from vardistill.runs.build import Geometric, build_noise, initial_weights
from vardistill.students.network import NetworkStudent
from vardistill.training import config_files
from vardistill.training.data import Conditions, Labels, Samples, teacher_samples
from vardistill.training.folder import RunFolder

SIGMA_DATA = 0.5
"""Standard deviation of pictures in [−1, 1] where neither data nor teacher tell."""


@dataclass(frozen=True)
class Teacher:
    """A teacher and what comes with it.

    Attributes:
        denoiser: E[x | x_t].
        data: the source of its own pictures; None for a pipeline of others.
        classifier: the folder of its pictures' classifier, or None.
        class_names: of its labels, where the classifier tells them.
    """

    denoiser: DiffusersDenoiser
    data: str | None = None
    classifier: Path | None = None
    class_names: tuple[str, ...] = ()


def load_teacher(source: str) -> Teacher:
    """The teacher of a run of `vardistill teach`, of a diffusers pipeline's folder, or of a hub id.

    Raises:
        UsageError: where it cannot be read.
    """
    if not source:
        raise UsageError("no teacher: give --teacher FOLDER, of `vardistill teach` or of a diffusers pipeline")
    run = RunFolder(Path(source))
    if not run.config.is_file():
        return Teacher(load_denoiser(source))
    config: ImagesTeachConfig = config_files.read(ImagesTeachConfig, run.config)
    pipeline, classifier = run.path / "pipeline", run.path / "classifier"
    if not pipeline.is_dir():
        raise UsageError(f"{source} has no finished teacher yet: go on with `vardistill teach --resume {source}`")
    denoiser = load_denoiser(str(pipeline))
    if not classifier.is_dir():
        return Teacher(denoiser, config.data)
    return Teacher(denoiser, config.data, classifier, class_names_of(classifier))


def class_names_of(classifier: Path) -> tuple[str, ...]:
    """The names of the classes of a saved classifier; raises UsageError where its configuration cannot be read."""
    try:
        return tuple(map(str, json.loads((classifier / "config.json").read_text(encoding="utf-8"))["class_names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{classifier / 'config.json'} is damaged or does not name the classes") from error


def load_denoiser(source: str) -> DiffusersDenoiser:
    """`from_diffusers`, for a network that takes nothing but labels."""
    denoiser = from_diffusers(source)
    if (name := network_name(denoiser.network)) not in PARTS:
        raise UsageError(f"{source} is a {name}, which takes more than labels: give one of {', '.join(PARTS)}")
    return denoiser


@dataclass(frozen=True)
class Setting:
    """What the objective and the student of a run are built from.

    Attributes:
        config: of the run.
        teacher: with what comes with it.
        data: the pictures, or None.
        classes: labels 0..classes − 1 that the student takes; 0 for an unconditional one.
        std: σ_d, standard deviation of the pictures.
    """

    config: ImagesConfig
    teacher: Teacher
    data: ImageData | None
    classes: int
    std: float


def build_setting(config: ImagesConfig) -> Setting:
    """Load teacher and data; raises UsageError where they do not fit each other or the objective."""
    teacher = load_teacher(config.teacher)
    source = config.data or teacher.data
    data = None if source is None else load_images(source)
    if data is not None and data.shape != teacher.denoiser.data_shape:
        raise UsageError(
            f"{data.name} has pictures of {data.shape}, but the teacher's are {teacher.denoiser.data_shape}"
        )
    classes = known = teacher.denoiser.classes
    if data is not None and known:
        if data.classes > known:
            raise UsageError(f"{data.name} has {data.classes} classes, but the teacher knows {known}")
        check_names(data, teacher.class_names)
        own = teacher.denoiser
        if data.classes == known - 1 and not own.classes_given and own.null_label is None:
            # a foreign U-Net's last row is for none
            teacher = replace(teacher, denoiser=DiffusersDenoiser(own.network, own.scheduler, data.classes))
        classes = data.classes or known
    std = data.std if data is not None else getattr(teacher.denoiser.scheduler.config, "sigma_data", SIGMA_DATA)
    return Setting(config, teacher, data, classes, std)


def check_names(data: ImageData, names: tuple[str, ...]) -> None:
    """Raise UsageError unless the data's labels mean what the teacher's do, as far as the teacher's names tell."""
    for label, (own, theirs) in enumerate(zip(data.class_names, names, strict=False)):
        if own != theirs:
            raise UsageError(
                f"label {label} is '{own}' in {data.name}, but '{theirs}' for the teacher: give data of its classes, "
                "in its order"
            )


def build_conditions(setting: Setting) -> Conditions | None:
    """The labels that steps draw: as frequent as in the data, else equally."""
    if not setting.classes:
        return None
    labelled = setting.data is not None and setting.data.classes == setting.classes
    return Labels(label_frequencies(cast(ImageData, setting.data).train) if labelled else torch.ones(setting.classes))


def build_guided(setting: Setting) -> Denoiser:
    """The teacher as it is distilled, with its guidance."""
    denoiser, scale = setting.teacher.denoiser, setting.config.guidance
    if scale == 1:
        return denoiser
    if denoiser.null_label is None:
        raise UsageError("guidance needs a conditional teacher with a label for no class, after those of the data")
    return Guided(denoiser, scale, {"labels": denoiser.null_label})


def build_student(setting: Setting) -> NetworkStudent:
    """The student with its initial weights."""
    g, seed = setting.config.generator, setting.config.training.seed
    with initial_weights(seed):
        student = NetworkStudent.from_teacher(setting.teacher.denoiser, g.ratio, setting.classes, setting.std)
        if g.start == "fresh":
            fresh = NetworkStudent(**student.configuration())
            student.load_state_dict(fresh.state_dict())
        return student.add_adapters(g.lora_rank) if g.lora_rank else student


def build_levels(setting: Setting) -> NoiseLevels:
    """How steps draw their noise, under the teacher's schedule."""
    return build_noise(setting.config.levels, setting.teacher.denoiser.schedule, setting.std)


def build_objective(
    setting: Setting, teacher: Denoiser, features: Features | None, student: NetworkStudent
) -> Objective:
    """The objective with its auxiliary networks; a posterior starts at the scale of what x tells of z.

    Under bf16 the objective sees the teacher in mixed precision; real samples and evaluations do not.
    """
    o = setting.config.objective
    if setting.config.training.precision == "bf16":
        teacher = Mixed(teacher)
    if isinstance(o, ImageSumConfig):
        levels = replace(setting.config.levels, weight="one", shared=o.varflow_shared, draws=1, antithetic=False)
        own = build_noise(levels, teacher.schedule, setting.std)
        root = math.sqrt(math.prod(setting.teacher.denoiser.data_shape))
        weight = Geometric(o.varflow_weight * root, o.varflow_weight_end * root)
        first, varflow = (
            build_part(o.first, setting, teacher, student),
            build_varflow(o.varflow, setting, teacher, features),
        )
        return WeightedSum([Part(first), Part(varflow, weight, own)])
    if isinstance(o, ImageVarFlowConfig):
        return build_varflow(o, setting, teacher, features)
    return build_part(o, setting, teacher, student)


def build_part(
    o: ImageVarDiUConfig | ImageDiffInstructConfig, setting: Setting, teacher: Denoiser, student: NetworkStudent
) -> Objective:
    """VarDiU with a fresh posterior, or Diff-Instruct with the teacher's copy as critic."""
    if isinstance(o, ImageDiffInstructConfig):
        critic = deepcopy(setting.teacher.denoiser)
        mixed = setting.config.training.precision == "bf16"
        return DiffInstruct(teacher, Mixed(critic) if mixed else critic, o.critic_steps, sigma_data=setting.std)
    shape = setting.teacher.denoiser.data_shape
    family = {"gaussian": ConvGaussian, "coupling": CouplingFlow}[o.posterior]
    with initial_weights(setting.config.training.seed + 1):
        posterior = family(
            shape, shape, setting.std, o.width, classes=setting.classes, rank=o.rank, spread=spread_of(student)
        )
    return VarDiU(
        teacher,
        posterior,
        candidates=o.candidates,
        control_variate=o.control_variate,
        sigma_data=setting.std,
        posterior_steps=o.posterior_steps,
    )


@torch.no_grad()
def spread_of(student: NetworkStudent, n: int = 16, step: float = 1e-2) -> float:
    """√ of the mean squared singular value of ∂x/∂z, E‖J v‖²/d over v ~ N(0, I), by differences."""
    parameter = next(student.parameters())
    rng = torch.Generator(parameter.device).manual_seed(0)
    z, v = student.latents(n, rng), student.latents(n, rng)
    labels = {"labels": torch.arange(n, device=parameter.device) % student.classes} if student.classes else {}
    change = (student(z + step * v, **labels) - student(z - step * v, **labels)) / (2 * step)
    return float(change.square().mean().sqrt())


def build_varflow(o: ImageVarFlowConfig, setting: Setting, teacher: Denoiser, features: Features | None) -> VarFlow:
    """VarFlow between pictures or their features."""
    return VarFlow(
        o.beta,
        o.cross,
        features=build_space(o, setting, features),
        classes=setting.classes,
        label_distance=o.label_distance,
        teacher=teacher,
    )


def build_space(
    o: ImageVarFlowConfig, setting: Setting, features: Features | None
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The map (x_t, t) → features in which VarFlow takes distances; None for pictures themselves."""
    if o.space == "pixels":
        return None
    if o.space == "classifier":
        if not isinstance(features, ClassifierFeatures):
            raise UsageError("the classifier's space needs a classifier: give labelled --data, or another --space")
        return ClassifierSpace(deepcopy(features.classifier))
    denoiser = setting.teacher.denoiser
    last = denoiser.classes - 1 if denoiser.classes else None
    label = last if denoiser.null_label is None else denoiser.null_label
    return EncoderSpace(denoiser, label, mixed=setting.config.training.precision == "bf16")


def build_real_samples(setting: Setting, teacher: Denoiser, conditions: Conditions | None) -> Samples | None:
    """Where the objective's real samples come from; None for one that needs none."""
    varflow, denoiser = varflow_of(setting.config), setting.teacher.denoiser
    if varflow is None:
        return None
    if varflow.real == "data":
        return build_pictures(setting)
    rng = torch.Generator(next(denoiser.parameters()).device).manual_seed(setting.config.training.seed + 2)
    return teacher_samples(teacher, denoiser.data_shape, varflow.real_samples, rng, varflow.real_steps, conditions)


def varflow_of(config: ImagesConfig) -> ImageVarFlowConfig | None:
    """The part of the objective that compares with real samples, if there is one."""
    o = config.objective
    varflow = o.varflow if isinstance(o, ImageSumConfig) else o
    return varflow if isinstance(varflow, ImageVarFlowConfig) else None


def build_pictures(setting: Setting) -> Samples:
    """The data's training pictures as real samples."""
    if setting.data is None:
        raise UsageError("VarFlow learns from pictures: give --data, or --real teacher for the teacher's own samples")
    return image_samples(setting.data.train)
