"""Presets: each builds what it says, moves to another target by its scales, and takes another objective in a line."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vardistill.cli.train import _start
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import LogNormal, PowerLaw
from vardistill.domains.pictures.config import PicturesConfig
from vardistill.domains.points.config import SCALES, PointsConfig, TeacherConfig
from vardistill.domains.points.problems import PROBLEMS
from vardistill.errors import UsageError
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import OBJECTIVES, PartConfig, SumConfig, singles
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.objectives.varflow import VarFlowConfig
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain, check
from vardistill.runs.presets import (
    PICTURES,
    POINT_TARGETS,
    POINTS,
    PRESETS,
    TEACHERS,
    adapted,
    find_preset,
    with_objective,
)
from vardistill.runs.presets.points import HIGH_BATCH, MOG40, VARDIU_VARFLOW, VARFLOW, learned_posterior_varflow, moved


def small(config: Config, teacher: str = "") -> Config:
    """The same networks, in a batch that builds in no time."""
    domain = config.domain
    if isinstance(domain, PicturesConfig):
        domain = replace(domain, teacher=domain.teacher or teacher)
    elif domain.problem == "digits":  # they have no exact teacher
        domain = replace(domain, teacher=TeacherConfig("empirical", bandwidth=0.15))
    return replace(config, domain=domain, training=replace(config.training, device="cpu"))


def names_of(config: Config) -> list[str]:
    return [single.name for single in singles(config.objective)]


WHOLE, SHOWN = ("mog40", "images"), ("vardiu", "vardiu-varflow", "vardiu-gaussian-varflow", "dmd2")
"""Targets of which every recipe is built, and recipes that are built for every target."""

BUILT = [
    f"{target}-{recipe}"
    for recipes, targets in ((POINTS, POINT_TARGETS), (PICTURES, ("images", "digits")))
    for target in targets
    for recipe in recipes
    if target in WHOLE or recipe in SHOWN
]


@pytest.mark.parametrize("name", BUILT)
def test_every_preset_builds(name: str, teacher_run: Path) -> None:
    """Everything that a run of it would refuse at its start is there, but for the teacher of `images`."""
    config = small(PRESETS[name].config, str(teacher_run) if name.startswith("images") else "")
    check(config, build_domain(config))


def test_points_without_an_exact_teacher_are_told_to_choose_one() -> None:
    config = adapted(PRESETS["mog40-vardiu"].config, "digits")
    with pytest.raises(UsageError, match="digits has no exact teacher: choose an empirical or a learned one"):
        check(config, build_domain(config))


def test_pictures_without_teacher_and_data_are_told_what_is_missing() -> None:
    with pytest.raises(UsageError, match="no teacher: give --teacher FOLDER, .* or --data"):
        build_domain(PRESETS["images-vardiu"].config)


def test_every_objective_has_a_recipe_in_every_domain() -> None:
    for recipes in (POINTS, PICTURES):
        used = {name for recipe in recipes.values() for name in names_of(recipe.config)}
        assert used == set(OBJECTIVES)


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
    assert adapted(MOG40, "mog40") == MOG40


@pytest.mark.parametrize("name", SCALES)
def test_an_adapted_presets_groups_keep_their_size(name: Any) -> None:
    config = adapted(VARFLOW, name)
    group = config.training.batch // config.levels.shared
    assert group == VARFLOW.training.batch // VARFLOW.levels.shared


def test_the_groups_of_a_sum_keep_their_size() -> None:
    for config in (VARDIU_VARFLOW, learned_posterior_varflow("full")):
        before, after = config.objective, adapted(config, "digits").objective
        assert isinstance(before, SumConfig)
        assert isinstance(after, SumConfig)
        (_, own), (_, theirs) = before.parts, after.parts
        assert own.levels is not None
        assert theirs.levels is not None
        assert config.training.batch // own.levels.shared == HIGH_BATCH // theirs.levels.shared


def test_shared_levels_do_not_vanish() -> None:
    levels = LevelsConfig()
    assert [moved(replace(levels, shared=n), 1, 1, 1024).shared for n in (0, 1, 16)] == [0, 1, 4]


def test_students_in_the_plane_start_as_linear_maps_but_the_papers() -> None:
    points = {name: preset.config.domain for name, preset in PRESETS.items()}
    started = {name: d.student.linear for name, d in points.items() if isinstance(d, PointsConfig)}
    assert {name for name, linear in started.items() if not linear} == {
        f"{name}-vardiu-paper" for name in ("mog40", "mog9", "moons", "mixture2")
    }
    assert adapted(MOG40, "moons").domain == replace(MOG40.domain, problem="moons")


def test_the_papers_networks_have_its_activation() -> None:
    paper = PRESETS["mog40-vardiu-paper"].config
    assert isinstance(paper.objective, VarDiUConfig)
    assert isinstance(paper.domain, PointsConfig)
    assert paper.domain.student.activation == paper.objective.posterior_activation == "silu"


def test_digits_are_pictures_and_points_by_name() -> None:
    pictures, points = find_preset("digits-varflow").domain, find_preset("digits-points-varflow").domain
    assert isinstance(pictures, PicturesConfig)
    assert (pictures.data, pictures.teacher) == ("digits", "")
    assert isinstance(points, PointsConfig)
    assert points.problem == "digits"
    assert {"digits", "mnist", "mog40", "digits-points"} <= TEACHERS.keys()


@pytest.mark.parametrize(("name", "told"), [("mog40-vardi", "mog40-vardiu"), ("digit-varflow", "digits-varflow")])
def test_an_unknown_preset_is_told_the_nearest(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"unknown preset '{name}': did you mean .*{told}"):
        find_preset(name)


class TestFlags:
    """Flags that other flags' defaults depend on."""

    @pytest.mark.parametrize("flag", [["--problem", "digits"], ["--problem=digits"]])
    def test_another_problem_on_the_command_line_adapts_the_preset(self, flag: list[str]) -> None:
        name, config, rest = _start(["mog40-vardiu", "--steps", "3", *flag])
        assert (name, config) == ("mog40-vardiu", adapted(MOG40, "digits"))
        assert rest == ["--steps", "3", *flag]
        assert _start(["mog40-vardiu", "--problem", "mog40"])[1] == MOG40
        assert _start(["mog40-vardiu", "--problem", "nothing"])[1] == MOG40  # the flags' own check names it

    def test_a_preset_of_another_target_is_not_moved(self) -> None:
        with pytest.raises(UsageError, match="--problem moves presets of mog40: give mog40-vardiu-gaussian"):
            _start(["mixture8-vardiu-gaussian", "--problem", "mog9"])
        with pytest.raises(UsageError, match="give mog40-varflow"):
            _start(["digits-points-varflow", "--problem", "mog9"])

    @pytest.mark.parametrize("words", [["--objective", "varflow"], ["--objective=varflow"]])
    def test_an_objective_is_taken_out_of_the_words(self, words: list[str]) -> None:
        _, config, rest = _start(["mog40-vardiu", "--steps", "3", *words])
        assert config == VARFLOW
        assert rest == ["--steps", "3"]

    def test_another_problem_and_another_objective(self) -> None:
        for words in (["--problem", "mog9", "--objective", "varflow"], ["--objective", "varflow", "--problem", "mog9"]):
            assert _start(["mog40-vardiu", *words])[1] == adapted(VARFLOW, "mog9")


class TestObjective:
    """`with_objective`, what --objective does."""

    @pytest.mark.parametrize("target", ["mog40", "mixture8", "digits-points", "digits", "mnist"])
    def test_of_one_name_it_is_the_recipe_of_that_name(self, target: str) -> None:
        for name in OBJECTIVES:
            start, recipe = find_preset(f"{target}-vardiu-varflow"), find_preset(f"{target}-{name}")
            assert with_objective(start, name) == replace(recipe, domain=start.domain)

    @pytest.mark.parametrize(
        ("preset", "text", "same"),
        [
            ("digits-vardiu", "diff-instruct + 6..1*varflow", "digits-diff-instruct-varflow"),
            ("mog40-varflow", "vardiu(pool=0) + 0.21..0.021 * varflow(beta=1)", "mog40-vardiu-varflow"),
        ],
    )
    def test_a_sum_is_the_recipes_sum(self, preset: str, text: str, same: str) -> None:
        config, expected = with_objective(find_preset(preset), text), find_preset(same)
        assert config.objective == expected.objective
        assert config.levels == expected.levels

    def test_options_are_the_objectives_and_its_levels(self) -> None:
        text = "vardiu(posterior=full, candidates=2, pool=0, draws=2) + 2*varflow(beta=1.5, cross=paired, shared=4)"
        config = with_objective(MOG40, text)
        assert config.levels == replace(MOG40.levels, draws=2)
        assert isinstance(config.objective, SumConfig)
        vardiu, varflow = config.objective.parts
        assert vardiu == PartConfig(VarDiUConfig(posterior="full", candidates=2))
        assert varflow.objective == VarFlowConfig(beta=1.5, cross="paired")
        assert (varflow.weight, varflow.weight_end) == (2.0, None)
        assert varflow.levels == replace(config.levels, weight="one", shared=4, draws=1)
        assert config.domain == MOG40.domain

    def test_seed_student_and_target_stay(self) -> None:
        config = adapted(replace(MOG40, training=replace(MOG40.training, seed=7)), "mog9")
        other = with_objective(config, "diff-instruct(critic-steps=2)")
        assert isinstance(other.objective, DiffInstructConfig)
        assert (other.objective.critic_steps, other.training.seed, other.domain) == (2, 7, config.domain)

    def test_a_weight_on_a_single_objective_makes_a_sum_of_one(self) -> None:
        config = with_objective(MOG40, "2*varflow")
        assert isinstance(config.objective, SumConfig)
        assert config.objective.parts == (PartConfig(VARFLOW.objective, 2.0),)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("varflw", "unknown objective 'varflw': did you mean varflow"),
            ("sum", "unknown objective 'sum'"),
            ("varflow(betta=1)", "unknown option of varflow 'betta': did you mean beta"),
            ("vardiu(beta=1)", "unknown option of vardiu 'beta'"),
            ("varflow(beta=high)", "varflow.beta must be float, but is 'high'"),
            ("varflow(beta=5)", r"beta must be in \(0, 2\), but is 5"),
            ("varflow(beta)", "options are key=value, parted by commas, but .* has 'beta'"),
            ("varflow(beta=[)", r"cannot read '\[' in 'varflow\(beta=\[\)'"),
            ("varflow(", "cannot read 'varflow\\(' as a sum of names with weights and options"),
            ("", "cannot read '' as a sum of names"),
            ("vardiu + ", "cannot read 'vardiu \\+ ' as a sum"),
            ("vardiu varflow", "cannot read 'vardiu varflow' as a sum"),
            ("much*varflow", "a weight must be a number, but is 'much'"),
            ("6..low*varflow", "a weight must be a number, but is 'low'"),
            ("vardiu + 0*varflow", "weight must be positive and finite, but is 0.0"),
            ("vardiu + 1..-1*varflow", "weight_end must be positive and finite, but is -1.0"),
            ("vardiu + varflow + varflow", "a sum's parts must be at least one, of different kinds"),
            ("vardiu(draws=0)", "draws must be at least 1, but is 0"),
            ("vardiu(weight=heavy)", "weight must be .*'sigma2'.*, but is 'heavy'"),
        ],
    )
    def test_what_cannot_be_read_is_told_in_a_line(self, text: str, told: str) -> None:
        with pytest.raises(UsageError, match=told) as caught:
            with_objective(MOG40, text)
        assert "\n" not in str(caught.value)


def test_presets_do_not_import_torch() -> None:
    code = "import sys, vardistill.runs.presets, vardistill.cli.train, vardistill.cli.teach; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
