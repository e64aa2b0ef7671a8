"""Students that start as a denoiser, their times, and the door from a teacher to a student."""

from __future__ import annotations

import copy
import math

import diffusers
import pytest
import torch
from torch import Tensor

from tiny_models import tiny_unet
from vardistill.denoisers import DiffusersDenoiser, FromModule, GaussianMixture, Guided, Mixed, Preconditioned
from vardistill.denoisers.edm import from_edm
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule, Table
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP
from vardistill.students import DenoisingStudent, NetworkStudent, default_times, from_teacher
from vardistill.students.denoising import INITIAL_RATIO, LAST_RATIO

SCHEDULES = {"ve": VE(0.002, 80.0), "vp": VP(), "cosine": Cosine(), "rectified": Rectified()}
TABLE = Table(tuple(diffusers.DDPMScheduler().alphas_cumprod.tolist()))

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def of_points(schedule: Schedule | None = None) -> Preconditioned:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Preconditioned(LevelMLP(2, 2, depth=1, width=8), 0.5, schedule)


def ratios(schedule: Schedule, times: tuple[float, ...]) -> list[float]:
    alpha, sigma = schedule(torch.tensor(times, dtype=torch.float64))
    return (sigma / alpha).tolist()


# Times


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_times_are_karrass_without_the_last(schedule: Schedule, steps: int) -> None:
    """r_k^(1/7) falls evenly from (5 σ_d)^(1/7) to (0.25 σ_d)^(1/7) on a grid of n + 1 points."""
    times = default_times(schedule, steps, data_std=0.5)
    grid = torch.linspace(2.5 ** (1 / 7), 0.125 ** (1 / 7), steps + 1, dtype=torch.float64)[:-1] ** 7
    assert ratios(schedule, times) == pytest.approx(grid.tolist(), rel=1e-6)


def test_the_ends_are_in_units_of_the_data() -> None:
    times = default_times(VE(1e-9, 1e9), 2, data_std=3.0)
    first, second = ratios(VE(1e-9, 1e9), times)
    assert first == pytest.approx(3 * INITIAL_RATIO)
    assert second ** (1 / 7) == pytest.approx(((3 * INITIAL_RATIO) ** (1 / 7) + (3 * LAST_RATIO) ** (1 / 7)) / 2)


@every_schedule
def test_one_time_is_that_of_the_ratio_to_the_bit(schedule: Schedule) -> None:
    expected = float(schedule.time(torch.tensor(1.7, dtype=torch.float64)).clamp(0, 1))
    assert default_times(schedule, 1, ratio=1.7) == (expected,)


def test_the_schedules_own_ends_are_kept() -> None:
    """VE(0.3, 1) reaches neither 5 σ_d nor 0.25 σ_d: the grid runs from 1 to 0.3."""
    times = default_times(VE(0.3, 1.0), 2, data_std=1.0)
    assert times[0] == 1
    assert ratios(VE(0.3, 1.0), times)[1] ** (1 / 7) == pytest.approx((1 + 0.3 ** (1 / 7)) / 2)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_times_of_a_table_are_the_nearest_steps(steps: int) -> None:
    times = default_times(TABLE, steps)
    indices = [round(999 * t) for t in times]
    assert times == tuple(i / 999 for i in indices)
    end = max(0.125, ratios(TABLE, (0.0,))[0])
    grid = torch.linspace(2.5 ** (1 / 7), end ** (1 / 7), steps + 1, dtype=torch.float64)[:-1] ** 7
    exact = (999 * TABLE.time(grid)).tolist()
    assert all(abs(i - x) <= 0.5 for i, x in zip(indices, exact, strict=True))


def test_more_steps_than_a_schedule_has() -> None:
    short = Table((0.9, 0.6, 0.3, 0.1))
    with pytest.raises(UsageError, match="8 steps are too many for the schedule: their times would be") as caught:
        default_times(short, 8)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="steps must be at least 1, but is 0"):
        default_times(short, 0)


@pytest.mark.parametrize(
    ("times", "line"),
    [
        ((), "must be in .* but are none"),
        ((0.5, 0.0), "must be in .* but are 0.5, 0"),
        ((1.5,), "must be in .* but are 1.5"),
        ((math.nan,), "must be in .* but are nan"),
        ((0.5, 0.5), "must decrease from noise to data, but are 0.5, 0.5"),
        ((0.2, 0.4), "must decrease"),
    ],
)
def test_times_that_are_no_path(times: tuple[float, ...], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        DenoisingStudent(of_points(), (2,), 0.5, times)


def test_a_time_without_noise() -> None:
    class Clean(Rectified):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones_like(t), (t - 0.5).clamp_min(0)

    with pytest.raises(UsageError, match="no noise at one of the student's times, 0.9, 0.4"):
        DenoisingStudent(of_points(Clean()), (2,), 0.5, (0.9, 0.4))


# The map


@every_schedule
def test_a_new_student_predicts_what_its_teacher_does_to_the_bit(schedule: Schedule) -> None:
    teacher = of_points(schedule)
    student = from_teacher(teacher, steps=2, data_shape=(2,))
    z = student.latents(5, torch.Generator().manual_seed(0))
    t = torch.full((5,), student.times[0])
    assert torch.equal(student.predict(z, t), teacher(z, t))
    assert torch.equal(student(z), teacher(student.input_scale(1) * z, t))
    assert student.schedule is student.denoiser.schedule


def test_weights_are_the_students_own_and_trained() -> None:
    teacher = of_points().requires_grad_(False)
    student = from_teacher(teacher, steps=2, data_shape=(2,))
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_every_step_trains_the_one_network() -> None:
    student = from_teacher(of_points(), steps=3, data_shape=(2,))
    rng = torch.Generator().manual_seed(0)
    z, renoise = student.latents(6, rng), student.renoise(6, rng)
    for k in (1, 2, 3):
        student.zero_grad()
        student(student.enter(z, renoise, k), step=k).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def test_a_compiled_student_is_traced_whole() -> None:
    student = from_teacher(of_points(), steps=3, data_shape=(2,))
    rng = torch.Generator().manual_seed(0)
    z, renoise = student.latents(6, rng), student.renoise(6, rng)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, renoise), student(z, renoise))


# The door


def test_a_network_of_diffusers_makes_a_network_student() -> None:
    teacher = DiffusersDenoiser(tiny_unet(3), diffusers.EDMEulerScheduler())
    for given in (
        teacher,
        Guided(teacher, 2.0, {"labels": 2}),
        Mixed(teacher),
        Mixed(Guided(teacher, 2.0, {"labels": 2})),
    ):
        student = from_teacher(given, steps=4, data_std=0.4, classes=3)
        assert isinstance(student, NetworkStudent)
        assert (student.steps, student.classes, student.data_std) == (4, 3, 0.4)
        assert student.times == default_times(teacher.schedule, 4, 0.4)
    assert from_teacher(teacher, times=(0.5, 0.25)).times == (0.5, 0.25)


class EDMNetwork(torch.nn.Module):
    label_dim, img_channels, img_resolution = 3, 1, 4

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return self.a * x + labels.argmax(1)[:, None, None, None]


def test_shapes_and_classes_are_the_teachers_where_it_tells() -> None:
    teacher = from_edm(EDMNetwork())
    for given in (teacher, Guided(teacher, 3.0, {"labels": 3})):
        student = from_teacher(given, steps=2)
        assert type(student) is DenoisingStudent
        assert (student.data_shape, student.classes, student.condition_names) == ((1, 4, 4), 3, ("labels",))
        assert student.sample(5, labels=torch.arange(5) % 3).shape == (5, 1, 4, 4)


def test_teachers_that_no_student_can_start_from() -> None:
    exact = GaussianMixture(torch.zeros(1, 2), std=1.0)
    function = FromModule(lambda x, t: x, VE(), "x", None)
    for teacher in (exact, function):
        with pytest.raises(UsageError, match="has no parameters to start from") as caught:
            from_teacher(teacher, data_shape=(2,))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="does not tell the shape of its data: give data_shape"):
        from_teacher(of_points())
    with pytest.raises(UsageError, match="the teacher must be a denoiser"):
        from_teacher(torch.nn.Linear(2, 2), data_shape=(2,))  # type: ignore[arg-type]
