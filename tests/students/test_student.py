"""The path of a student: its law in closed form, its gradient, its draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.errors import UsageError
from vardistill.students import MLP, Student

SCHEDULES = {"ve": VE(), "vp": VP(), "cosine": Cosine(), "rectified": Rectified()}
STD = 0.5

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_number = pytest.mark.parametrize("steps", [1, 2, 4, 8])


class Linear(Student):
    """f(x_t, t_k) = a_k x_t on vectors of d values, plus the label."""

    a: Tensor

    def __init__(self, schedule: Schedule, steps: int, d: int = 1, classes: int = 0) -> None:
        super().__init__()
        self.schedule, self.times = schedule, tuple(0.9 * (steps - k) / steps for k in range(steps))
        self.latent_shape = self.data_shape = (d,)
        self.data_std, self.classes = STD, classes
        self.a = nn.Parameter(torch.linspace(0.7, 1.3, steps, dtype=torch.float64))

    def predict(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        assert t.shape == x_t.shape[:1]
        (k,) = {self.times.index(time) for time in t.tolist()}
        x = self.a[k] * x_t
        return x + condition["labels"][:, None] if condition else x


def variances(student: Linear) -> list[float]:
    """Of x̂_k: V_1 = (a_1 c_1)² and V_{k+1} = a_{k+1}² (α² V_k + σ²)."""
    a, levels = student.a.tolist(), student.levels
    found = [(a[0] * student.input_scale(1)) ** 2]
    for k in range(1, student.steps):
        alpha, sigma = levels[k]
        found.append(a[k] ** 2 * (alpha**2 * found[-1] + sigma**2))
    return found


def draws(student: Student, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return student.latents(n, rng), student.renoise(n, rng)


def same_law_at_every_step(student: Linear, s: float) -> Linear:
    """a_k = s/√(variance of x_{t_k}): each map sends its input to N(0, s²)."""
    inputs = [student.input_scale(1), *(math.hypot(alpha * s, sigma) for alpha, sigma in student.levels[1:])]
    student.a = nn.Parameter(torch.tensor([s / std for std in inputs], dtype=torch.float64))
    return student


@every_schedule
@every_number
def test_the_variance_after_every_renoising(schedule: Schedule, steps: int) -> None:
    """The path is linear in (z, n_1, ..., n_{m}): its values at unit vectors are the coefficients of x̂_{m+1}."""
    student = Linear(schedule, steps)
    for m in range(steps):
        unit = torch.eye(m + 1, dtype=torch.float64)
        with torch.no_grad():
            coefficients = student(unit[0, :, None], unit[1:, :, None])
        assert float(coefficients.square().sum()) == pytest.approx(variances(student)[m], rel=1e-12)


@every_schedule
@every_number
def test_maps_of_the_right_law_make_a_path_of_the_right_law(schedule: Schedule, steps: int) -> None:
    """Why noise is fresh: if x̂_k has the law of the data at each listed time, so has the sample, for any n."""
    student = same_law_at_every_step(Linear(schedule, steps), s=STD)
    assert variances(student) == pytest.approx([STD**2] * steps, rel=1e-12)


@every_schedule
def test_samples_have_the_closed_forms_variance(schedule: Schedule) -> None:
    """n s²/V is χ² with n = 20,000 degrees of freedom, of standard deviation √(2/n) = 0.01: 4.5 σ, 7e-6."""
    student = Linear(schedule, 4)
    x = student.sample(20_000, seed=1)
    assert float(x.square().mean()) == pytest.approx(variances(student)[-1], rel=0.045)


@every_schedule
@every_number
def test_a_latent_has_unit_variance_where_the_last_sample_has_the_datas(schedule: Schedule, steps: int) -> None:
    student = same_law_at_every_step(Linear(schedule, steps), s=STD)
    unit = torch.eye(steps, dtype=torch.float64)
    for k in range(1, steps + 1):
        u = student.enter(unit[0, :, None], unit[1:, :, None], k)
        assert float(u.square().sum()) == pytest.approx(1, rel=1e-12)


@every_schedule
def test_the_scale_of_the_noise_is_a_pipelines(schedule: Schedule) -> None:
    student = Linear(schedule, 2)
    (alpha, sigma), (alpha_2, sigma_2) = student.levels
    preserved = isinstance(schedule, VP | Cosine)
    assert student.input_scale(1) == (1 if preserved else sigma)
    assert student.input_scale(2) == pytest.approx(math.sqrt((alpha_2 * STD) ** 2 + sigma_2**2))
    assert student.initial_ratio == sigma / alpha


@every_schedule
@every_number
def test_entering_at_a_step_and_going_on_is_the_whole_path(schedule: Schedule, steps: int) -> None:
    student = Linear(schedule, steps, d=3, classes=4)
    (z, renoise), labels = draws(student), torch.arange(5) % 4
    whole = student(z, renoise, labels=labels)
    for k in range(1, steps + 1):
        u = student.enter(z, renoise, k, labels=labels)
        torch.testing.assert_close(student(u, renoise[k - 1 :], step=k, labels=labels), whole, rtol=1e-12, atol=1e-12)
        shorter = student(z, renoise[: k - 1], labels=labels)
        torch.testing.assert_close(student(u, step=k, labels=labels), shorter, rtol=1e-12, atol=1e-12)


@every_number
def test_only_the_step_that_is_entered_has_a_gradient(steps: int) -> None:
    """x = a_k c_k u_k, so dx/da_k = c_k u_k, and no other step's weight takes part."""
    student = Linear(Rectified(), steps, d=2)
    z, renoise = draws(student)
    for k in range(1, steps + 1):
        u = student.enter(z, renoise, k)
        assert not u.requires_grad
        (gradient,) = torch.autograd.grad(student(u, step=k).sum(), student.a)
        expected = torch.zeros_like(gradient)
        expected[k - 1] = student.input_scale(k) * u.sum()
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_whole_path_is_that_of_differences() -> None:
    student = Linear(VP(), 4, d=2)
    z, renoise = draws(student)

    def loss(a: Tensor) -> Tensor:
        return torch.func.functional_call(student, {"a": a}, (z, renoise)).square().sum()

    assert torch.autograd.gradcheck(loss, student.a)


def test_the_first_step_is_entered_with_z_itself() -> None:
    student = Linear(VE(), 2)
    z, renoise = draws(student)
    assert student.enter(z, renoise, 1) is z
    assert student.enter(z, None, 1) is z


@every_number
def test_noise_is_drawn_after_the_latents_step_by_step(steps: int) -> None:
    """As a pipeline draws it: one call for each step."""
    student = Linear(VE(), steps, d=3)
    rng, again = (torch.Generator().manual_seed(3) for _ in range(2))
    z, renoise = student.latents(5, rng), student.renoise(5, rng)
    expected = [torch.randn(5, 3, generator=again, dtype=torch.float64) for _ in range(steps)]
    assert torch.equal(z, expected[0])
    assert renoise.shape == (steps - 1, 5, 3)
    assert all(torch.equal(found, other) for found, other in zip(renoise, expected[1:], strict=True))
    assert (rng.get_state() == again.get_state()).all()


@every_number
@pytest.mark.parametrize("classes", [0, 3])
def test_samples_are_the_paths_for_every_block_size(steps: int, classes: int) -> None:
    student = Linear(Cosine(), steps, d=2, classes=classes)
    labels = torch.arange(7) % 3 if classes else None
    condition = {} if labels is None else {"labels": labels}
    with torch.no_grad():
        expected = student(*draws(student, 7, seed=4), **condition)
    for block in (1, 3, 7, 100):
        assert torch.equal(student.sample(7, 4, block, labels), expected)


def test_labels_are_the_one_condition() -> None:
    assert Linear(VE(), 1).condition_names == ()
    assert Linear(VE(), 1, classes=2).condition_names == ("labels",)


@pytest.mark.parametrize(
    ("step", "noise", "line"),
    [
        (0, 0, "steps 1 to 2, but steps 0 to 0"),
        (3, 0, "steps 1 to 2, but steps 3 to 3"),
        (1, 2, "steps 1 to 2, but steps 1 to 3"),
        (2, 1, "steps 1 to 2, but steps 2 to 3"),
    ],
)
def test_steps_that_there_are_not(step: int, noise: int, line: str) -> None:
    student = Linear(VE(), 2)
    z = student.latents(5, torch.Generator())
    with pytest.raises(UsageError, match=line):
        student(z, torch.zeros(noise, 5, 1), step)


def test_a_step_is_entered_by_way_of_those_before_it() -> None:
    student = Linear(VE(), 3)
    z, renoise = draws(student)
    for given in (None, renoise[:1]):
        with pytest.raises(UsageError, match="step 3 is entered with 2 entries of noise"):
            student.enter(z, given, 3)
    with pytest.raises(UsageError, match="steps 1 to 3, but steps 4 to 4"):
        student.enter(z, renoise, 4)


# A map of z alone


def test_a_map_of_z_alone_is_one_step() -> None:
    student = MLP(latent=3, data=2, depth=1, width=4)
    z, renoise = draws(student)
    assert (student.steps, student.times, student.initial_ratio) == (1, (), math.inf)
    assert renoise.shape == (0, 5, 2)
    assert torch.equal(student(z, renoise), student(z))
    assert student.enter(z, renoise, 1) is z


def test_a_map_of_z_alone_has_no_further_step_and_no_times() -> None:
    student = MLP(latent=2, data=2, depth=1, width=4)
    z = student.latents(5, torch.Generator())
    with pytest.raises(UsageError, match="steps 1 to 1, but steps 2 to 2"):
        student(z, step=2)
    with pytest.raises(UsageError, match="steps 1 to 1, but steps 1 to 2"):
        student(z, torch.zeros(1, 5, 2))
    with pytest.raises(UsageError, match="a perceptron takes no labels"):
        student(z, labels=torch.zeros(5, dtype=torch.long))
    with pytest.raises(UsageError, match="a MLP maps z alone: it has no times"):
        student.predict(z, torch.ones(5))
