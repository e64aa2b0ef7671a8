"""Classifier-free guidance: its formula, its special scales, and what it passes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_dit
from vardistill.denoisers import DiffusersDenoiser, Guided, from_module
from vardistill.diffusion import Denoiser, from_x, score
from vardistill.diffusion.schedules import VP
from vardistill.errors import UsageError


class Labelled(nn.Module):
    """x_t ↦ tanh(x_t + label + shift), and it counts the rows of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, shift: Tensor | None = None) -> Tensor:
        self.rows.append(len(x_t))
        return (x_t + labels[:, None] + (0 if shift is None else shift)).tanh() * (1 + t[:, None])


@pytest.fixture
def inputs(rng: torch.Generator, float64: None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 3, generator=rng), torch.linspace(0.1, 0.9, 5), torch.arange(5) % 3


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 2.0, 7.5])
def test_formula_in_one_evaluation(inputs: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    x_t, t, labels = inputs
    network = Labelled()
    teacher = from_module(network, VP())
    guided = Guided(teacher, scale, {"labels": 3})(x_t, t, labels=labels)
    assert network.rows == [10]
    conditional, unconditional = teacher(x_t, t, labels=labels), teacher(x_t, t, labels=torch.full_like(labels, 3))
    torch.testing.assert_close(guided, (1 - scale) * unconditional + scale * conditional)


def test_scale_one_is_no_guidance(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """To the bit, and without evaluating the rest."""
    x_t, t, labels = inputs
    network = Labelled()
    teacher = from_module(network, VP(), "epsilon")
    assert torch.equal(Guided(teacher, 1.0, {"labels": 3})(x_t, t, labels=labels), teacher(x_t, t, labels=labels))
    assert network.rows == [5, 5]


@pytest.mark.parametrize("predicts", ["epsilon", "v", "score"])
def test_every_parametrisation_is_guided_alike(inputs: tuple[Tensor, Tensor, Tensor], predicts: str) -> None:
    """(1 + w') ε_c − w' ε_∅ with w' = w − 1, the paper's eq. 6; the same of v and of the score."""
    x_t, t, labels = inputs
    teacher = from_module(Labelled(), VP(), predicts)
    guided = Guided(teacher, 3.0, {"labels": 3})(x_t, t, labels=labels)
    alpha, sigma = (scale[:, None] for scale in VP()(t))
    conditional, unconditional = Labelled()(x_t, t, labels), Labelled()(x_t, t, torch.full_like(labels, 3))
    torch.testing.assert_close(from_x(predicts)(guided, x_t, alpha, sigma), 3 * conditional - 2 * unconditional)


def test_tensors_as_null_and_conditions_that_stay(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A null row broadcasts; a condition that `null` does not name goes to both evaluations."""
    x_t, t, labels = inputs
    teacher, shift = from_module(Labelled(), VP()), torch.linspace(-1, 1, 15).view(5, 3)
    null = torch.tensor([3.0, -1.0, 0.0])
    guided = Guided(teacher, 2.0, {"shift": null})(x_t, t, labels=labels, shift=shift)
    without = teacher(x_t, t, labels=labels, shift=null.expand(5, 3))
    torch.testing.assert_close(guided, 2 * teacher(x_t, t, labels=labels, shift=shift) - without)


def test_passes_on_what_the_teacher_is(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    import diffusers

    teacher = DiffusersDenoiser(tiny_dit(classes=3), diffusers.DDIMScheduler())
    guided = Guided(teacher, 2.0, {"labels": 3})
    assert isinstance(guided, Denoiser)
    assert (guided.schedule, guided.data_shape, guided.classes) == (teacher.schedule, (2, 8, 8), 3)
    assert set(guided.parameters()) == set(teacher.parameters())
    plain = Guided(from_module(Labelled(), VP()), 2.0, {"labels": 3})
    assert (plain.data_shape, plain.classes) == (None, 0)
    x_t, t, labels = inputs
    assert score(plain, x_t, t, labels=labels).shape == x_t.shape


def test_refuses() -> None:
    teacher = from_module(Labelled(), VP())
    with pytest.raises(UsageError, match="finite number"):
        Guided(teacher, float("nan"), {"labels": 3})
    with pytest.raises(UsageError, match="what stands for no condition"):
        Guided(teacher, 2.0, {})
    with pytest.raises(UsageError, match="needs labels as a keyword"):
        Guided(teacher, 2.0, {"labels": 3})(torch.zeros(2, 3), torch.ones(2))
