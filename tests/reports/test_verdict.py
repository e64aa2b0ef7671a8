"""Grades of students that are known to be good or bad."""

from __future__ import annotations

import math

import pytest
import torch

from vardistill.domains.points.problems import PROBLEMS, Digits, Mixture, MoG40, Problem
from vardistill.errors import UsageError
from vardistill.metrics import evaluate, log_mmd, mode_statistics
from vardistill.reports.verdict import LIMITS, Grade, Standard, grade, grades, overall, standards

N = 4000


@pytest.fixture(scope="module")
def problem() -> MoG40:
    return MoG40()


@pytest.fixture(scope="module")
def truth(problem: MoG40) -> dict[str, Standard]:
    return standards(problem, N)


def graded(samples: torch.Tensor, problem: Problem, truth: dict[str, Standard]) -> dict[str, Grade]:
    rng = torch.Generator().manual_seed(5)
    return grades(evaluate(samples, problem, rng, p_value=False), truth)


def test_true_samples_match(problem: MoG40, truth: dict[str, Standard]) -> None:
    """Five metrics within 3 standard deviations, at the fixed seed 4."""
    found = graded(problem.sample(N, torch.Generator().manual_seed(4)), problem, truth)
    assert found == dict.fromkeys([*LIMITS][:5], Grade.MATCHES)


def test_a_lost_mode_is_seen(problem: MoG40, truth: dict[str, Standard]) -> None:
    samples = problem.sample(2 * N, torch.Generator().manual_seed(4))
    nearest = torch.cdist(samples, problem.denoiser.means).argmin(1)
    found = graded(samples[nearest != 7][:N], problem, truth)
    assert found["modes_found"] is Grade.ROUGH
    assert found["off_mode"] is Grade.MATCHES


def test_one_mode_and_noise_are_far(problem: MoG40, truth: dict[str, Standard]) -> None:
    noise = torch.randn(N, 2, generator=torch.Generator().manual_seed(4))
    collapsed = graded(problem.denoiser.means[3] + problem.std * noise, problem, truth)
    assert collapsed["modes_found"] is collapsed["mode_tv"] is collapsed["log_mmd"] is Grade.FAR
    scattered = graded(40 * noise, problem, truth)
    assert scattered["log_density_gap"] is scattered["off_mode"] is Grade.FAR


@pytest.mark.parametrize("n", [500, 2000])
def test_the_floor_of_log_mmd_scales_with_the_samples(problem: MoG40, n: int) -> None:
    """The mean of 8 is within 6 of its standard deviations: failure rate below 1e-6, seed 0."""
    rng = torch.Generator().manual_seed(0)
    measured = [log_mmd(problem.sample(n, rng), problem.sample(n, rng)) for _ in range(8)]
    standard = standards(problem, n)["log_mmd"]
    assert sum(measured) / 8 == pytest.approx(standard.mean, abs=6 * standard.std / math.sqrt(8) + 0.05)


@pytest.mark.parametrize(("name", "n"), [("mog40", 300), ("mog40", 3000), ("mog9", 100), ("mixture8", 1000)])
def test_the_floors_of_the_modes_scale_with_the_samples(name: str, n: int) -> None:
    """The means of 100 sets to 4.5 standard errors and the approximations' 1 %: 7e-6 each, seed 0."""
    problem, rng = PROBLEMS[name](), torch.Generator().manual_seed(0)
    assert problem.modes is not None
    m, truth = problem.modes, standards(problem, n)
    draws = [mode_statistics(problem.sample(n, rng), m.means, m.std, m.weights) for _ in range(100)]
    found, tv, off = torch.tensor(draws, dtype=torch.float64).unbind(1)
    for metric, v in {"modes_found": found, "mode_tv": tv, "off_mode": off}.items():
        mean, std = truth[metric].mean, truth[metric].std
        assert abs(float(v.mean()) - mean) < 0.45 * std + (0.01 * mean if metric == "mode_tv" else 1e-9)
    assert float(tv.std()) == pytest.approx(truth["mode_tv"].std, rel=4.5 / math.sqrt(200))


def test_grades_follow_the_limits() -> None:
    standard = Standard(0.0, 0.01)
    values = {0.03: Grade.MATCHES, -0.03: Grade.MATCHES, 0.08: Grade.CLOSE, -0.6: Grade.ROUGH, 0.61: Grade.FAR}
    assert {v: grade("log_density_gap", v, standard) for v in values} == values
    assert grade("log_density_gap", math.nan, standard) is Grade.FAR
    assert grade("log_mmd", -20.0, Standard(-8.5, 0.1)) is Grade.MATCHES


def test_modes_are_counted_from_what_true_samples_find() -> None:
    standard = Standard(40.0, 0.0, scale=40)
    found = [grade("modes_found", v, standard) for v in (40, 39, 36, 35)]
    assert found == [Grade.MATCHES, Grade.ROUGH, Grade.ROUGH, Grade.FAR]


def test_the_whole_is_as_good_as_its_worst_part() -> None:
    assert overall({}, {}) is None
    assert overall({}, {"log_mmd": Grade.MATCHES, "mode_tv": Grade.ROUGH}) is Grade.ROUGH
    matching = {"log_mmd": Grade.MATCHES}
    assert overall({}, matching) is overall({"mmd_p_value": 0.3}, matching) is Grade.MATCHES
    assert overall({"mmd_p_value": 0.01}, matching) is Grade.CLOSE


def test_standards_need_samples(problem: MoG40) -> None:
    with pytest.raises(UsageError, match="at least 2 samples"):
        standards(problem, 1)


@pytest.mark.parametrize("name", PROBLEMS)
def test_true_samples_of_every_problem_match(name: str) -> None:
    """500 of them, within 3 standard deviations at the fixed seed 11."""
    problem = PROBLEMS[name]()
    truth = standards(problem, 500)
    found = graded(problem.sample(500, torch.Generator().manual_seed(11)), problem, truth)
    assert found.keys() == truth.keys() - {"log_density"}
    assert set(found.values()) == {Grade.MATCHES}


def test_collapsed_and_noisy_digits_are_far() -> None:
    problem, noise = Digits(), torch.randn(600, 64, generator=torch.Generator().manual_seed(4))
    truth = standards(problem, 600)
    collapsed = graded(problem.data[:1] + 0.01 * noise, problem, truth)
    assert collapsed["recall"] is collapsed["energy_distance_held_out"] is collapsed["log_mmd"] is Grade.FAR
    noisy = graded(problem.data_mean + problem.data_std * noise, problem, truth)
    assert noisy["precision"] is noisy["energy_distance_held_out"] is Grade.FAR


def test_more_precision_and_recall_are_better() -> None:
    standard = Standard(0.95, 0.01)
    found = [grade("recall", v, standard) for v in (1.0, 0.93, 0.86, 0.7, 0.6)]
    assert found == [Grade.MATCHES, Grade.MATCHES, Grade.CLOSE, Grade.ROUGH, Grade.FAR]


def test_limits_of_the_log_density_grow_with_the_dimension() -> None:
    """0.08 d/2: 0.32 for d = 8, where one evaluation has 0.02."""
    standard = standards(Mixture(8), 10_000)["log_density_gap"]
    assert standard == Standard(0.0, pytest.approx(0.02), 4.0)
    found = [grade("log_density_gap", v, standard) for v in (-0.05, 0.3, 0.33, -2.4, 2.5)]
    assert found == [Grade.MATCHES, Grade.CLOSE, Grade.ROUGH, Grade.ROUGH, Grade.FAR]
