"""The signal-to-noise ratio of a step's gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import small_runs
from vardistill.bench import variance
from vardistill.bench.named import VARIANCE, tiny
from vardistill.config import Config
from vardistill.presets import VARDIU_VARFLOW, learned_posterior_varflow
from vardistill.runs import RunFolder


def small(config: Config) -> Config:
    return replace(tiny(config), training=replace(tiny(config).training, batch=32, device="cpu", tracker="none"))


@pytest.mark.parametrize("signal", [0.0, 0.3])
def test_it_is_the_squared_mean_over_the_variance(signal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of g ~ N(m, I) in 5 dimensions, over 400 estimates of 48 steps, to 4.5 standard errors: 1e-5, seed 0."""
    rng, mean = torch.Generator().manual_seed(0), torch.full((5,), signal)
    monkeypatch.setattr(variance, "gradient", lambda trainer: mean + torch.randn(5, generator=rng))
    trainer = small_runs.trainer()
    estimates = torch.tensor([variance.signal_to_noise(trainer, 1.0) for _ in range(400)])
    # the variance in the denominator has 5 · 47 degrees of freedom: E 1/s² is larger than 1/σ² by 2/(5 · 47 − 2)
    expected = (signal**2 + 1 / 48) * (1 + 2 / 233) - 1 / 48
    assert abs(estimates.mean() - expected) < 4.5 * estimates.std() / 20


def test_a_level_is_alone_and_of_weight_one(rng: torch.Generator) -> None:
    noise = variance.at_level(small_runs.levels(), 4.0).draw((2,), 8, 0.3, rng)
    torch.testing.assert_close(noise.sigma / noise.alpha, torch.full_like(noise.sigma, 4.0))
    assert torch.equal(noise.weight, torch.ones_like(noise.weight))


@pytest.mark.parametrize("kind", ["learned", "drawn", "diff-instruct", "sum"])
def test_only_auxiliary_networks_are_fitted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with steps of their own, those without, and those of a sum's parts."""
    monkeypatch.setattr(variance, "CRITIC_STEPS", 3)
    trainer = small_runs.trainer(kind)
    if kind == "sum":
        trainer.objective.parts[0].critic_steps = trainer.objective.critic_steps = 0
    before = {name: state(module) for name, module in parts(trainer).items()}
    variance.fit_auxiliary(trainer)
    after = {name: state(module) for name, module in parts(trainer).items()}
    assert all(torch.equal(v, after["generator"][name]) for name, v in before["generator"].items())
    assert any(not torch.equal(v, after["objective"][name]) for name, v in before["objective"].items())


def parts(trainer: Any) -> dict[str, Any]:
    return {"generator": trainer.generator, "objective": trainer.objective}


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in module.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [*VARIANCE.values(), VARDIU_VARFLOW, learned_posterior_varflow("full")],
    ids=[*VARIANCE, "sum", "sum with a posterior"],
)
def test_every_objective_is_measured(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in {"STEPS": 2, "CRITIC_STEPS": 2, "DRAWS": 3}.items():
        monkeypatch.setattr(variance, name, steps)
    monkeypatch.setattr(variance, "DEMO", small(variance.DEMO))
    values = variance.gradient_noise(small(config), RunFolder(tmp_path))
    assert set(values) == {f"snr_{ratio:g}" for ratio in variance.RATIOS}
    assert all(math.isfinite(v) for v in values.values())  # which they are not where a gradient is 0
