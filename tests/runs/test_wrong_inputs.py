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
