"""A whole run on pictures: from a configuration to a folder with its student, metrics, pictures and report.

Beside what every run keeps (`runs`):

classifier/     fitted to the data's labels, where the teacher brings none
samples.npz     the student's pictures (`samples`), the teacher's from the same noise (`teacher`) and the nearest of the
                data (`nearest`)
samples.png     some of both
evaluation.json the student's metrics, and what a picture costs it and the teacher
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from vardistill.devices import find_device
from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.samplers import sample
from vardistill.domains.pictures.build import (
    Setting,
    build_conditions,
    build_guided,
    build_levels,
    build_objective,
    build_pictures,
    build_real_samples,
    build_setting,
    build_student,
    varflow_of,
)
from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.config import ImagesConfig
from vardistill.domains.pictures.data import Images
from vardistill.domains.pictures.evaluate import Reference, blocks, build_reference, labels_like, measured
from vardistill.domains.pictures.evaluate import even_labels as even_labels
from vardistill.domains.pictures.features import ClassifierFeatures, Features, load_features
from vardistill.domains.pictures.teach import check_measurable, has_classes, kept_classifier
from vardistill.errors import UsageError
from vardistill.metrics.memorisation import nearest
from vardistill.processes import alone, launched, several_on_cpu
from vardistill.reports.card import write_card
from vardistill.reports.contents import BESIDE
from vardistill.reports.page import write_report
from vardistill.reports.pictures import save_grids
from vardistill.runs.experiment import device_of, load_generator, prepare_folder
from vardistill.students.network import NetworkStudent
from vardistill.students.student import Student
from vardistill.training import config_files
from vardistill.training.checks import check_settings, check_tracker
from vardistill.training.data import check_samples
from vardistill.training.folder import RunFolder, open_run, write_whole
from vardistill.training.loop import Evaluate, Run, Trainer

TEACHER_STEPS = 18
"""Of Heun's method, for the teacher's pictures beside the student's: EDM's number for small pictures."""

SHOWN = 100
"""Pictures beside the teacher's."""

BLOCK = 64
"""Pictures that are drawn at once: as many as fit into a processor's memory."""

TIMED = 64
"""Pictures that are timed together."""


def run_images(config: ImagesConfig, out: Path, resume: bool = False) -> RunFolder:
    """Train what `config` says in the run folder `out` and leave pictures, metrics and a report there.

    Raises:
        UsageError: for a teacher, data, a folder or a configuration that cannot be used.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    setting = build_setting(config)
    check(setting)
    processes = PartialState(cpu=several_on_cpu(config.training.device))
    with processes.main_process_first():
        folder = prepare_folder(config, out, resume)
        features = build_features(setting, folder)
    teacher, conditions = build_guided(setting), build_conditions(setting)
    student, levels = build_student(setting), build_levels(setting)
    objective = build_objective(setting, teacher, features, student)
    device = find_device(config.training.device, processes.device)
    setting.teacher.denoiser.to(device)  # it may draw samples
    data = build_real_samples(setting, teacher, conditions)
    reference = None if setting.data is None or features is None else build_reference(setting.data, features.to(device))
    metrics = None if reference is None else image_metrics(reference, config)
    trainer = Trainer(student, objective, levels, config.training, metrics, folder, data, conditions)
    run = trainer.run(resume and any(folder.checkpoints.glob("step-*")))
    if trainer.accelerator.is_main_process:
        with alone():
            finish(setting, teacher, folder, run, reference)
    trainer.accelerator.wait_for_everyone()
    return folder


def check(setting: Setting) -> None:
    """Raise the UsageError that the run would end with, before a folder is made or a classifier fitted."""
    training, data, features = setting.config.training, setting.data, ready_features(setting)
    if data is not None:
        if features is None and has_classes(data):
            features = ClassifierFeatures(Classifier(data.shape, data.class_names))  # in the place of one to be fitted
        if features is not None:
            check_measurable(data, training.eval_samples)
            features(data.train.take(torch.arange(1)))
    student, levels, conditions = build_student(setting), build_levels(setting), build_conditions(setting)
    objective = build_objective(setting, build_guided(setting), features, student)
    check_settings(student, objective, levels, training, conditions, launched())
    check_tracker(training)
    if (varflow := varflow_of(setting.config)) is not None and varflow.real == "data":
        check_samples(build_pictures(setting), student.data_shape, torch.device("cpu"), conditions)
    find_device(training.device)


def ready_features(setting: Setting) -> Features | None:
    """What the run names to measure pictures with, or the teacher's classifier; None for neither."""
    source = setting.config.features or setting.teacher.classifier
    return None if source is None else load_features(source)


def build_features(setting: Setting, folder: RunFolder) -> Features | None:
    """`ready_features`, else a classifier fitted to the data and kept in the folder; None without labels."""
    features = ready_features(setting)
    if features is not None or setting.data is None or not has_classes(setting.data):
        return features
    kept_classifier(setting.data, folder.path / "classifier", setting.config.training.seed)
    return load_features(folder.path / "classifier")


def load_image_run(path: Path) -> tuple[RunFolder, ImagesConfig, NetworkStudent]:
    """A finished run on pictures: its folder, configuration and student.

    Raises:
        UsageError: where `path` is no such run, the run is not finished, or its student is not one.
    """
    folder = open_run(path)
    config: ImagesConfig = config_files.read(ImagesConfig, folder.config)
    if not folder.generator.is_dir():
        raise UsageError(f"{path} has no finished generator yet: go on with `vardistill train --resume {path}`")
    student = load_generator(folder.generator, NetworkStudent)
    return folder, config, student


def evaluate_run(path: Path, n: int, seed: int) -> tuple[dict[str, float], ImagesConfig]:
    """Measure a finished run's student anew, keep the table as `evaluation.json` and return it.

    Raises:
        UsageError: where the run cannot be used, or has no data to measure against.
    """
    folder, config, student = load_image_run(path)
    setting = build_setting(config)
    features = build_features(setting, folder)
    if setting.data is None or features is None:
        raise UsageError(f"{path} was trained without labelled pictures: there is nothing to measure its own against")
    labels = labels_like(setting.data, n, student.classes)
    table = measured(draw(student, n, seed, labels), build_reference(setting.data, features), labels)
    table |= costs(student, build_guided(setting)) | {"samples": n}
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))
    return table, config


def image_metrics(reference: Reference, config: ImagesConfig) -> Evaluate:
    """What a run measures as it goes, of the averaged student."""

    def measure(average: Student) -> dict[str, float]:
        n, seed = config.training.eval_samples, config.training.seed + 1
        labels = labels_like(reference.data, n, average.classes)
        return measured(draw(average, n, seed, labels), reference, labels, copies=False)

    return measure


def draw(student: Student, n: int, seed: int, labels: Tensor | None) -> Tensor:
    """(n, C, H, W) on the CPU, in blocks."""
    return student.sample(n, seed, block=BLOCK, labels=labels).cpu()


def finish(setting: Setting, teacher: Denoiser, folder: RunFolder, run: Run, reference: Reference | None) -> None:
    """Write what a reader of the run looks at."""
    student, training = run.generator, setting.config.training
    assert isinstance(student, NetworkStudent)
    n, seed = training.eval_samples, training.seed + 1
    pictures = draw(student, SHOWN, seed, even_labels(SHOWN, student.classes))
    beside: dict[str, Any] = {"teacher": teachers_pictures(student, teacher, SHOWN, seed)}
    if setting.data is not None:
        beside["nearest"] = nearest_pictures(pictures, setting.data.train)
    arrays = {name: v.numpy() for name, v in {"samples": pictures, **beside}.items()}
    np.savez_compressed(folder.path / "samples.npz", **arrays)
    grids = {"Student": pictures, **{BESIDE[name]: v for name, v in beside.items()}}
    save_grids(grids, folder.path / "samples.png")
    labels = labels_like(setting.data, n, student.classes)
    table = {} if reference is None else measured(draw(student, n, seed, labels), reference, labels)
    table |= costs(student, teacher) | {"samples": n}
    write_report(folder, evaluation=table)
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))
    write_card(folder)


def nearest_pictures(pictures: Tensor, images: Images) -> Tensor:
    """The picture of a set that is nearest to each of these, (n, C, H, W)."""
    found = nearest(pictures.clamp(-1, 1), blocks(images, torch.arange(len(images))))
    return images.take(found.indices[:, 0])


def teachers_pictures(student: NetworkStudent, teacher: Denoiser, n: int, seed: int) -> Tensor:
    """The teacher's pictures from the student's first n latents and labels, (n, C, H, W) on the CPU."""
    device = device_of(student)
    z = student.latents(n, torch.Generator(device).manual_seed(seed))
    condition = condition_of(even_labels(n, student.classes), device)
    drawn = [
        sample(teacher, z[part], TEACHER_STEPS, **{name: v[part] for name, v in condition.items()}).cpu()
        for part in torch.arange(n, device=device).split(BLOCK)
    ]
    return torch.cat(drawn)


def condition_of(labels: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Labels as the condition of that name; nothing for None."""
    return {} if labels is None else {"labels": labels.to(device)}


@torch.no_grad()
def costs(student: NetworkStudent, teacher: Denoiser) -> dict[str, float]:
    """Network evaluations and wall-clock seconds per picture, student and teacher in turn, in batches of `TIMED`."""
    device = device_of(student)
    z = student.latents(TIMED, torch.Generator(device).manual_seed(0))
    condition = condition_of(even_labels(TIMED, student.classes), device)
    own = seconds(lambda: student(z, **condition), device)
    teachers = seconds(lambda: sample(teacher, z, TEACHER_STEPS, **condition), device)
    evaluations = 2 * TEACHER_STEPS - 1
    return {
        "seconds_per_image": own / TIMED,
        "teacher_seconds_per_image": teachers / TIMED,
        "teacher_evaluations": float(evaluations),
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
