"""Quality against the number of dimensions."""

from __future__ import annotations

from pathlib import Path

from vardistill.bench import BENCHES, Budget, Cell, Results
from vardistill.bench.cells import Settings
from vardistill.bench.dimension import PANELS, figures
from vardistill.bench.page import page
from vardistill.bench.results import Result
from vardistill.runs.config import Config


def results(values: dict[str, dict[str, list[float]]]) -> Results:
    """Of the objectives' seeds on each problem: one value for every metric."""
    found = [
        Result(Cell(objective, "true", problem, seed, Config()), dict.fromkeys(PANELS, value), [])
        for objective, problems in values.items()
        for problem, seeds in problems.items()
        for seed, value in enumerate(seeds)
    ]
    return Results(BENCHES["dimension"], Settings("dimension", 2, Budget("cpu", 1)), {}, found, [], [])


def test_each_objective_has_a_line_over_the_mixtures(tmp_path: Path) -> None:
    """Means over the seeds, dimensions in order; digits have none to compare with."""
    measured = results({"a": {"mixture32": [0.1, 0.3], "mixture2": [0.5], "digits": [1.0]}, "b": {"mixture8": [0.7]}})
    (figure,) = figures(measured).values()
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "Mode total variation", "Samples off the modes", "Energy distance",
    ]  # fmt: skip
    for ax in figure.axes:
        lines = {
            line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if line.get_linestyle() != "None"
        }
        assert lines == {"a": [[2, 0.5], [32, 0.2]], "b": [[8, 0.7]]}
    assert "Quality against the number of dimensions" in page(measured, tmp_path)


def test_digits_alone_have_no_figure() -> None:
    assert figures(results({"a": {"digits": [1.0]}})) == {}
