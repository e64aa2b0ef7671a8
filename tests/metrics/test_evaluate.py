"""The table of metrics on MoG-40: true samples at the reference values, bad ones away from them."""

from __future__ import annotations

import math

import pytest
import torch

from vardistill.errors import UsageError
from vardistill.metrics import energy_distance, evaluate, log_density, log_mmd, mmd2, mode_statistics
from vardistill.problems import MoG40

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


def test_bad_samples_are_refused(rng: torch.Generator) -> None:
    with pytest.raises(UsageError, match=r"samples of mog40 have shape \(2,\), but these have \(3,\)"):
        evaluate(torch.zeros(10, 3), MoG40(), rng)
    with pytest.raises(UsageError, match="samples must be finite, but 10 of 10"):
        evaluate(torch.full((10, 2), math.nan), MoG40(), rng)
    with pytest.raises(UsageError, match="n at least 2"):
        evaluate(torch.zeros(1, 2), MoG40(), rng)
