"""Inputs of `distill` that would train on something else in silence, told in one line at the door."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vardistill as vd
from small_runs import config

VP = vd.schedules.VP()


def exact(x_t: Tensor, t: Tensor) -> Tensor:
    """ε of N(0, I)."""
    return VP(t[:, None])[1] * x_t


STILL = vd.denoisers.from_module(exact, VP, predicts="epsilon")
"""E[x | x_t] of N(0, I)."""


class Reversed:
    """A schedule whose inverse is another schedule's."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return VP(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


class Embedded(nn.Module):
    """Its time is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, 2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + self.time(t)


def of_thousand(x_t: Tensor, time: Tensor) -> Tensor:
    """ε by a time in 0 … 999."""
    return exact(x_t, (time / 999).clamp(0, 1)) * (1 + 30 * (time < 2)[:, None])


def distil(network: Any = exact, schedule: Any = VP, **given: Any) -> vd.Run:
    teacher = vd.denoisers.from_module(network, schedule, predicts="epsilon")
    torch.manual_seed(0)
    student = vd.students.MLP(latent=2, data=2, depth=1, width=8, data_std=1.0)
    given = given or {"teacher": teacher}
    return vd.distill(student, training=config(steps=1), **given)


@pytest.mark.parametrize(
    ("network", "schedule", "words"),
    [
        (
            lambda x, t: exact(x, t)[:, :1],
            VP,
            r"must return floats of the shape of x_t, \(2, 2\), but returns \(2, 1\)",
        ),
        (lambda x, t: (exact(x, t),), VP, "but returns tuple"),
        (lambda x, t: SimpleNamespace(sample=exact(x, t)), VP, "return its .sample"),
        (exact, "vp", "schedule"),
        (exact, Reversed(), "inverse|time"),
        (Embedded(), VP, "round"),
        (Embedded, VP, "is the class Embedded"),
    ],
    ids=["one column", "a tuple", "an output object", "a name", "a wrong inverse", "an embedding", "a class"],
)
def test_a_teacher_that_is_none_is_refused(network: Any, schedule: Any, words: str) -> None:
    with pytest.raises(vd.UsageError, match=words) as refused:
        distil(network, schedule)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [np.zeros((8, 2), dtype=np.float32), torch.utils.data.TensorDataset(torch.randn(8, 2)), [[0.0, 1.0]]],
    ids=["an array", "a data set", "a list"],
)
def test_data_that_are_no_tensor_are_refused(data: Any) -> None:
    with pytest.raises(vd.UsageError, match="tensor") as refused:
        distil(objective=vd.objectives.VarFlow(), data=data)
    assert "\n" not in str(refused.value)


def test_a_forgotten_time_is_doubted(capsys: pytest.CaptureFixture[str]) -> None:
    distil(of_thousand)
    assert "time= (which a network of 1000 steps needs)" in capsys.readouterr().err
    distil()
    assert "worse than their mean" not in capsys.readouterr().err


def test_data_in_other_units_are_doubted(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = 255 * torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    distil(objective=vd.objectives.VarFlow(), data=pixels)
    assert "are they in its units?" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_notebook_without_gradients_trains(mode: Any) -> None:
    torch.manual_seed(0)
    student = vd.students.MLP(latent=2, data=2, depth=1, width=8, data_std=1.0)
    before = student.state_dict()["layers.0.weight"].clone()
    teacher = vd.denoisers.from_module(exact, VP, predicts="epsilon")
    with mode():
        vd.distill(student, teacher=teacher, training=config(steps=2))
    assert not torch.equal(before, student.state_dict()["layers.0.weight"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"evaluate": 3}, "evaluate must be a function of the student, but is 3"),
        (
            {"evaluate": lambda student: None},
            "what evaluate returns must be a mapping of names to numbers, but is None",
        ),
        ({"evaluate": lambda student: [1.0]}, "must be a mapping of names to numbers, but is list"),
        ({"evaluate": lambda student: {"fd": "low"}}, "mapping of names to numbers, but fd is str"),
        ({"evaluate": lambda student: {"fd": torch.ones(3)}}, "mapping of names to numbers, but fd is Tensor"),
        ({"evaluate": lambda student: {3: 1.0}}, "with a text for each name, but is 3"),
        ({"out": 3}, "out must be a path, but is 3"),
        ({"out": "a\0b"}, "out must be a path, but is a"),
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_what_a_run_is_told_of_its_user(given: Any, words: str, kept: bool, tmp_path: Any) -> None:
    place = {"out": tmp_path / "run"} if kept else {}
    with pytest.raises(vd.UsageError) as refused:
        distil(**{"teacher": STILL} | place | given)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_numbers_of_any_library_are_metrics() -> None:
    values = {"a": torch.tensor(3.0), "b": np.float32(2), "c": 1}
    run = distil(teacher=STILL, evaluate=lambda student: values)
    *_, last = (line for line in run.history if line["kind"] == "eval")
    assert {name: last[name] for name in values} == {"a": 3.0, "b": 2.0, "c": 1.0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: distil(objective=vd.objectives.SDS(None)), "the teacher must be a denoiser"),
        (lambda: distil(objective=vd.objectives.VarDiU(None, None)), "the teacher must be a denoiser"),
        (lambda: distil(teacher=STILL, levels="edm"), "levels must be vardistill.NoiseLevels"),
        (lambda: distil(teacher=STILL, levels=vd.levels.EDM()), "levels must be vardistill.NoiseLevels"),
        (lambda: distil(teacher=STILL, levels=vd.NoiseLevels), "levels must be vardistill.NoiseLevels"),
        (lambda: vd.TrainingConfig(networks="critic(lr=1)"), "networks must be a tuple of NetworkConfig"),
        (lambda: vd.TrainingConfig(networks=("critic(lr=1)",)), "networks must be a tuple of NetworkConfig"),
        (lambda: vd.TrainingConfig(lr=torch.tensor(1e-3)), "lr must be a number, but is"),
        (lambda: vd.TrainingConfig(ema="0.9"), "ema must be a number, but is 0.9"),
        (lambda: vd.denoisers.from_diffusers((1,)), "a tuple must be a network and its scheduler"),
        (lambda: vd.NetworkStudent.from_teacher(STILL), "but the teacher is FromModule: vardistill.students.from_teac"),
        (lambda: vd.NetworkStudent.from_teacher(None), "but the teacher is NoneType"),
        (lambda: vd.students.MLP.from_pretrained(None), "a network's source must be a folder or a hub id"),
    ],
)
def test_parts_of_another_kind_are_named(wrong: Any, words: str) -> None:
    with pytest.raises(vd.UsageError) as refused:
        wrong()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
