"""A whole experiment: from a configuration to a run folder with its student, metrics, figures and report.

Beside what every run keeps (`training.folder`):

    teacher/, classifier/   what was fitted on the way
    samples.npz             the student's samples (`samples`) and, of pictures, the teacher's from the same noise
                            (`teacher`) and the nearest of the data (`nearest`)
    samples.png             some of them
    evaluation.json         the student's metrics and costs
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vardistill.devices import find_device
from vardistill.domains.base import Domain, Finished, Measures
from vardistill.domains.own import load_own
from vardistill.domains.pictures.parts import Pictures
from vardistill.domains.points.config import PointsConfig
from vardistill.domains.points.parts import Points
from vardistill.domains.text.config import TextConfig
from vardistill.domains.text.parts import Text
from vardistill.errors import UsageError
from vardistill.files import typed, whole, write_whole
from vardistill.objectives import Objective
from vardistill.objectives.base import RealConfig
from vardistill.objectives.registry import singles, takes_teacher
from vardistill.processes import join, launched, on_main
from vardistill.progress import phase, say
from vardistill.reports.card import objective_name, write_card
from vardistill.reports.page import write_report
from vardistill.reports.samples import save_samples
from vardistill.runs.config import Config
from vardistill.runs.own import opened
from vardistill.students import Student
from vardistill.training import config_files
from vardistill.training.checks import check_networks, check_settings, check_tracker
from vardistill.training.clock import length
from vardistill.training.data import Samples, check_samples
from vardistill.training.folder import RunFolder, create, open_run
from vardistill.training.loop import Run, Trainer


def run_experiment(config: Config, out: Path, resume: bool = False) -> RunFolder:
    """Train what `config` says in the run folder `out` and leave samples, metrics, figures and a report there.

    Raises:
        UsageError: for a teacher, data, a folder or a configuration that cannot be used.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    with phase("checking the settings", kept=False):
        kept, config = config, opened(config)
        domain = build_domain(config)
        check(config, domain)
    join(config.training.device)
    folder = RunFolder(out)
    with ExitStack() as held:
        on_main(lambda: prepare(kept, domain, folder, resume, held))
        with phase("setting up"):
            domain.load(folder)
            objective: Objective = config.objective.build(domain)
            levels = config.levels.build(domain.schedule, domain.data_std)
            trainer = Trainer(
                domain.student,
                objective,
                levels,
                config.training,
                domain.metrics(objective),
                folder,
                real_samples(config, domain, objective),
                domain.conditions,
            )
        if resume and any(folder.checkpoints.glob("step-*")):
            trainer.restore()
            on_main(lambda: lengthen(kept, folder))
        run = trainer.run()
        on_main(lambda: finish(domain, folder, run, objective))
    return folder


def build_domain(config: Config) -> Domain:
    """The domain of a run, with its data; its parts come with `Domain.load`."""
    domain, training, teacher = config.domain, config.training, takes_teacher(config.objective)
    if isinstance(domain, PointsConfig):
        return Points(domain, training, teacher)
    if isinstance(domain, TextConfig):
        return Text(domain, training, teacher)
    return Pictures(domain, training, teacher)


def load_domain(config: Config, folder: RunFolder) -> Domain:
    """The domain of a finished run with its parts, on whatever device this machine has."""
    here = replace(config, training=replace(config.training, device="auto"))
    domain = build_domain(here)
    domain.load(folder)
    return domain


def check(config: Config, domain: Domain) -> None:
    """Raise the UsageError that the run would end with, before a folder is made or anything is fitted."""
    find_device(config.training.device)
    domain.load(None)
    domain.check()
    objective: Objective = config.objective.build(domain)
    levels = config.levels.build(domain.schedule, domain.data_std)
    check_settings(domain.student, objective, levels, config.training, domain.conditions, launched())
    check_networks(domain.student, objective, domain.conditions)
    check_tracker(config.training)
    source = real_source(config, objective)
    if source is not None and source.real == "data":
        like = next(domain.student.parameters())
        data = domain.real("data", source.real_samples, source.real_steps)
        check_samples(data, domain.student.data_shape, like.device, domain.conditions)


def prepare(config: Config, domain: Domain, folder: RunFolder, resume: bool, held: ExitStack) -> None:
    """Make the run's folder or open the one to resume, hold it as long as `held`, and fit what the run lacks."""
    if resume:
        open_run(folder.path)
        held.enter_context(folder.held())
        if not any(folder.checkpoints.glob("step-*")):
            folder.rewind(0)  # killed before its first checkpoint: it starts anew
    else:
        create(folder.path)
        held.enter_context(folder.held())
        config_files.write(config, folder.config)
    say(
        f"distils  {config.domain.labels[1]} (teacher: {config.domain.labels[0]}) into {domain.student.steps} network "
        f"evaluation{'s' if domain.student.steps > 1 else ''} a sample",
        f"by       {objective_name(config_files.to_dict(config)['objective'])}, seed {config.training.seed}",
        f"for      {length(config.training)}",
        f"in       {folder.path}",
    )
    domain.prepare(folder)


def lengthen(config: Config, folder: RunFolder) -> None:
    """Keep the configuration of a run that goes on for longer; what was measured at its former end goes."""
    if config != config_files.read(Config, folder.config):
        config_files.write(config, folder.config)
        (folder.path / "evaluation.json").unlink(missing_ok=True)


def real_source(config: Config, objective: Objective) -> RealConfig | None:
    """Where an objective that needs real samples has them from; None for the others."""
    if not any(update.needs.real for update in objective.updates()):
        return None
    said = [single for single in singles(config.objective) if isinstance(single, RealConfig)]
    if len({(one.real, one.real_samples, one.real_steps) for one in said}) > 1:
        raise UsageError(
            "a sum's parts compare with the same real samples: let real, real_samples and real_steps agree"
        )
    return said[0] if said else RealConfig("teacher" if takes_teacher(config.objective) else "data")


def real_samples(config: Config, domain: Domain, objective: Objective) -> Samples | None:
    """The real samples of an objective that needs them; None for the others."""
    source = real_source(config, objective)
    return None if source is None else domain.real(source.real, source.real_samples, source.real_steps)


def finish(domain: Measures, folder: RunFolder, run: Run, objective: Objective) -> None:
    """Write what a reader of the run looks at."""
    with phase("measuring the result"):
        finished: Finished = domain.finish(run.generator, objective)
    with phase("writing samples and the report"):
        write(domain, folder, finished)


def write(domain: Measures, folder: RunFolder, finished: Finished) -> None:
    """Keep samples, tables, report and card."""
    arrays = {name: v.numpy() for name, v in finished.samples.items()}
    if arrays:
        with whole(folder.path / "samples.npz") as partial:
            np.savez_compressed(partial, allow_pickle=False, **arrays)
        save_samples(finished.samples, domain.problem, folder.path / "samples.png")
    for name, table in finished.extras.items():
        write_whole(folder.path / name, json.dumps(table, indent=2))
    write_report(folder, domain.problem, finished.table)
    write_card(folder)
    keep_evaluation(folder, finished.table)  # the last: a run that has it is finished


def keep_evaluation(folder: RunFolder, table: Any) -> None:
    """Keep a table of metrics as the run's."""
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))


def load_run(path: Path) -> tuple[RunFolder, Config | None, Student]:
    """A finished run: its folder, its configuration, which one that was made in Python lacks, and its student.

    Raises:
        UsageError: where `path` is no run, the run is not finished, or its student is not one.
    """
    folder = open_run(path)
    config: Config | None = config_files.read(Config, folder.config) if folder.config.is_file() else None
    if not folder.generator.is_dir():
        remedy = f"`vardistill train --resume {typed(path)}`" if config else "vd.distill(..., resume=True)"
        raise UsageError(f"{path} has no finished generator yet: go on with {remedy}")
    if config is None:
        return folder, None, load_own(folder).student
    return folder, config, build_domain(config).load_student(folder.generator)


def evaluate_run(path: Path, n: int, seed: int) -> tuple[dict[str, Any], Measures]:
    """Measure a finished run's student anew and return the table, kept as `evaluation.json` where that can be written.

    Raises:
        UsageError: where the run cannot be used, or has nothing to measure against.
    """
    folder, config, student = load_run(path)
    domain = load_own(folder) if config is None else load_domain(config, folder)
    table = domain.evaluate(student.to(find_device("auto")), n, seed)
    try:
        keep_evaluation(folder, table)
    except UsageError as error:  # a run of others, say: the numbers are there all the same
        say(f"vardistill: {error}: the numbers are told, but not kept")
    return table, domain
