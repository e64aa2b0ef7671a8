"""The signal-to-noise ratio of a step's gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vardistill.bench import BENCHES, Budget, Cell, Results, variance
from vardistill.bench.cells import Settings
from vardistill.bench.named import BIAS, ESTIMATORS, SNR, VARIANCE, tiny
from vardistill.bench.page import page
from vardistill.bench.results import Result
from vardistill.cli import main as cli
from vardistill.diffusion import score
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.diffusion.schedules import VE
from vardistill.metrics.bound import Quadrature
from vardistill.objectives.base import STUDENT, inner
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain
from vardistill.runs.presets.points import (
    DEMO,
    VARDIU_VARFLOW,
    diff_instruct,
    learned_posterior,
    learned_posterior_varflow,
)
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Trainer


def small(config: Config) -> Config:
    return replace(tiny(config), training=replace(tiny(config).training, batch=32, device="cpu", tracker="none"))


def trainer(config: Config) -> Trainer:
    domain = build_domain(config)
    domain.load(None)
    return variance.trainer_of(config, domain.student)


@pytest.mark.parametrize("signal", [0.0, 0.3])
def test_it_is_the_squared_mean_over_the_variance(signal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of g ~ N(m, I) in 5 dimensions, over 400 estimates of 48 steps, to 4.5 standard errors: 1e-5, seed 0."""
    rng, mean = torch.Generator().manual_seed(0), torch.full((5,), signal)
    monkeypatch.setattr(variance, "gradient", lambda job, update: mean + torch.randn(5, generator=rng))
    job = trainer(small(DEMO))
    estimates = torch.tensor([variance.signal_to_noise(job, 1.0) for _ in range(400)])
    # the variance in the denominator has 5 · 47 degrees of freedom: E 1/s² is larger than 1/σ² by 2/(5 · 47 − 2)
    expected = (signal**2 + 1 / 48) * (1 + 2 / 233) - 1 / 48
    assert abs(estimates.mean() - expected) < 4.5 * estimates.std() / 20


def test_a_level_is_alone_and_of_its_own_weight(rng: torch.Generator) -> None:
    """Alone it cancels, and between the parts of a sum it does not."""
    levels = NoiseLevels(VE(), LogNormal(base_start=2.0, base_end=0.5), lambda alpha, sigma: sigma**2)
    noise = variance.at_level(levels, 4.0).draw((2,), 8, 0.3, rng)
    torch.testing.assert_close(noise.sigma / noise.alpha, torch.full_like(noise.sigma, 4.0))
    torch.testing.assert_close(noise.weight, noise.sigma**2)


def test_a_sums_parts_are_all_at_the_level_with_the_weight_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is that of one fresh draw, of the student alone."""
    job, seen = trainer(small(VARDIU_VARFLOW)), []
    backward = job.backward
    monkeypatch.setattr(job, "backward", lambda update, drawn: seen.append((update, drawn)) or backward(update, drawn))
    monkeypatch.setattr(variance, "DRAWS", 2)
    variance.signal_to_noise(job, 4.0)
    for update, drawn in seen:
        assert update.trains == (STUDENT,)
        assert drawn.progress == 0
        assert len(drawn.other_noise) == 1
        for noise in (drawn.noise, *drawn.other_noise):
            torch.testing.assert_close(noise.sigma / noise.alpha, torch.full_like(noise.sigma, 4.0))
    (_, first), (_, second) = seen
    assert not torch.equal(first.z, second.z)


def results(values: dict[str, list[list[float]]]) -> Results:
    """Of the objectives' seeds, each a list of the SNR at every ratio."""
    found = [
        Result(Cell(label, "true", "mog40", seed, Config()), dict(zip(SNR, snr, strict=True)), [])
        for label, seeds in values.items()
        for seed, snr in enumerate(seeds)
    ]
    return Results(BENCHES["variance"], Settings("variance", 2, Budget()), {}, found, [], [])


def test_the_figure_has_the_means_over_the_seeds(tmp_path: Path) -> None:
    """Seeds as dots; an estimate below 0 is shown nowhere, but is in the mean."""
    measured = results({"a": [[1.0] * 6, [3.0] * 6], "b": [[-1.0, 2.0, 2.0, 2.0, 2.0, 2.0]] * 2})
    (figure,) = variance.figures(measured).values()
    (ax,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines() if line.get_linestyle() != "None"}
    assert lines == {"a": [2.0] * 6, "b": [-1.0, 2.0, 2.0, 2.0, 2.0, 2.0]}
    assert list(ax.get_lines()[0].get_xdata()) == list(variance.RATIOS)
    assert ax.get_ylim()[0] > 0
    page(measured, tmp_path)


def test_the_page_has_the_figure_and_no_budget(tmp_path: Path) -> None:
    text = page(results({"a": [[1.0] * 6]}), tmp_path)
    assert "Signal-to-noise ratio of a gradient, by noise level" in text
    assert "its own number of steps" not in text
    assert "budget" not in text


@pytest.mark.parametrize("words", [["--steps", "5"], ["--minutes", "1"], ["--budget", "cpu", "--minutes", "1"]])
def test_a_budget_is_refused_where_nothing_is_trained(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["bench", "variance", *words, "--out", str(tmp_path / "new")]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert (
        told == "vardistill: variance trains nothing that a budget could limit: leave out --budget, --steps, --minutes"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "config",
    [learned_posterior("full"), learned_posterior("full", 4), diff_instruct(2), learned_posterior_varflow("full")],
    ids=["learned", "drawn", "diff-instruct", "sum"],
)
def test_only_auxiliary_networks_are_fitted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with updates of their own, those of the student's update, and those of a sum's parts."""
    monkeypatch.setattr(variance, "CRITIC_STEPS", 3)
    job = trainer(small(config))
    before = {name: state(module) for name, module in job.networks.items()}
    variance.fit_auxiliary(job)
    after = {name: state(module) for name, module in job.networks.items()}
    for name in before:
        moved = any(not torch.equal(v, after[name][key]) for key, v in before[name].items())
        assert moved == (name != STUDENT)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in module.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [*VARIANCE.values(), learned_posterior_varflow("full")],
    ids=[*VARIANCE, "sum with a posterior"],
)
def test_every_objective_is_measured(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in {"STEPS": 2, "CRITIC_STEPS": 2, "DRAWS": 3}.items():
        monkeypatch.setattr(variance, name, steps)
    monkeypatch.setattr(variance, "DEMO", small(variance.DEMO))
    values = variance.gradient_noise(small(config), RunFolder(tmp_path))
    assert set(values) == {f"snr_{ratio:g}" for ratio in variance.RATIOS}
    assert all(math.isfinite(v) for v in values.values())  # which they are not where a gradient is 0


def test_an_exact_gradient_has_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row it is the one that it is held against, and twice it is off by as much as its length."""
    monkeypatch.setattr(variance, "DRAWS", 4)
    job = trainer(small(diff_instruct(1)))
    with torch.no_grad():
        exact = Quadrature(job.student, 64, torch.device("cpu"))
    teacher: Any = job.objective.teacher

    def loss(draw: Draw, times: float = 1.0) -> Tensor:
        with torch.no_grad():
            own = exact.score(draw.x_t, draw.noise.alpha, draw.noise.sigma).to(draw.x)
            difference = times * (own - score(teacher, draw.x_t, draw.noise.t))
        return draw.noise.weight * inner(difference, draw.x_t)

    for times in (1.0, 2.0):
        monkeypatch.setattr(job.objective, "generator_loss", lambda draw, times=times: loss(draw, times))
        g, wanted = variance.beside_exact(job, variance.at_ratio(job, 2.0), exact)
        torch.testing.assert_close(g, times * wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_the_bench_of_biases_measures_every_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DRAWS": 4, "STEPS": 2, "CRITIC_STEPS": 2, "NODES": 16}.items():
        monkeypatch.setattr(variance, name, value)
    for label in ("VarDiU, full", "VarDiU, chain of 2", "Diff-Instruct"):
        found = variance.gradient_bias(small(ESTIMATORS[label]), RunFolder(tmp_path))
        assert found.keys() == {*BIAS, "step_ms"}
        assert all(math.isfinite(v) and v >= 0 for v in found.values())
