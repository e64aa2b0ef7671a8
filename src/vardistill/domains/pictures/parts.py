"""What pictures provide to a run: the networks of diffusers, data of every source, and metrics in features."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vardistill.denoisers import Adapted, DiffusersDenoiser, Guided, Mixed, from_diffusers
from vardistill.denoisers.adapters import HALF
from vardistill.denoisers.diffusers import network_name
from vardistill.devices import computes_in_bf16, find_device
from vardistill.diffusion import Denoiser, Schedule, sample
from vardistill.domains.base import Finished, fit_once
from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.config import PicturesConfig, PicturesTeachConfig
from vardistill.domains.pictures.data import ImageData, Images, image_samples, label_frequencies
from vardistill.domains.pictures.evaluate import (
    Reference,
    blocks,
    build_reference,
    even_labels,
    labels_like,
    measured,
)
from vardistill.domains.pictures.features import ClassifierFeatures, Features, load_features
from vardistill.domains.pictures.sources import load_images
from vardistill.domains.pictures.spaces import BlocksSpace, ClassifierSpace, EncoderSpace
from vardistill.domains.pictures.teach import (
    check_samples,
    described,
    few,
    kept_classifier,
    teach_images,
    unmeasured,
    untrained,
)
from vardistill.errors import UsageError, unknown
from vardistill.export.pipelines import PARTS
from vardistill.files import typed
from vardistill.metrics.memorisation import nearest
from vardistill.networks import initial_weights
from vardistill.objectives import Objective
from vardistill.posteriors import ConvGaussian, CouplingFlow, Posterior
from vardistill.progress import say
from vardistill.students import NetworkStudent, Student, load_student
from vardistill.training import config_files
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Labels, Samples, teacher_samples
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Evaluate

SIGMA_DATA = 0.5
"""Standard deviation of pictures in [−1, 1] where neither data nor teacher tell."""

POSTERIOR_WIDTH = 32
"""Channels of a posterior's network, by default."""

TEACHER_STEPS = 18
"""Of Heun's method, for the teacher's pictures beside the student's: EDM's number for small pictures."""

SHOWN = 100
"""Pictures beside the teacher's."""

BLOCK = 64
"""Pictures that are drawn at once: as many as fit into a processor's memory."""

TIMED = 64
"""Pictures that are timed together."""


@dataclass(frozen=True)
class Teacher:
    """A teacher and what comes with it.

    Attributes:
        denoiser: E[x | x_t].
        fit: of which it is, with its pictures; None for a pipeline of others.
        classifier: the folder of its pictures' classifier, or None.
        class_names: of its labels, where the classifier tells them.
    """

    denoiser: DiffusersDenoiser
    fit: PicturesTeachConfig | None = None
    classifier: Path | None = None
    class_names: tuple[str, ...] = ()


def load_teacher(source: str, variant: str | None = None) -> Teacher:
    """The teacher of a run of `vardistill teach`, of a diffusers pipeline's folder, or of a hub id.

    Args:
        source: one of these.
        variant: of a pipeline's weights; see `from_diffusers`.

    Raises:
        UsageError: where it cannot be read.
    """
    run = RunFolder(Path(source))
    if not run.config.is_file():
        return Teacher(load_denoiser(source, variant))
    config: PicturesTeachConfig = config_files.read(PicturesTeachConfig, run.config)
    pipeline, classifier = run.path / "pipeline", run.path / "classifier"
    if not pipeline.is_dir():
        raise UsageError(
            f"{source} has no finished teacher yet: go on with `vardistill teach --resume {typed(source)}`"
        )
    denoiser = load_denoiser(str(pipeline))
    if not classifier.is_dir():
        return Teacher(denoiser, config)
    return Teacher(denoiser, config, classifier, class_names_of(classifier))


def class_names_of(classifier: Path) -> tuple[str, ...]:
    """The names of the classes of a saved classifier; raises UsageError where its configuration cannot be read."""
    try:
        return tuple(map(str, json.loads((classifier / "config.json").read_text(encoding="utf-8"))["class_names"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{classifier / 'config.json'} is damaged or does not name the classes") from error


def load_denoiser(source: str, variant: str | None = None) -> DiffusersDenoiser:
    """`from_diffusers`, for a network that takes nothing but labels."""
    denoiser = from_diffusers(source, variant)
    if (name := network_name(denoiser.network)) not in PARTS:
        raise UsageError(f"{source} is a {name}, which takes more than labels: give one of {', '.join(PARTS)}")
    return denoiser


class Pictures:
    """The parts of a run on pictures; see `domains.base.Domain`.

    Args:
        config: of the domain.
        training: of the run, for seed, device, precision and numbers of samples.
        takes_teacher: whether the objective has one; the student does, as it starts as its network.

    Attributes:
        source: the teacher with what comes with it.
        data: the pictures, or None.
        classes: labels 0..classes − 1 that the student takes; 0 for an unconditional one.
        features: what pictures are measured with, or None.
        guided: the teacher with its guidance, in full precision.
        teacher: the same as it is distilled, in the run's precision.
    """

    problem = None
    source: Teacher
    data: ImageData | None
    classes: int
    features: Features | None
    guided: Denoiser
    teacher: Denoiser
    student: NetworkStudent

    def __init__(self, config: PicturesConfig, training: TrainingConfig, takes_teacher: bool = True) -> None:
        self.config, self.training, self.seed = config, training, training.seed
        self._sets: dict[object, ImageData] = {}
        if not config.teacher and config.data is None:
            raise UsageError(
                "no teacher: give --teacher FOLDER, of `vardistill teach` or of a diffusers pipeline, or --data, to "
                "which one is fitted first"
            )

    @cached_property
    def device(self) -> torch.device:
        """Where the run computes."""
        return find_device(self.training.device)

    @cached_property
    def mixed(self) -> bool:
        """Whether its networks compute in bfloat16."""
        return computes_in_bf16(self.training.precision, self.device)

    def load(self, folder: RunFolder | None) -> None:
        """Load teacher and data, and build the student; a classifier that has yet to be fitted is stood in for."""
        self._load_source(folder)
        network: Any = self.source.denoiser.network
        if self.config.student.base_precision == "bf16":
            nn.Module.to(network, torch.bfloat16)  # diffusers' own warns
        if self.config.student.gradient_checkpointing:
            network.enable_gradient_checkpointing()  # which adapted networks and copies have from it
        self.schedule: Schedule = self.source.denoiser.schedule
        self.guided = self._guided()
        self.teacher = Mixed(self.guided) if self.mixed else self.guided
        self.student = self._build_student()
        if self.config.student.gradient_checkpointing:
            network = self.student.denoiser.network
            network.enable_gradient_checkpointing()
        self.features = self._features(folder)
        if folder is not None:  # the teacher may draw samples
            self.source.denoiser.to(self.device)
            self.features = self.features and self.features.to(self.device)

    def _load_source(self, folder: RunFolder | None) -> None:
        config = self.config
        if config.teacher:
            teacher = load_teacher(config.teacher, config.variant)
        elif folder is not None:
            teacher = load_teacher(str(folder.teacher))
        else:
            fit = config.learns_from(self.training)
            assert fit is not None
            teacher = Teacher(untrained(fit, self._read(fit.data, fit.size, fit.mirrored)), fit)
        data, shape = self._data(teacher), teacher.denoiser.data_shape
        if data is not None and data.shape != shape:
            hint = f": --size {shape[1]} resizes them" if shape[0] == data.shape[0] and shape[1] == shape[2] else ""
            raise UsageError(f"{data.name} has pictures of {data.shape}, but the teacher's are {shape}{hint}")
        self.classes = known = teacher.denoiser.classes
        if data is not None and known:
            if data.classes > known:
                raise UsageError(f"{data.name} has {data.classes} classes, but the teacher knows {known}")
            data, own = numbered_as(data, teacher), teacher.denoiser
            if data.classes == known - 1 and not own.classes_given and own.null_label is None:
                # a foreign U-Net's last row is for none
                teacher = replace(
                    teacher, denoiser=DiffusersDenoiser(own.network, own.scheduler, data.classes, own.latents)
                )
            self.classes = data.classes or known
        self.source, self.data = teacher, data
        scale = getattr(teacher.denoiser.scheduler.config, "sigma_data", SIGMA_DATA)
        self.data_std: float = scale if data is None else data.std

    def _data(self, teacher: Teacher) -> ImageData | None:
        """The pictures of the run: its own or the teacher's."""
        config, fit = self.config, teacher.fit
        if config.data is None or (fit is not None and not config.teacher):
            return None if fit is None else self._read(fit.data, fit.size, fit.mirrored)
        return self._read(config.data, config.size, config.mirrored, teacher.denoiser.data_shape[1:])

    def _read(
        self, source: str, size: int | None, mirrored: bool, default_size: tuple[int, int] | None = None
    ) -> ImageData:
        """`load_images`, once."""
        key = source, size, mirrored, default_size
        if key not in self._sets:
            own = None if size is None else (size, size)
            self._sets[key] = load_images(source, size=own, default_size=default_size, mirrored=mirrored)
        return self._sets[key]

    def check(self) -> None:
        """Raise the UsageError that metrics would end with, before anything is fitted."""
        if self.data is not None and self.features is not None:
            check_samples(self.training.eval_samples)
            if (reason := few(self.data)) is not None:
                raise UsageError(f"{reason}: leave out --features")
            self.features(self.data.train.take(torch.arange(1)))

    def prepare(self, folder: RunFolder) -> None:
        """Say what was read; fit a teacher to the data where none is given, a classifier where none comes with it."""
        fit = self.config.learns_from(self.training)
        if self.data is not None and fit is None:  # a fit says it itself
            say(described(self.data, unmeasured(self.data) if self.features is None else None))
        if fit is not None:
            fit_once(folder.teacher, lambda begun: teach_images(fit, folder.teacher, resume=begun))
        if self.config.teacher and self._classifier() is None and self._fits_classifier():
            assert self.data is not None
            kept_classifier(self.data, folder.path / "classifier", self.seed)

    def _fits_classifier(self) -> bool:
        return self.config.features is None and self.data is not None and unmeasured(self.data) is None

    def _classifier(self) -> str | Path | None:
        """What the run names to measure pictures with, or the teacher's classifier; None for neither."""
        return self.config.features or self.source.classifier

    def _features(self, folder: RunFolder | None) -> Features | None:
        """What pictures are measured with; None without labels that a classifier could be fitted to, or for few."""
        if self.config.features is None and self.data is not None and few(self.data) is not None:
            return None
        found = self._classifier()
        if found is not None:
            return load_features(found)
        if not self._fits_classifier():
            return None
        if folder is None:  # in the place of one to be fitted
            assert self.data is not None
            return ClassifierFeatures(Classifier(self.data.shape, self.data.class_names))
        return load_features(folder.path / "classifier")

    def _guided(self) -> Denoiser:
        denoiser, scale = self.source.denoiser, self.config.guidance
        if scale == 1:
            return denoiser
        if denoiser.null_label is None:
            raise UsageError("guidance needs a conditional teacher with a label for no class, after those of the data")
        return Guided(denoiser, scale, {"labels": denoiser.null_label})

    def _build_student(self) -> NetworkStudent:
        s = self.config.student
        with initial_weights(self.seed):
            student = NetworkStudent.from_teacher(
                self.source.denoiser, s.ratio, self.classes, self.data_std, s.steps_per_sample, rank=s.lora_rank
            )
            if s.start == "fresh":
                fresh = NetworkStudent(**student.configuration())
                student.load_state_dict(fresh.state_dict())
            return student

    @cached_property
    def conditions(self) -> Conditions | None:
        """The labels that steps draw: as frequent as in the data, else equally."""
        if not self.classes:
            return None
        if self.data is not None and self.data.classes == self.classes:
            return Labels(label_frequencies(self.data.train))
        return Labels(torch.ones(self.classes))

    def posterior(self, family: str, **sizes: Any) -> list[Posterior]:
        """A fresh posterior of each step's noise, which starts at the scale of what x tells of it."""
        families: dict[str, tuple[type[ConvGaussian], int]] = {
            "diagonal": (ConvGaussian, 0),
            "low-rank": (ConvGaussian, sizes["rank"]),
            "coupling": (CouplingFlow, 0),
        }
        if family not in families:
            raise unknown("posterior of pictures", family, ("prior", *families))
        kind, rank = families[family]
        shape, width = self.source.denoiser.data_shape, sizes["width"] or POSTERIOR_WIDTH
        found: list[Posterior] = []
        for step in range(1, self.student.steps + 1):
            spread = spread_of(self.student, step)
            with initial_weights(self.seed + step):
                found.append(kind(shape, shape, self.data_std, width, classes=self.classes, rank=rank, spread=spread))
        return found

    def critic(self, start: str, **sizes: Any) -> Denoiser:
        """The teacher without its guidance: with adapters, or a copy with its weights or fresh ones."""
        source = self.source.denoiser
        with initial_weights(self.seed + 1):
            critic = Adapted(source, sizes["rank"]) if sizes.get("rank") else in_single(deepcopy(source))
            critic.requires_grad_(True)
            if start == "fresh":
                fresh = NetworkStudent(**NetworkStudent.from_teacher(source, data_std=self.data_std).configuration())
                critic.network.load_state_dict(fresh.denoiser.network.state_dict())
        return Mixed(critic) if self.mixed else critic

    def space(self, name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Pictures themselves, or features of the classifier, of the teacher's encoder or of all its blocks."""
        if name == "data":
            return None
        if name == "classifier":
            if not isinstance(self.features, ClassifierFeatures):
                raise UsageError("the classifier's space needs a classifier: give labelled --data, or another --space")
            return ClassifierSpace(deepcopy(self.features.classifier))
        denoiser = self.source.denoiser
        last = denoiser.classes - 1 if denoiser.classes else None
        label = last if denoiser.null_label is None else denoiser.null_label
        kind = BlocksSpace if name == "teacher-blocks" else EncoderSpace
        return kind(denoiser, label, mixed=self.mixed)

    def real(self, source: Literal["teacher", "data"], n: int, steps: int) -> Samples:
        """The data's training pictures, or a set of the teacher's own."""
        if source == "data":
            if self.data is None:
                raise UsageError("real samples are pictures: give --data, or --real teacher for the teacher's own")
            return image_samples(self.data.train)
        denoiser = self.source.denoiser
        rng = torch.Generator(next(denoiser.parameters()).device).manual_seed(self.seed + 2)
        return teacher_samples(self.guided, denoiser.data_shape, n, rng, steps, self.conditions)

    @cached_property
    def reference(self) -> Reference | None:
        """What pictures are compared with; None without data or features."""
        return None if self.data is None or self.features is None else build_reference(self.data, self.features)

    def metrics(self, objective: Objective) -> Evaluate | None:
        """Pictures of the averaged student against the data."""
        if self.data is None or self.features is None:
            return None

        def measure(average: Student) -> dict[str, float]:
            return self._measured(average, self.training.eval_samples, self.seed + 1, copies=False)

        return measure

    def _measured(self, student: Student, n: int, seed: int, copies: bool = True) -> dict[str, float]:
        if self.reference is None:
            return {}
        labels = labels_like(self.data, n, student.classes)
        return measured(draw(student, n, seed, labels), self.reference, labels, copies=copies)

    def finish(self, student: Student, objective: Objective) -> Finished:
        """Pictures beside the teacher's from the same noise and the nearest of the data, metrics and costs."""
        n, seed = self.training.eval_samples, self.seed + 1
        pictures = draw(student, SHOWN, seed, even_labels(SHOWN, student.classes))
        samples = {"samples": pictures, "teacher": teachers_pictures(student, self.guided, SHOWN, seed)}
        if self.data is not None:
            samples["nearest"] = nearest_pictures(pictures, self.data.train)
        table = self._measured(student, n, seed) | costs(student, self.guided) | {"samples": n}
        return Finished(samples, table)

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Metrics of n pictures against the data, and costs."""
        if self.data is None or self.features is None:
            reason = "the run has no pictures" if self.data is None else unmeasured(self.data)
            raise UsageError(f"there is nothing to measure the run's pictures against: {reason}")
        return self._measured(student, n, seed) | costs(student, self.guided) | {"samples": n}

    def beside(self) -> dict[str, dict[str, float]]:
        """The teacher's own metrics by the steps of its sampler, and those of held-out data."""
        folder = self.source.classifier.parent if self.source.classifier is not None else Path(self.config.teacher)
        return teachers_columns(folder / "evaluation.json")

    def load_student(self, path: Path) -> Student:
        """A saved student of pictures."""
        return load_student(path, NetworkStudent)


def teachers_columns(path: Path) -> dict[str, dict[str, float]]:
    """The numbers of a teacher's evaluation by column; nothing of a file that is missing or of another kind."""
    try:
        columns = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    columns = {name: v for name, v in columns.items() if isinstance(v, dict)} if isinstance(columns, dict) else {}
    numbers = {
        name: {key: v for key, v in column.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name, column in columns.items()
    }
    return {f"teacher, {name}" if name.endswith("steps") else name: column for name, column in numbers.items()}


def numbered_as(data: ImageData, teacher: Teacher) -> ImageData:
    """The data with the teacher's numbers of their classes, as far as it tells its own.

    A teacher of a run knows its classes by name. For any other one, classes whose names are numbers are its labels, and
    all others are numbered as they are.

    Raises:
        UsageError: for a class that the teacher does not know.
    """
    own, theirs = data.class_names, teacher.class_names
    if theirs:
        new = [name for name in own if name not in theirs]
        if new:
            raise UsageError(f"{data.name} has the class '{new[0]}', but the teacher's are {', '.join(theirs)}")
        numbers = [theirs.index(name) for name in own]
    else:
        numbers = [int(name) for name in own if re.fullmatch("[0-9]+", name)]
        if len(set(numbers)) < len(own) or max(numbers, default=0) >= teacher.denoiser.classes:
            return data
        theirs = tuple(map(str, range(teacher.denoiser.classes)))
    return data.renumbered(numbers, theirs[: max(numbers) + 1]) if own else data


@torch.no_grad()
def spread_of(student: Student, step: int = 1, n: int = 16, change: float = 1e-2) -> float:
    """√ of the mean squared singular value of a step's ∂x/∂z, E‖J v‖²/d over v ~ N(0, I), by differences."""
    parameter = next(student.parameters())
    rng = torch.Generator(parameter.device).manual_seed(0)
    z, v = student.latents(n, rng), student.latents(n, rng)
    labels = {"labels": torch.arange(n, device=parameter.device) % student.classes} if student.classes else {}
    up, down = (student(z + sign * change * v, step=step, **labels) for sign in (1, -1))
    return float(((up - down) / (2 * change)).square().mean().sqrt())


def draw(student: Student, n: int, seed: int, labels: Tensor | None) -> Tensor:
    """(n, C, H, W) on the CPU, in blocks."""
    return student.sample(n, seed, block=BLOCK, labels=labels).cpu()


def nearest_pictures(pictures: Tensor, images: Images) -> Tensor:
    """The picture of a set that is nearest to each of these, (n, C, H, W)."""
    found = nearest(pictures.clamp(-1, 1), blocks(images, torch.arange(len(images))))
    return images.take(found.indices[:, 0])


def teachers_pictures(student: Student, teacher: Denoiser, n: int, seed: int) -> Tensor:
    """The teacher's pictures from the student's first n latents and labels, (n, C, H, W) on the CPU."""
    device = next(student.parameters()).device
    z = student.latents(n, torch.Generator(device).manual_seed(seed))
    condition = condition_of(even_labels(n, student.classes), device)
    drawn = [
        sample(teacher, z[part], TEACHER_STEPS, **{name: v[part] for name, v in condition.items()}).cpu()
        for part in torch.arange(n, device=device).split(BLOCK)
    ]
    return torch.cat(drawn)


def in_single(denoiser: DiffusersDenoiser) -> DiffusersDenoiser:
    """The denoiser with weights that can be trained: of single precision, where they are of half."""
    if next(denoiser.parameters()).dtype in HALF:
        nn.Module.float(denoiser.network)  # diffusers' own warns
    return denoiser


def condition_of(labels: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Labels as the condition of that name; nothing for None."""
    return {} if labels is None else {"labels": labels.to(device)}


@torch.no_grad()
def costs(student: Student, teacher: Denoiser, n: int = TIMED) -> dict[str, float]:
    """Network evaluations and wall-clock seconds per picture, student and teacher in turn, in batches of n."""
    device = next(student.parameters()).device
    rng = torch.Generator(device).manual_seed(0)
    z, renoise = student.latents(n, rng), student.renoise(n, rng)
    condition = condition_of(even_labels(n, student.classes), device)
    own = seconds(lambda: student(z, renoise, **condition), device)
    teachers = seconds(lambda: sample(teacher, z, TEACHER_STEPS, **condition), device)
    return {
        "evaluations": float(student.steps),
        "seconds_per_image": own / n,
        "teacher_seconds_per_image": teachers / n,
        "teacher_evaluations": float(2 * TEACHER_STEPS - 1),
        "speedup": teachers / own,
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least of three timings of a call, after one to warm up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
