"""Schedules: identities between α and σ, the inverse of their ratio, and refused arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from vardistill.diffusion.schedules import (
    SCHEDULES,
    VE,
    VP,
    Cosine,
    Rectified,
    Schedule,
    Table,
    check_range,
    expand,
    same_schedule,
)
from vardistill.errors import UsageError


def linear_betas(steps: int, first: float = 1e-4, last: float = 0.02) -> tuple[float, ...]:
    """ᾱ of DDPM's β from `first` to `last`."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return tuple((1 - betas).cumprod(0).tolist())


EXAMPLES = [VE(), VE(0.1, 20.0), VP(), VP(0.5, 4.0), Cosine(), Rectified()]

every_schedule = pytest.mark.parametrize("schedule", [*EXAMPLES, Table(linear_betas(1000))], ids=str)
every_named_schedule = pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
inner_time = st.floats(1e-3, 1 - 1e-3)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@every_named_schedule
def test_is_a_schedule_and_registered(schedule: Schedule) -> None:
    assert isinstance(schedule, Schedule)
    assert type(schedule) in SCHEDULES.values()


@every_schedule
@given(t=inner_time)
def test_time_inverts_the_ratio(schedule: Schedule, t: float) -> None:
    alpha, sigma = schedule(at(t))
    assert float(schedule.time(sigma / alpha)) == pytest.approx(t, abs=1e-10)


@every_schedule
@given(log_ratio=st.floats(-4, 4))
def test_ratio_inverts_the_time(schedule: Schedule, log_ratio: float) -> None:
    """Also outside t ∈ [0, 1], where VE and VP go on."""
    alpha, sigma = schedule(schedule.time(at(log_ratio).exp()))
    assert float((sigma / alpha).log()) == pytest.approx(log_ratio, abs=1e-9)


@every_schedule
@given(t=inner_time, s=inner_time)
def test_ratio_increases(schedule: Schedule, t: float, s: float) -> None:
    alpha, sigma = schedule(torch.tensor(sorted([t, s]), dtype=torch.float64))
    assert (alpha > 0).all()
    assert (sigma > 0).all()
    assert (sigma / alpha).diff() > 0 or abs(t - s) < 1e-12


@given(t=st.floats(0, 1), beta_min=st.floats(0.01, 1), growth=st.floats(1.1, 100))
def test_variance_is_preserved(t: float, beta_min: float, growth: float) -> None:
    for schedule in (VP(beta_min, beta_min * growth), Cosine()):
        alpha, sigma = schedule(at(t))
        assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-14)


@given(t=st.floats(0, 1))
def test_rectified_is_a_straight_line(t: float) -> None:
    alpha, sigma = Rectified()(at(t))
    assert float(alpha + sigma) == pytest.approx(1, abs=1e-15)
    assert float(sigma) == t


@given(t=st.floats(0, 1), sigma_min=st.floats(1e-3, 1), growth=st.floats(1.1, 1e4))
def test_ve_is_geometric(t: float, sigma_min: float, growth: float) -> None:
    alpha, sigma = VE(sigma_min, sigma_min * growth)(at(t))
    assert float(alpha) == 1
    assert float(sigma) == pytest.approx(sigma_min * growth**t, rel=1e-12)


@given(t=st.floats(1e-3, 1))
def test_vp_solves_its_equation(t: float) -> None:
    """d log α/dt = −β(t)/2 with β from β_min to β_max (arXiv 2011.13456, eq. 32)."""
    time = at(t).requires_grad_()
    (slope,) = torch.autograd.grad(VP(0.2, 7.0)(time)[0].log(), time)
    assert float(slope) == pytest.approx(-0.5 * (0.2 + t * 6.8), rel=1e-10)


@every_named_schedule
def test_ends(schedule: Schedule) -> None:
    """Noise vanishes at t = 0, but for VE's σ_min; the data vanish at t = 1, but for VE and VP."""
    alpha, sigma = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert alpha[0] == 1
    assert sigma[0] == (pytest.approx(schedule.sigma_min) if isinstance(schedule, VE) else 0)
    if isinstance(schedule, VE):
        assert float(sigma[1]) == pytest.approx(schedule.sigma_max)
    elif isinstance(schedule, VP):
        assert float(alpha[1]) == pytest.approx(math.exp(-(schedule.beta_min + schedule.beta_max) / 4))
    else:
        assert alpha[1].abs() < 1e-15
        assert sigma[1] == 1


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3)])
def test_shape_and_dtype(schedule: Schedule, dtype: torch.dtype, shape: tuple[int, ...], rng: torch.Generator) -> None:
    t = torch.rand(shape, generator=rng, dtype=dtype).clamp(0.01, 0.99)
    alpha, sigma = schedule(t)
    for v in (alpha, sigma, schedule.time(sigma / alpha)):
        assert v.shape == shape
        assert v.dtype == dtype
    alone = torch.stack([schedule(each)[1] for each in t.flatten()]) if t.numel() else t.flatten()
    torch.testing.assert_close(sigma.flatten(), alone, rtol=1e-6, atol=0)


@every_schedule
def test_inverse_in_single_precision(schedule: Schedule) -> None:
    t = torch.linspace(0.01, 0.99, 99)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(schedule.time(sigma / alpha), t, rtol=0, atol=1e-5)


@every_schedule
def test_scales_are_new_tensors(schedule: Schedule) -> None:
    """Writing into α or σ leaves t as it was."""
    t = torch.tensor([0.3, 0.6])
    for scale in schedule(t):
        scale.zero_()
    assert t.tolist() == pytest.approx([0.3, 0.6])


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (2, 1), (0, 1), (-1, 1), (1, math.inf), (math.nan, 1), (1, math.nan)]
)
def test_refused_ranges(low: float, high: float) -> None:
    for refused, name in ((VE, "sigma_min"), (VP, "beta_min")):
        with pytest.raises(UsageError, match=f"^{name} must be positive and below .*{low:g}.*{high:g}$"):
            refused(low, high)
    with pytest.raises(UsageError):
        check_range("low", low, "high", high)


def test_expand(rng: torch.Generator) -> None:
    v, like = torch.rand(3, generator=rng), torch.rand(3, 2, 4, 5, generator=rng)
    assert expand(v, like).shape == (3, 1, 1, 1)
    assert torch.equal(expand(v, like).flatten(), v)
    assert expand(v, v).shape == (3,)


def test_table_at_its_indices() -> None:
    """α_t² = ᾱ_i and σ_t² = 1 − ᾱ_i at t = i/(T − 1), in double and in single precision."""
    values = linear_betas(1000)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        alpha, sigma = Table(values)(torch.linspace(0, 1, 1000, dtype=torch.float64).to(dtype))
        torch.testing.assert_close(alpha**2, torch.tensor(values, dtype=dtype), rtol=0, atol=tolerance)
        torch.testing.assert_close(sigma**2, 1 - torch.tensor(values, dtype=dtype), rtol=0, atol=tolerance)


@given(t=st.floats(0, 1), steps=st.integers(2, 50))
def test_table_preserves_the_variance(t: float, steps: int) -> None:
    alpha, sigma = Table(linear_betas(steps))(at(t))
    assert float(alpha**2 + sigma**2) == pytest.approx(1, abs=1e-14)


def test_table_between_its_indices() -> None:
    """Half-way between two indices the angle is half-way, too."""
    table = Table((0.75, 0.25, 0.0))
    alpha, sigma = table(torch.tensor([0.25, 0.75], dtype=torch.float64))
    angles = torch.tensor([math.pi / 4, 5 * math.pi / 12], dtype=torch.float64)
    torch.testing.assert_close(torch.atan2(sigma, alpha), angles)


def test_table_with_zero_terminal_snr() -> None:
    """The last entry may be 0: there the data vanish, and an infinite ratio has the time 1."""
    table = Table((0.9, 0.5, 0.0))
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = table(torch.ones(1, dtype=dtype))
        assert 0 <= float(alpha) < 1e-15
        assert float(sigma) == 1
        assert table.time(torch.tensor([math.inf], dtype=dtype)).tolist() == [1.0]


def test_table_ends() -> None:
    """Times and ratios outside the table are moved to its ends."""
    table = Table((0.9, 0.5, 0.1))
    t = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(table(t)[0] ** 2, torch.tensor([0.9, 0.9, 0.1, 0.1]))
    assert table.time(torch.tensor([1e-9, 1e9])).tolist() == [0.0, 1.0]


def test_table_is_a_value() -> None:
    """Equal tables are equal and hash alike, also after one of them was used; the table's scales carry gradients."""
    used, fresh = Table(linear_betas(10)), Table(linear_betas(10))
    with torch.inference_mode():
        used(torch.ones(1))
    assert used == fresh
    assert hash(used) == hash(fresh)
    assert used != Table(linear_betas(11))
    assert str(Table((0.9, 0.5, 0.0))) == "Table(3 from 0.9 to 0)"
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: used(v)[1], t)


@pytest.mark.parametrize("refused", [(), (0.5,), (0.5, 0.5), (0.1, 0.5), (1.0, 0.5), (0.5, -0.1), (math.nan, 0.1)])
def test_refused_tables(refused: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="at least two numbers"):
        Table(refused)


class Own:
    """A user's schedule, without `__eq__`: a rectified flow whose times are bent."""

    def __init__(self, power: float) -> None:
        self.power = torch.tensor(power)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t**self.power, t**self.power

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / (1 + ratio)) ** (1 / self.power)


def test_schedules_are_the_same_where_their_scales_are() -> None:
    """By value and not by object; σ = 0 at t = 0 and α = 0 at t = 1 are no hindrance."""
    own = Own(2.0)
    assert same_schedule(own, copy.deepcopy(own))
    assert same_schedule(Own(1.0), Rectified())
    assert same_schedule(Rectified(), Own(1.0))
    assert not same_schedule(own, Own(2.0001))
    examples = [*EXAMPLES, Table(linear_betas(1000)), Table(linear_betas(999)), Table((0.9, 0.5, 0.0)), own]
    for i, a in enumerate(examples):
        assert [same_schedule(a, b) for b in examples] == [i == j for j in range(len(examples))]
    assert not same_schedule(VE(0.01, 100.0), VE(0.01, 100.001))
    assert not same_schedule(VE(1e-5, 100.0), VE(2e-5, 100.0))


def test_schedules_that_are_not_finite_at_an_end() -> None:
    class Infinite(Own):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones_like(t), (t / (1 - t)) ** self.power

    assert same_schedule(Infinite(1.0), Infinite(1.0))
    assert not same_schedule(Infinite(1.0), Infinite(2.0))
