"""Every objective and a sum of them, in every domain, with students of one step and of two.

Ten steps are finite, every parameter that an update trains has a gradient and no other moves, and a run that was
stopped ends as one that was not, to the bit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vardistill.diffusion.config import LevelsConfig
from vardistill.domains.pictures.config import NetworkStudentConfig, PicturesConfig
from vardistill.domains.points.config import PerceptronConfig, PointsConfig, TeacherConfig
from vardistill.objectives import (
    ADDConfig,
    ADMConfig,
    EMDConfig,
    LADDConfig,
    MomentMatchingConfig,
    Objective,
    SiDAConfig,
    SMDConfig,
    SMTConfig,
    Update,
)
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.dmd import DMDConfig
from vardistill.objectives.dmd2 import DMD2Config
from vardistill.objectives.f_distill import FDistillConfig
from vardistill.objectives.registry import OBJECTIVES, PartConfig, SumConfig
from vardistill.objectives.sid import SiDConfig
from vardistill.objectives.sim import SiMConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, real_samples
from vardistill.training.config import TrainingConfig
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Trainer

STEPS = 10

CRITIC: dict[str, Any] = {"critic_steps": 2, "critic_width": 8, "critic_depth": 2}

SMALL: dict[str, Any] = {
    "vardiu": VarDiUConfig(posterior="diagonal", posterior_steps=2, posterior_width=8, posterior_depth=2),
    "varflow": VarFlowConfig(real="data"),
    "diff-instruct": DiffInstructConfig(**CRITIC),
    "dmd": DMDConfig(**CRITIC),
    "dmd2": DMD2Config(real="data", **CRITIC),
    "f-distill": FDistillConfig(real="data", **CRITIC),
    "sid": SiDConfig(**CRITIC),
    "sim": SiMConfig(**CRITIC),
    "smd": SMDConfig(real="data", **CRITIC),
    "smt": SMTConfig(real="data", **CRITIC),
    "sida": SiDAConfig(real="data", **CRITIC),
    "moment-matching": MomentMatchingConfig(**CRITIC),
    "emd": EMDConfig(chain_length=2, latent_step=0.0, **CRITIC),
    "ladd": LADDConfig(real="data"),
    "add": ADDConfig(real="data"),
    "adm": ADMConfig(**CRITIC),
}
"""Every objective with networks of its own, small."""

OBJECTIVE = {name: SMALL.get(name, kind()) for name, kind in OBJECTIVES.items()}
OBJECTIVE["sum"] = SumConfig(
    (
        PartConfig(SMALL["vardiu"]),
        PartConfig(SMALL["diff-instruct"], 0.5),
        PartConfig(SMALL["varflow"], 2.0, 1.0, LevelsConfig(weight="one", shared=4)),
    )
)

TRAINING = TrainingConfig(
    steps=STEPS,
    batch=8,
    log_every=5,
    eval_every=0,
    checkpoint_every=5,
    max_skipped=0,
    eval_samples=12,
    warmup=0.0,
    device="cpu",
    tracker="none",
)

OF_NETWORKS = ("ladd", "add", "adm")
"""Objectives whose discriminator sees a learned teacher's features."""

LONG = {(name, "pictures") for name in OBJECTIVE if name not in ("vardiu", "varflow", "sds")}

OF_EACH_KIND = ("vardiu", "varflow", "diff-instruct", "dmd2", "smt", "sid", "ladd", "sum")
"""Objectives of which pictures in two steps, and stopped runs on pictures, stand for their like."""

CASES = [
    (name, domain, steps)
    for name in OBJECTIVE
    for domain in ("points", "pictures")
    for steps in (1, 2)
    if domain == "points" or steps == 1 or name in OF_EACH_KIND
]


def config_of(name: str, domain: str, steps: int, teacher: Path) -> Config:
    student = PerceptronConfig(depth=2, width=8, steps_per_sample=steps)
    of: Any = PointsConfig(student=student, teacher=TeacherConfig("learned" if name in OF_NETWORKS else "true"))
    if domain == "pictures":
        of = PicturesConfig(str(teacher), student=NetworkStudentConfig(steps_per_sample=steps))
    levels = LevelsConfig(shared=4) if name == "varflow" else LevelsConfig()
    return Config(of, OBJECTIVE[name], levels, TRAINING)


def trainer_of(config: Config, folder: Path | None = None) -> Trainer:
    """The trainer of an experiment, without its metrics."""
    domain = build_domain(config)
    domain.load(None)
    objective: Objective = config.objective.build(domain)
    levels = config.levels.build(domain.schedule, domain.data_std)
    run = None if folder is None else RunFolder(folder)
    real = real_samples(config, domain, objective)
    return Trainer(domain.student, objective, levels, config.training, None, run, real, domain.conditions)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """Of everything there is: student, networks, teacher and what else is frozen."""
    modules = {**trainer.networks, "teacher": trainer.objective.teacher}
    modules |= {f"frozen {i}": module for i, module in enumerate(trainer.objective.frozen)}
    return {
        f"{name}/{key}": v.clone()
        for name, module in modules.items()
        if isinstance(module, nn.Module)
        for key, v in module.state_dict().items()
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_list_says_what_a_step_costs(name: str, tmp_path: Path) -> None:
    """A sample of the student for every update, and what the update itself evaluates."""
    config = config_of(name, "points", 1, tmp_path)
    domain = build_domain(config)
    domain.load(None)
    updates = OBJECTIVES[name]().build(domain).updates()
    assert OBJECTIVES[name].cost == sum(u.repeats * (1 + u.evaluations(latents=1, draws=1)) for u in updates)


@pytest.mark.parametrize(("name", "domain", "steps"), CASES)
def test_updates_train_what_they_name_and_nothing_else(
    name: str, domain: str, steps: int, teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config_of(name, domain, steps, teacher_run))
    before, reached = weights(trainer), dict.fromkeys(_parameters(trainer), False)
    update = trainer.update

    def watched(one: Update, progress: float, number: int) -> None:
        start = weights(trainer)
        update(one, progress, number)
        moved = {key.partition("/")[0] for key, v in weights(trainer).items() if not torch.equal(v, start[key])}
        assert moved <= set(one.trains)

    backward = trainer.backward

    def kept(one: Update, drawn: Any) -> Tensor:
        loss = backward(one, drawn)
        assert loss.isfinite()
        for key, p in _parameters(trainer).items():
            assert p.grad is None or key.partition("/")[0] in one.trains
            reached[key] |= p.grad is not None and bool((p.grad != 0).any())
        return loss

    monkeypatch.setattr(trainer, "update", watched)
    monkeypatch.setattr(trainer, "backward", kept)
    for i in range(STEPS):
        trainer.advance(i / STEPS)
    assert float(trainer.skipped) == 0
    after = weights(trainer)
    assert all(v.isfinite().all() for v in after.values())
    if name == "adm":  # within a hinge's margin C's constant draws both of its samples alike
        reached.pop("head/layers.2.bias")
    assert all(reached.values()), [key for key, seen in reached.items() if not seen]
    moved = {key.partition("/")[0] for key, v in after.items() if not torch.equal(v, before[key])}
    assert moved == set(trainer.networks)


def _parameters(trainer: Trainer) -> dict[str, nn.Parameter]:
    """What may be trained, by network and name."""
    return {
        f"{name}/{key}": p
        for name, network in trainer.networks.items()
        for key, p in network.named_parameters()
        if any(p is q for q in trainer.trainable[name])
    }


@pytest.mark.parametrize(
    ("name", "domain", "steps"),
    [
        pytest.param(name, domain, steps, marks=[pytest.mark.slow] if (name, domain) in LONG else [])
        for name, domain, steps in CASES
        if domain == "points" or name in OF_EACH_KIND
    ],
)
def test_a_stopped_run_ends_as_an_unbroken_one(
    name: str, domain: str, steps: int, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(name, domain, steps, teacher_run)
    for folder in ("unbroken", "run"):
        (tmp_path / folder).mkdir()
    unbroken = trainer_of(config, tmp_path / "unbroken")
    history = unbroken.run().history
    assert [line["step"] for line in history] == [5, 10]
    assert all(math.isfinite(line["loss"]) for line in history)

    first = trainer_of(config, tmp_path / "run")
    advance = Trainer.advance

    def advance_or_stop(trainer: Trainer, progress: float, head_start: bool = False) -> None:
        if trainer.step == 7:
            raise KeyboardInterrupt
        advance(trainer, progress, head_start)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advance_or_stop)
        with pytest.raises(KeyboardInterrupt):
            first.run()
    second = trainer_of(config, tmp_path / "run")
    lines = second.run(resume=True).history
    ours, theirs = second._tensors(), unbroken._tensors()
    assert ours.keys() == theirs.keys()
    for section, tensors in theirs.items():
        for key, v in tensors.items():
            assert key == "cpu_seconds" or torch.equal(v, ours[section][key]), f"{section}/{key}"
    for line, expected in zip(lines, history, strict=True):
        assert {k: v for k, v in line.items() if "seconds" not in k} == {
            k: v for k, v in expected.items() if "seconds" not in k
        }
