"""The table of metrics: true samples at the reference values, bad ones away from them, and what problems have."""

from __future__ import annotations

import math

import pytest
import torch

from vardistill.domains.points.problems import PROBLEMS, Digits, MoG9, MoG40
from vardistill.errors import UsageError
from vardistill.metrics import (
    energy_distance,
    evaluate,
    log_density,
    log_mmd,
    mmd2,
    mode_statistics,
    precision_recall,
)

KEYS = [
    "log_density",
    "log_density_gap",
    "log_mmd",
    "mmd2_unbiased",
    "mmd_p_value",
    "energy_distance",
    "modes_found",
    "mode_tv",
    "off_mode",
]


def test_every_value_is_that_of_its_metric(rng: torch.Generator) -> None:
    problem = MoG40()
    samples = problem.sample(500, rng) * 1.05
    table = evaluate(samples, problem, torch.Generator().manual_seed(5))
    truth = problem.sample(500, torch.Generator().manual_seed(5))
    assert list(table) == KEYS
    assert table["log_density"] == log_density(samples, problem)
    assert table["log_density_gap"] == table["log_density"] - problem.reference.log_density
    assert table["log_mmd"] == pytest.approx(log_mmd(samples, truth), rel=1e-5)
    assert table["mmd2_unbiased"] == pytest.approx(mmd2(samples, truth, biased=False), rel=1e-3)
    assert 0 < table["mmd_p_value"] <= 1
    assert table["energy_distance"] == energy_distance(samples, truth)
    modes = mode_statistics(samples, problem.denoiser.means, problem.std)
    assert (table["modes_found"], table["off_mode"]) == (modes.modes_found, modes.off_mode)
    assert table["mode_tv"] == pytest.approx(modes.mode_tv)
    assert isinstance(table["modes_found"], int)


def test_true_samples_score_the_reference(rng: torch.Generator) -> None:
    """Seed 0. Log-density and floor within 4.5 of their standard deviations: 7e-6 each, were they normal."""
    problem = MoG40()
    table = evaluate(problem.sample(problem.reference.samples, rng), problem, rng, p_value=False)
    assert abs(table["log_density_gap"]) < 4.5 * problem.reference.log_density_std
    assert abs(table["log_mmd"] - problem.reference.log_mmd) < 4.5 * problem.reference.log_mmd_std
    assert table["modes_found"] == 40
    assert table["mode_tv"] < 0.04
    assert table["off_mode"] < 1e-3
    assert "mmd_p_value" not in table


def test_a_collapsed_student_is_seen(rng: torch.Generator) -> None:
    problem = MoG40()
    table = evaluate(problem.denoiser.means[:10].repeat(50, 1), problem, rng)
    assert table["log_density_gap"] > 0.5
    assert table["modes_found"] < 20
    assert table["mode_tv"] > 0.5
    assert table["mmd_p_value"] < 0.01
    assert table["energy_distance"] > 0.1


DENSITY, MODES, HELD_OUT = KEYS[:2], KEYS[6:], ["energy_distance_held_out", "precision", "recall"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_the_metrics_that_make_sense_for_it(name: str, rng: torch.Generator) -> None:
    problem = PROBLEMS[name]()
    table = evaluate(problem.sample(500, rng), problem, rng)
    own = {"moons": DENSITY + KEYS[2:6], "digits": KEYS[2:6] + HELD_OUT}
    assert list(table) == own.get(name, KEYS)
    assert all(math.isfinite(v) for v in table.values())
    assert table["mmd_p_value"] > 1e-3


@pytest.mark.parametrize("name", PROBLEMS)
def test_true_samples_score_the_references_of_every_problem(name: str, rng: torch.Generator) -> None:
    """4,000 of them, seed 0: six standard deviations, whose distributions are skew."""
    problem, n = PROBLEMS[name](), 4000
    table, r = evaluate(problem.sample(n, rng), problem, rng, p_value=False), problem.reference
    assert abs(table["log_mmd"] - r.log_mmd - math.log(r.samples / n)) < 6 * r.log_mmd_std
    assert abs(table["energy_distance"]) < 6 * r.energy_distance_std * r.samples / n
    if r.log_density is not None:
        assert abs(table["log_density_gap"]) < 6 * r.log_density_std * math.sqrt(r.samples / n)


def test_the_bandwidths_are_the_problems(rng: torch.Generator) -> None:
    problem = MoG9()
    samples = problem.sample(500, rng) * 1.1
    table = evaluate(samples, problem, torch.Generator().manual_seed(5), p_value=False)
    truth = problem.sample(500, torch.Generator().manual_seed(5))
    assert table["log_mmd"] == pytest.approx(log_mmd(samples, truth, problem.bandwidths), rel=1e-5)
    assert table["log_mmd"] != pytest.approx(log_mmd(samples, truth), rel=1e-3)


def test_precision_and_recall_are_means_over_sets_of_the_held_out_size(rng: torch.Generator) -> None:
    problem = Digits()
    samples = problem.sample(700, rng) + 0.1 * torch.randn(700, 64, generator=rng)
    table = evaluate(samples, problem, rng, p_value=False)
    pairs = torch.tensor([precision_recall(part, problem.held_out) for part in (samples[:297], samples[297:594])])
    assert [table["precision"], table["recall"]] == pytest.approx(pairs.mean(0).tolist())
    assert table["energy_distance_held_out"] == energy_distance(samples, problem.held_out)
    few = evaluate(samples[:100], problem, rng, p_value=False)
    assert (few["precision"], few["recall"]) == pytest.approx(precision_recall(samples[:100], problem.held_out))


def test_collapsed_and_blurred_digits_are_seen(rng: torch.Generator) -> None:
    problem = Digits()
    one = problem.data[:1] + 0.01 * torch.randn(594, 64, generator=rng)
    collapsed = evaluate(one, problem, rng, p_value=False)
    assert collapsed["recall"] < 0.05
    assert collapsed["energy_distance_held_out"] > 1
    noise = problem.data_mean + problem.data_std * torch.randn(594, 64, generator=rng)
    assert evaluate(noise, problem, rng, p_value=False)["precision"] < 0.05


def test_bad_samples_are_refused(rng: torch.Generator) -> None:
    with pytest.raises(UsageError, match=r"samples of mog40 have shape \(2,\), but these have \(3,\)"):
        evaluate(torch.zeros(10, 3), MoG40(), rng)
    with pytest.raises(UsageError, match="samples must be finite, but 10 of 10"):
        evaluate(torch.full((10, 2), math.nan), MoG40(), rng)
    with pytest.raises(UsageError, match="n at least 2"):
        evaluate(torch.zeros(1, 2), MoG40(), rng)
    with pytest.raises(UsageError, match="k must be at least 1 and less than both sets' sizes, 5 and 297, but is 5"):
        evaluate(Digits().data[:5], Digits(), rng)
