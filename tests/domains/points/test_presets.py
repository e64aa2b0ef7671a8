"""Presets: scales agree with the problems', and a preset moves to another problem by them."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from vardistill.bench.named import BENCHES, TUNED
from vardistill.bench.running import shared_teacher, teacher_name
from vardistill.cli.train import _start
from vardistill.diffusion.levels import LogNormal, PowerLaw
from vardistill.domains.points.presets import (
    HIGH_BATCH,
    MOG40,
    PRESETS,
    SCALES,
    VARDIU_VARFLOW,
    VARFLOW,
    adapted,
    learned_posterior_varflow,
    rescaled,
    teacher_fit_of,
)
from vardistill.domains.points.problems import PROBLEMS
from vardistill.runs.build import build_generator, build_levels, build_problem
from vardistill.runs.config import LevelsConfig, TeacherConfig, VarDiUConfig, VarDiUVarFlowConfig


def test_every_problem_has_its_scale() -> None:
    assert SCALES.keys() == PROBLEMS.keys()
    for name, scale in SCALES.items():
        problem = PROBLEMS[name]()
        assert (scale.dimension,) == problem.data_shape
        if problem.modes is not None:
            assert scale.finest == pytest.approx(problem.modes.std, rel=0.01)
        if scale.dimension > 2:
            assert scale.blurring == pytest.approx(math.sqrt(scale.dimension / 2) * problem.data_std, rel=0.03)


def test_levels_move_in_proportion_to_the_scales() -> None:
    before, after = MOG40.levels.distribution, adapted(MOG40, "mog9").levels.distribution
    assert isinstance(before, LogNormal)
    assert isinstance(after, LogNormal)
    assert after.base_start / before.base_start == pytest.approx(3.0 / 15.0)
    assert after.broad_max / before.broad_max == pytest.approx(3.0 / 15.0)
    assert after.base_end / before.base_end == pytest.approx(0.5 / 1.31)
    paper = adapted(PRESETS["mog40-vardiu-paper"].config, "moons").levels.distribution
    assert isinstance(paper, PowerLaw)
    assert (paper.sigma_min, paper.sigma_max) == pytest.approx((0.1 * 0.1 / 1.31, 20.0 * 0.5 / 15.0))


@pytest.mark.parametrize("name", SCALES)
def test_an_adapted_preset_builds(name: str) -> None:
    config = adapted(VARFLOW, name)
    problem = build_problem(name, config.levels.schedule)
    generator = build_generator(config, problem)
    assert generator.data_shape == problem.data_shape
    assert build_levels(config.levels, problem).shared == config.levels.shared
    group = config.training.batch // config.levels.shared
    assert group == VARFLOW.training.batch // VARFLOW.levels.shared


@pytest.mark.parametrize("flag", [["--problem", "digits"], ["--problem=digits"]])
def test_another_problem_on_the_command_line_adapts_the_preset(flag: list[str]) -> None:
    name, config, rest = _start(["mog40-vardiu", "--steps", "3", *flag])
    assert (name, config) == ("mog40-vardiu", adapted(MOG40, "digits"))
    assert rest == ["--steps", "3", *flag]
    assert _start(["mog40-vardiu", "--problem", "mog40"])[1] == MOG40
    assert _start(["mog40-vardiu", "--problem", "nothing"])[1] == MOG40  # the flags' own check names it


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_plans_cells_of_its_own_names(name: str, tmp_path: Path) -> None:
    cells = BENCHES[name].plan(seeds=2)
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_students_in_the_plane_start_as_linear_maps_but_the_papers() -> None:
    started = {name: preset.config.generator.linear for name, preset in PRESETS.items()}
    assert {name for name, linear in started.items() if not linear} == {"mog40-vardiu-paper"}
    assert adapted(MOG40, "moons").generator == MOG40.generator


def test_the_papers_networks_have_its_activation() -> None:
    paper = PRESETS["mog40-vardiu-paper"].config
    assert isinstance(paper.objective, VarDiUConfig)
    assert paper.generator.activation == paper.objective.posterior_activation == "silu"


def test_starts_are_compared_with_all_else_equal() -> None:
    cells = BENCHES["start"].plan(seeds=1)
    linear = {cell.objective: cell.config for cell in cells if cell.config.generator.linear}
    others = {cell.objective: cell.config for cell in cells if not cell.config.generator.linear}
    assert len(linear) == len(others) == 6
    for name, config in linear.items():
        other = others[name.replace("linear", "random")]
        assert replace(other, generator=replace(other.generator, linear=True)) == config


def test_tuning_tries_as_much_for_every_objective_and_one_thing_at_a_time() -> None:
    cells = {cell.objective: cell.config for cell in BENCHES["tuning"].plan(seeds=1)}
    for name in TUNED:
        moved = {label: config for label, config in cells.items() if label.startswith(f"{name}, ")}
        assert len(moved) == 8
        for config in moved.values():
            preset = cells[name]
            parts = [f.name for f in fields(config) if getattr(config, f.name) != getattr(preset, f.name)]
            assert len(parts) == 1
            (part,) = parts
            changes = [
                f.name
                for f in fields(getattr(config, part))
                if getattr(getattr(config, part), f.name) != getattr(getattr(preset, part), f.name)
            ]
            assert changes in (["batch"], ["lr", "auxiliary_lr"], ["auxiliary_lr"], ["distribution"], ["pool"],
                               ["beta"], ["varflow_weight", "varflow_weight_end"])  # fmt: skip


def test_the_groups_of_a_sum_keep_their_size() -> None:
    for config in (VARDIU_VARFLOW, learned_posterior_varflow("full")):
        before, after = config.objective, adapted(config, "digits").objective
        assert isinstance(before, VarDiUVarFlowConfig)
        assert isinstance(after, VarDiUVarFlowConfig)
        assert config.training.batch // before.varflow_shared == HIGH_BATCH // after.varflow_shared


def test_shared_levels_do_not_vanish() -> None:
    assert [rescaled(shared, 1024) for shared in (0, 1, 16)] == [0, 1, 4]


def test_the_steps_whose_noise_is_compared_are_of_one_size() -> None:
    cells = BENCHES["variance"].plan(seeds=1)
    assert {cell.config.training.batch * cell.config.levels.draws for cell in cells} == {1024}


def test_a_shared_teacher_is_the_one_that_a_run_alone_would_fit() -> None:
    vp = replace(MOG40, teacher=TeacherConfig("learned", teacher_samples=500), levels=LevelsConfig(schedule="vp"))
    fit = shared_teacher(vp)
    assert fit == teacher_fit_of(vp)
    assert (fit.schedule, fit.samples) == ("vp", 500)
    ve = shared_teacher(replace(vp, levels=LevelsConfig(schedule="ve")))
    assert ve is not None
    assert teacher_name(fit) != teacher_name(ve) == "mog40-500-seed0"
