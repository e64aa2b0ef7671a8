"""DMD's regression on stored pairs of the teacher's sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from linear_gaussian import ByLabel, Linear
from one_dimension import S_DATA, critic, draw_of, teacher
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import VE, VP
from vardistill.errors import UsageError
from vardistill.objectives import DMD, DMDConfig
from vardistill.objectives.pairs import LPIPS_SIZE, StoredPairs, check_pairs, lpips, mean_square, teacher_pairs
from vardistill.students.denoising import DenoisingStudent
from vardistill.training.data import Labels

pytestmark = pytest.mark.usefixtures("float64")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_gaussian(n: int = 500) -> StoredPairs:
    return teacher_pairs(teacher(), Linear(torch.ones(1, 1), torch.zeros(1)), n, rng(), steps=64)


def test_pairs_of_a_gaussian_teacher_are_its_flows() -> None:
    """x_0 = x_T √(V_0/V_T): s z, but for the range of the sampler's levels and its steps."""
    pairs = of_gaussian()
    torch.testing.assert_close(pairs.y, S_DATA * pairs.z, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", [VE(), VP()])
def test_they_start_where_the_student_does(schedule: Any) -> None:
    """x_{t_1} = c_1 z, from which the teacher's last step is the student's first where both are one network."""
    exact: Any = GaussianMixture(torch.zeros(1, 2), std=1.0, schedule=schedule)
    denoiser: Any = torch.nn.Module()
    denoiser.schedule, denoiser.forward = schedule, lambda x_t, t: exact(x_t, t)
    student = DenoisingStudent(denoiser, (2,), 1.0, (0.7,))
    pairs = teacher_pairs(exact, student, 20, rng(), steps=1)
    torch.testing.assert_close(pairs.y, student(pairs.z))


def test_the_regression_has_no_gradient_where_the_student_is_the_teachers_map() -> None:
    pairs = StoredPairs(z := torch.linspace(-2, 2, 9)[:, None], S_DATA * z)
    for a, expected in ((S_DATA, 0.0), (0.8, None), (1.9, None)):
        draw, generator = draw_of(a)
        draw = replace(draw, eta=torch.linspace(-2, 2, len(draw.z))[None, :, None])
        both, alone = (DMD(teacher(), critic(a), 1, S_DATA, make) for make in (lambda: pairs, None))
        (g,) = torch.autograd.grad((both.generator_loss(draw) - alone.generator_loss(draw)).sum(), generator.A)
        picked, _ = pairs.pick(draw)
        wanted = 0.25 * 2 * ((a - S_DATA) * picked**2).sum() / S_DATA**2
        torch.testing.assert_close(g.squeeze(), wanted)
        assert expected is None or abs(float(g)) < 1e-12


def test_every_pair_is_drawn_alike_and_of_its_own_label() -> None:
    labels = torch.tensor([0, 1, 1, 0, 1])
    pairs = StoredPairs(torch.arange(5.0)[:, None], 10 * torch.arange(5.0)[:, None], labels)
    draw, _ = draw_of(1.0)
    u = (torch.arange(6) + 0.5) / 6
    draw = replace(draw, z=torch.zeros(12, 1), eta=torch.special.ndtri(u.repeat(2))[None, :, None])
    draw = replace(draw, batch={"labels": torch.arange(12) // 6})
    z, y = pairs.pick(draw)
    assert z.flatten().tolist() == [0, 0, 0, 3, 3, 3, 1, 1, 2, 2, 4, 4]
    torch.testing.assert_close(y, 10 * z)


def test_labels_stay_with_a_conditional_teachers_pairs() -> None:
    both = ByLabel([GaussianMixture(torch.full((1, 2), m), std=0.1, schedule=VE()) for m in (-5.0, 5.0)])
    student = small_runs.labelled_generator()
    pairs = teacher_pairs(both, student, 40, rng(), 8, Labels(torch.ones(2)))
    first = int(pairs.counts[0])
    assert (pairs.y[pairs.order[:first]] < 0).all()
    assert (pairs.y[pairs.order[first:]] > 0).all()
    with pytest.raises(UsageError, match="1 pairs are too few for 2 labels"):
        teacher_pairs(both, student, 1, rng(), 8, Labels(torch.ones(2)))


def test_a_run_with_pairs_trains_and_makes_them_once() -> None:
    made: list[int] = []

    def make() -> StoredPairs:
        made.append(1)
        return teacher_pairs(small_runs.teacher(), small_runs.generator(), 30, rng(), 4)

    own = small_runs.objective("diff-instruct").networks["critic"]
    run = small_runs.small_distill(teacher=None, objective=DMD(small_runs.teacher(), own, 1, 2.0, make))
    assert made == [1]
    assert run.history[-1]["loss"] is not None


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: check_pairs(small_runs.few_steps(2)), "the student has 2: set pairs 0"),
        (lambda: check_pairs(Linear(torch.ones(3, 2), torch.zeros(3))), "latents of the data's shape"),
        (lambda: of_gaussian(0), "pairs must be at least 1"),
        (lambda: of_gaussian(5).pick(draw_of(1.0)[0]), "a further latent"),
        (lambda: DMDConfig(pairs=-1), "pairs must be 0 or positive"),
        (lambda: DMDConfig(pair_weight=0.0), "pair_weight must be positive"),
        (lambda: DMDConfig(pair_steps=0), "pair_steps must be at least 1"),
    ],
)
def test_what_cannot_be_is_told(act: Callable[[], object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        act()


def test_a_feature_space_takes_the_samples_place() -> None:
    x, y = torch.randn(2, 4, 3, generator=rng())
    torch.testing.assert_close(mean_square(None, 2.0)(x, y), ((x - y) / 2).square().mean(1))
    torch.testing.assert_close(mean_square(lambda v, t: 3 * v[:, :2], 2.0)(x, y), 9 * (x - y)[:, :2].square().mean(1))


def test_lpips_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: it has to get pictures of three colours at the size that DMD compares at."""

    class Stand(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "vgg"

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            assert x.shape == y.shape == (2, 3, LPIPS_SIZE, LPIPS_SIZE)
            return (x - y).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Stand))
    x, y = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    torch.testing.assert_close(lpips()(x, y), torch.ones(2))
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UsageError, match="needs the package of this name"):
        lpips()
