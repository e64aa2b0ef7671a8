"""What figures show, and how they become part of a page."""

from __future__ import annotations

import re
from importlib.resources import files

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure

from vardistill.domains.points.problems import PROBLEMS, Digits, Mixture, MoG40, Moons, Problem
from vardistill.errors import UsageError
from vardistill.reports import figures
from vardistill.reports.figures import ASTRAY, COLOURS, MASSES, STUDENT, Curve, running_median, samples_figure, svg
from vardistill.reports.verdict import Standard


@pytest.fixture(scope="module")
def problem() -> MoG40:
    return MoG40()


@pytest.fixture(scope="module")
def beside(problem: MoG40) -> Figure:
    """A picture of 300 samples on the modes and 50 at a corner of the plane, which has none."""
    on_modes = problem.sample(300, torch.Generator().manual_seed(1))
    return samples_figure(torch.cat([on_modes, torch.full((50, 2), -39.0)]), problem)


def curve(values: list[float]) -> Curve:
    steps = np.arange(1.0, len(values) + 1)
    return Curve(100 * steps, 7 * steps, np.array(values))


def points(figure: Figure, panel: int, colour: str) -> int:
    clouds = [c for c in figure.axes[panel].collections if not isinstance(c, QuadContourSet)]
    return sum(len(c.get_offsets()) for c in clouds if to_rgba(c.get_facecolor()[0][:3]) == to_rgba(colour))


def test_samples_stand_beside_as_many_true_samples_on_the_same_axes(beside: Figure) -> None:
    student, target = beside.axes
    assert student.get_xlim() == target.get_xlim()
    assert student.get_ylim() == target.get_ylim()
    assert points(beside, 0, STUDENT) + points(beside, 0, ASTRAY) == points(beside, 1, figures.TRUTH) == 350


def test_samples_off_the_modes_have_their_colour(beside: Figure, problem: MoG40) -> None:
    corner = torch.full((1, 2), -39.0)
    assert figures.off_modes(corner, problem).item()
    assert not figures.off_modes(problem.denoiser.means, problem).any()
    assert points(beside, 0, ASTRAY) >= 50


def test_contours_hold_their_masses(beside: Figure, problem: MoG40) -> None:
    """Shares of 10,000 samples, against levels from 350: within 6 standard deviations, failure rate below 1e-8."""
    contours = next(c for c in beside.axes[0].collections if isinstance(c, QuadContourSet))
    log_prob = problem.log_prob(problem.sample(10_000, torch.Generator().manual_seed(2)))
    for level, mass in zip(contours.levels, MASSES, strict=True):
        assert float((log_prob >= level).float().mean()) == pytest.approx(mass, abs=6 * (0.25 / 350) ** 0.5)


def test_a_picture_needs_no_problem_and_leaves_out_what_is_not_finite() -> None:
    x = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [2.0, float("inf")], [1.0, 1.0]])
    assert points(samples_figure(x), 0, STUDENT) == 2


def test_at_most_so_many_samples_are_drawn() -> None:
    assert points(samples_figure(torch.zeros(figures.SHOWN + 5, 2)), 0, STUDENT) == figures.SHOWN


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 2, 2)])
def test_pictures_are_of_the_plane(shape: tuple[int, ...], problem: MoG40) -> None:
    with pytest.raises(UsageError, match=r"shape \(n, 2\)"):
        samples_figure(torch.zeros(shape), problem)


@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_of_every_problem(name: str) -> None:
    problem = PROBLEMS[name]()
    x = problem.sample(500, torch.Generator().manual_seed(1))
    figure = samples_figure(x, problem)
    assert len(figure.axes) == 2
    contours = [any(isinstance(c, QuadContourSet) for c in ax.collections) for ax in figure.axes]
    assert contours == [problem.denoiser is not None] * 2
    markup = svg(figure, name)
    assert "Student: " in markup
    assert "true samples" in markup


def test_the_plane_of_many_dimensions_is_that_of_the_largest_variance() -> None:
    """Orthonormal, the same every time, and of more variance than any pair of axes; true samples stay off no mode."""
    problem = Mixture(32)
    plane = figures.principal_plane(problem)
    assert torch.equal(plane, figures.principal_plane(problem))
    torch.testing.assert_close(plane.T @ plane, torch.eye(2), rtol=0, atol=1e-5)
    x = problem.sample(4000, torch.Generator().manual_seed(1))
    first, second = (x @ plane).var(0).tolist()
    assert first > second > float(x.var(0).max())
    assert figures.principal_plane(MoG40()).tolist() == [[1, 0], [0, 1]]


def test_student_and_target_of_many_dimensions_have_the_same_axes() -> None:
    problem = Mixture(8)
    student, target = samples_figure(torch.zeros(50, 8), problem).axes
    assert student.get_xlim() == target.get_xlim()
    assert student.get_ylim() == target.get_ylim()
    assert student.get_xlabel() == target.get_xlabel() == "first principal component"


def test_contours_of_many_dimensions_are_those_of_the_projected_density() -> None:
    """E log p of Vᵀx under the projected mixture: 20,000 samples against 20,000 points of its own, 4.5 errors."""
    problem = Mixture(8)
    plane = figures.principal_plane(problem)
    density = figures.projected(problem.denoiser, plane)
    rng = torch.Generator().manual_seed(3)
    ours, own = density.log_prob(problem.sample(20_000, rng) @ plane), density.log_prob(density.sample(20_000, rng))
    assert float(ours.mean()) == pytest.approx(float(own.mean()), abs=4.5 * float(own.std()) * (2 / 20_000) ** 0.5)


def test_off_modes_in_many_dimensions_and_without_modes() -> None:
    problem = Mixture(128)
    x = problem.sample(1000, torch.Generator().manual_seed(1))
    assert int(figures.off_modes(x, problem).sum()) <= 5  # 0.3 are expected
    assert figures.off_modes(x + 3, problem).all()
    assert not figures.off_modes(torch.full((3, 2), 99.0), Moons()).any()


def test_pictures_are_tiles_of_the_first_samples() -> None:
    problem = Digits()
    x = problem.sample(figures.PICTURES + 5, torch.Generator().manual_seed(1))
    student, target = (np.ma.filled(ax.images[0].get_array(), np.nan) for ax in samples_figure(x, problem).axes)
    assert student.shape == target.shape == (100, 100)
    for i in (0, 1, 10, 99):
        row, column = divmod(i, 10)
        tile = student[10 * row + 1 : 10 * row + 9, 10 * column + 1 : 10 * column + 9]
        assert tile.tolist() == x[i].view(8, 8).tolist()
    few = samples_figure(x[:3], problem).axes[0].images[0].get_array()
    assert np.isfinite(np.ma.filled(few, np.nan)).sum() == 3 * 64


@pytest.mark.parametrize("problem", [Mixture(8), Digits()])
def test_figures_need_samples_of_the_problem(problem: Problem) -> None:
    (d,) = problem.data_shape
    with pytest.raises(UsageError, match=rf"of {problem.name} need samples of shape \(n, {d}\)"):
        samples_figure(torch.zeros(10, 2), problem)


def test_a_curve_has_the_finite_values_alone() -> None:
    strange = [float("nan"), float("inf"), "1", None, True, 10**400, [1.0]]
    lines = [{"step": 1, "seconds": 2.0, "v": v} for v in strange] + [{"step": 3, "seconds": 4, "v": 5}, {}]
    kept = Curve.of(lines, "v")
    assert kept is not None
    assert (kept.steps.tolist(), kept.seconds.tolist(), kept.values.tolist()) == ([3.0], [4.0], [5.0])
    assert Curve.of(lines, "w") is None


def test_time_runs_along_the_steps() -> None:
    """7 seconds per 100 steps: a minute is 6000/7 steps."""
    figure = figures.noisy_figure(curve([1.0] * 60))
    clock = figure.axes[1]
    labels = [label.get_text() for label in clock.get_xticklabels()]
    assert len(labels) >= 3
    for label, at in zip(labels, clock.get_xticks(), strict=True):
        assert at == pytest.approx(float(label.removesuffix(" min")) * 6000 / 7)
    assert clock.get_xlim() == figure.axes[0].get_xlim()


def test_quality_shows_the_true_samples() -> None:
    figure = figures.quality_figure(curve([-9.0, -8.0, -7.5]), Standard(-8.5, 0.1))
    ax = figure.axes[0]
    low, high = ax.get_ylim()
    assert low < -9.0 < -7.5 < high
    assert ax.lines[0].get_ydata()[0] == -8.5
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-8.7, -8.3))


@pytest.mark.parametrize("scale", ["linear", "count", "log", "share"])
@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [0.5, 0.1, 0.02], [1e-9] * 50])
@pytest.mark.parametrize("standard", [None, Standard(0.0, 0.0), Standard(0.025, 0.003)])
def test_quality_of_any_values(scale: figures.Scale, values: list[float], standard: Standard | None) -> None:
    assert svg(figures.quality_figure(curve(values), standard, scale), "quality").endswith("</svg>")


def test_an_early_value_far_off_does_not_flatten_the_curve() -> None:
    low, _ = figures.noisy_figure(curve([-1e4, *np.linspace(-9, -7, 19)])).axes[0].get_ylim()
    assert low > -10
    low, _ = figures.noisy_figure(curve([-10.0, *np.linspace(-9, -7, 19)])).axes[0].get_ylim()
    assert low < -10


def test_the_gap_is_drawn_in_the_order_of_the_levels() -> None:
    names = ("ratio", "diu", "dikl", "gap", "diu_error", "dikl_error", "gap_error")
    figure = figures.gap_figure(dict.fromkeys(names, np.array([4.0, 1.0, 2.0])))
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1.0, 2.0, 4.0]


def test_the_running_median_passes_over_spikes() -> None:
    values = np.ones(60)
    values[30] = 1e6
    assert running_median(values).tolist() == [1.0] * 60
    assert running_median(np.array([3.0, 1.0])).tolist() == [3.0, 1.0]


def test_logarithmic_lines_leave_out_zeros() -> None:
    lines = figures.lines_figure({"generator": curve([0.0, 1.0]), "objective": curve([2.0, 3.0])}, log=True)
    assert [len(line.get_xdata()) for line in lines.axes[0].lines] == [1, 2]


def test_svg_follows_the_theme_and_leaves_no_trace(beside: Figure) -> None:
    before = dict(mpl.rcParams)
    markup = svg(beside, 'a "label" & <more>')
    assert dict(mpl.rcParams) == before
    assert not any(colour in markup for colour in COLOURS.values())
    assert "var(--ink)" in markup
    assert 'aria-label="a &quot;label&quot; &amp; &lt;more&gt;"' in markup
    assert "http" not in markup
    assert "Student: 350 samples" in markup


def test_svg_is_reproducible_and_its_identifiers_are_its_own() -> None:
    first, again, other = (svg(figures.noisy_figure(curve([1.0, 2.0])), label) for label in ("a", "a", "b"))
    assert first == again
    a, b = (set(re.findall(r'\bid="([^"]*)"', markup)) for markup in (first, other))
    assert a
    assert not a & b


def test_figures_and_page_have_the_same_light_colours_and_dark_ones_exist() -> None:
    light, dark = files("vardistill.reports").joinpath("report.css").read_text().split("prefers-color-scheme: dark")
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour};" in light
        assert f"--{name}: #" in dark
