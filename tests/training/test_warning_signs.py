"""Rules over lines of metrics: quiet, loud, recovered, resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from vardistill.denoisers import GaussianMixture
from vardistill.diffusion.schedules import VE
from vardistill.objectives import DMD2, SDS, Head
from vardistill.reports.page import write_report
from vardistill.training.folder import RunFolder
from vardistill.training.warning_signs import RULES, WARM_UP, WINDOW, Watch, signs

Values = Callable[[float], dict[str, Any]]
"""A line's scalars from the run's progress."""

HEALTHY = {
    "posterior_information": 2.0,
    "posterior_capacity": 3.0,
    "diversity": 2.6,
    "diversity_target": 2.7,
    "critic_lag": 0.9,
    "spread": 1.0,
    "adversarial_share": 0.1,
    "low_level_share": 0.2,
    "grad_norm_student": 3.0,
    "grad_norm_critic": 1.0,
    "skipped": 0.0,
}

BROKEN = {
    "posterior-collapse": {"posterior_information": 0.1},
    "mode-loss": {"diversity": 2.4},
    "critic-lag": {"critic_lag": 1.2},
    "collapse": {"spread": 0.1},
    "runaway": {"spread": 5.0},
    "adversarial-term": {"adversarial_share": 0.7},
    "idle-levels": {"low_level_share": 0.00005},
    "skipped-updates": {"skipped": 2.0},
}


def history(values: Values, lines: int = 40) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": 10 * n, "seconds": n, "progress": n / lines, **HEALTHY, **values(n / lines)}
        for n in range(1, lines + 1)
    ]


@pytest.mark.parametrize("name", ["posterior-collapse", "critic-lag", "idle-levels"])
def test_a_second_part_of_a_sum_is_watched_too(name: str) -> None:
    """Its scalars are under its own name; what they are held against may be, too."""
    values = {f"second/{key}": v for key, v in {**HEALTHY, **BROKEN[name]}.items()}
    (sign,) = signs(history(lambda progress: values))
    assert sign.name == f"{name}:second"


def names(lines: Iterable[dict[str, Any]]) -> list[str]:
    return [sign.name for sign in signs(lines)]


def test_a_healthy_run_has_none() -> None:
    assert signs(history(lambda progress: {})) == []
    assert signs([]) == []


@pytest.mark.parametrize("name", BROKEN)
class TestEachRule:
    def test_a_broken_run_has_its_sign(self, name: str) -> None:
        (sign,) = signs(history(lambda progress: BROKEN[name]))
        assert sign.name == name
        warm_up, window = (0.0, 1) if name == "skipped-updates" else (WARM_UP, WINDOW)
        first = max(1, math.ceil(40 * warm_up))
        assert sign.since == 10 * (first + window - 1)
        assert name in str(sign)
        assert "\n" not in str(sign)

    def test_one_that_breaks_has_it_from_then_on(self, name: str) -> None:
        (sign,) = signs(history(lambda progress: BROKEN[name] if progress > 0.5 else {}))
        delay = 1 if name == "skipped-updates" else WINDOW // 2 + 1
        assert sign.since == 10 * (20 + delay)

    def test_values_that_are_not_finite_do_not_count(self, name: str) -> None:
        for missing in (None, math.nan, math.inf):
            lines = history(lambda progress, v=missing: dict.fromkeys(BROKEN[name], v))
            assert signs(lines) == []


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - {"skipped-updates"}))  # these stay counted
class TestPassing:
    def test_one_that_recovers_has_none(self, name: str) -> None:
        assert signs(history(lambda progress: BROKEN[name] if progress < 0.5 else {})) == []

    def test_odd_lines_are_none(self, name: str) -> None:
        assert signs(history(lambda progress: BROKEN[name] if round(40 * progress) % 3 == 0 else {})) == []


def test_without_a_target_diversity_is_held_against_its_own_best() -> None:
    def values(progress: float) -> dict[str, Any]:
        return {"diversity": 2.6 if progress < 0.6 else 1.8}

    lines = [{k: v for k, v in line.items() if k != "diversity_target"} for line in history(values)]
    (sign,) = signs(lines)
    assert (sign.name, sign.since) == ("mode-loss", 260)
    assert sign.value == pytest.approx(0.8)
    assert signs(lines[:24]) == []
    rising = [line | {"diversity": 0.1 * line["step"] / 10} for line in lines]
    assert signs(rising) == []


def test_a_gradient_that_stays_a_hundred_times_its_lowest_is_an_explosion() -> None:
    def values(progress: float, factor: float) -> dict[str, Any]:
        return {"grad_norm_objective": 10.0 if progress < 0.2 else 2.0 if progress < 0.6 else 2.0 * factor}

    assert names(history(lambda progress: values(progress, 101))) == ["gradient-explosion:objective"]
    assert names(history(lambda progress: values(progress, 99))) == []
    spike = {0.8: {"grad_norm_generator": 1e6}}
    assert names(history(lambda progress: spike.get(progress, {}))) == []


def test_parts_of_a_sum_have_signs_of_their_own() -> None:
    lines = history(lambda progress: {"varflow/low_level_share": 0.00001, "vardiu/low_level_share": 0.1})
    assert names(lines) == ["idle-levels:varflow"]


@pytest.mark.parametrize(
    ("excess", "found"),
    [
        (lambda progress: 0.1 * (1 - progress), []),
        (lambda progress: 0.02, ["behind-teacher"]),
        (lambda progress: 0.002 + 0.006 * progress, ["leaving-teacher"]),
        (lambda progress: 0.002 * round(40 * progress % 2), []),
    ],
    ids=["nearing", "far", "leaving", "noise"],
)
def test_evaluations_tell_of_a_student_that_is_worse_than_its_teachers_sampler(
    excess: Callable[[float], float], found: list[str]
) -> None:
    lines = [
        line
        for train in history(lambda progress: {})
        for line in (
            train,
            {"kind": "eval", "step": train["step"], "seconds": 1.0, "teacher_excess": excess(train["progress"])},
        )
    ]
    assert names(lines) == found


def test_other_lines_and_runs_without_diagnostics_are_no_matter() -> None:
    assert signs([{"kind": "eval", "step": 5, "seconds": 1.0, "critic_lag": 9.0}]) == []
    assert names([{"kind": "train", "step": 5, "seconds": 1.0, "skipped": 1.0}]) == ["skipped-updates"]


def test_a_sign_is_told_once_and_the_watch_agrees_with_the_history() -> None:
    lines = history(lambda progress: BROKEN["critic-lag"] if 0.3 < progress < 0.6 or progress > 0.8 else {})
    watch = Watch()
    told = [(line["step"], sign.name) for line in lines for sign in watch.observe(line)]
    assert told == [(150, "critic-lag")]
    assert watch.signs == signs(lines)
    assert Watch(lines[:20]).observe(lines[20]) == []
    for n in range(len(lines)):
        resumed = Watch(lines[:n])
        for line in lines[n:]:
            resumed.observe(line)
        assert resumed.signs == watch.signs


def test_a_name_is_one_kind_of_trouble() -> None:
    assert {rule.name for rule in RULES} == {*BROKEN, "gradient-explosion", "behind-teacher", "leaving-teacher"}


class TestTrainer:
    def spoiled(self, folder: Path | None = None, **options: Any) -> Any:
        """A run whose third update is not finite."""
        trainer = small_runs.trainer("batch", None if folder is None else RunFolder(folder), **options)
        calls = iter(range(1, 1000))

        def spoiled(loss: small_runs.Loss) -> small_runs.Loss:
            return lambda draw: loss(draw) * (math.nan if next(calls) == 3 else 1.0)

        small_runs.in_training(trainer.objective, spoiled)
        return trainer

    def test_it_tells_of_a_sign_once_and_names_it_in_the_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = self.spoiled(log_every=2, steps=8, warmup=0.0)
        trainer.run()
        shown = capsys.readouterr()
        assert shown.err.count("warning: skipped-updates since step 4") == 1
        assert shown.out == ""
        assert trainer.books.figures()[0] == "sign skipped-updates"
        assert names(trainer.history) == ["skipped-updates"]

    def test_a_resumed_run_has_the_signs_of_its_lines(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.spoiled(tmp_path, log_every=2, steps=4, warmup=0.0).run()
        capsys.readouterr()
        resumed = small_runs.trainer("batch", RunFolder(tmp_path), log_every=2, steps=8, warmup=0.0)
        resumed.run(resume=True)
        assert "warning" not in capsys.readouterr().err
        assert resumed.books.watch.signs == signs(resumed.history)
        assert [sign.since for sign in resumed.books.watch.signs] == [4]


class TestReport:
    def section(self, folder: Path, values: dict[str, Any]) -> str:
        """The page's section of a run with these scalars in every line."""
        run = RunFolder(folder)
        for line in history(lambda progress: values):
            run.log("train", line["step"], line["seconds"], {k: v for k, v in line.items() if isinstance(v, float)})
        html = write_report(run).read_text(encoding="utf-8")
        return html.partition("<h2>Warning signs</h2>")[2].partition("<h2>")[0]

    def test_it_says_so_where_there_are_none(self, tmp_path: Path) -> None:
        assert "None at the end of the run." in self.section(tmp_path, {})

    def test_it_lists_what_is_there_with_what_to_do(self, tmp_path: Path) -> None:
        section = self.section(tmp_path, {"critic_lag": 1.2345, "<b>/low_level_share": 1e-6})
        for text in ("critic-lag", '<td class="plain">80</td>', "1.23", "1.05", "Raise critic_steps", "&lt;b&gt;"):
            assert text in section
        assert "<b>" not in section

    def test_it_is_not_there_for_runs_that_did_not_look(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path)
        run.log("train", 1, 1.0, {"loss": 1.0, "skipped": 0.0})
        assert "Warning signs" not in write_report(run).read_text(encoding="utf-8")


def test_score_distillation_sampling_collapses_and_is_told() -> None:
    """A student as wide as the data ends at one of a Gaussian's points: its gradient is always inwards."""
    exact = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), std=2.0, schedule=VE())
    training = small_runs.config(steps=200, batch=32, log_every=10, eval_every=0, lr=2e-2, warmup=0.0)
    run = small_runs.small_distill(teacher=None, objective=SDS(exact), training=training)
    assert {"collapse", "mode-loss"} <= set(names(run.history))
    assert run.history[0]["spread"] > 0.5


def test_an_adversarial_terms_share_grows_with_its_weight() -> None:
    shares = []
    for weight in (1e-3, 10.0, 1e5):
        run = small_runs.small_distill(teacher=None, objective=dmd2(weight), data=small_runs.data())
        shares.append(run.history[-1]["adversarial_share"])
    assert 0 < shares[0] < 0.01 < shares[1] < 0.9 < shares[2] < 1


def dmd2(weight: float) -> DMD2:
    of_critic = small_runs.objective("diff-instruct")
    return DMD2(of_critic.teacher, of_critic.critic, Head(8).double(), 1, 2.0, generator_gan=weight)
