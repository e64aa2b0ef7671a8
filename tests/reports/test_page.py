"""The page of a run: complete, self-contained, safe, and there whatever is missing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vardistill.domains.points.problems import PROBLEMS, MoG40
from vardistill.errors import UsageError
from vardistill.metrics import evaluate
from vardistill.reports.page import write_report
from vardistill.runs.config import Config
from vardistill.training import config_files
from vardistill.training.config import TrainingConfig
from vardistill.training.folder import RunFolder

N = 1000
HOSTILE = "\"><script>alert(1)</script><img src=http://x.example/y onerror=alert(1)>'&{7*7}$x_1$"
VOID = {"meta", "img", "br", "link", "input"}
LINKS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
SECTIONS = (
    "Samples",
    "Quality over training",
    "Bound per noise level",
    "Optimisation",
    "All metrics",
    "How it was made",
)


class Page(HTMLParser):
    """A page's tags, links and text; raises where tags are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.markup = path.read_text(encoding="utf-8")
        self.feed(self.markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for name, v in attrs if name in LINKS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def check(self) -> Page:
        """It runs nothing and loads nothing."""
        assert not self.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
        assert not self.handlers
        assert all(link.startswith(("data:", "#")) for link in self.links)
        assert "default-src 'none'" in self.markup
        assert "@import" not in self.markup
        assert self.markup.count("url(") == self.markup.count("url(#")
        return self


@pytest.fixture(scope="module")
def problem() -> MoG40:
    return MoG40()


@pytest.fixture(scope="module")
def samples(problem: MoG40) -> torch.Tensor:
    return problem.sample(N, torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def table(problem: MoG40, samples: torch.Tensor) -> dict[str, Any]:
    return dict(evaluate(samples, problem, torch.Generator().manual_seed(4), p_value=False)) | {"mmd_p_value": 0.4}


@pytest.fixture
def run(tmp_path: Path, samples: torch.Tensor, table: dict[str, Any]) -> RunFolder:
    """A complete run whose student is the target itself."""
    folder = RunFolder(tmp_path / "my run")
    folder.path.mkdir()
    config_files.write(Config(training=TrainingConfig(steps=30_000)), folder.config)
    for step in range(3000, 30_001, 3000):
        values = {"loss": 1.0, "bound": 0.5, "lr": 1e-3, "skipped": 0.0, "grad_norm_student": 2.0}
        values |= {"ratio_05": 0.1, "ratio_50": 0.3, "ratio_95": 0.9, "grad_norm_posterior": 1.0}
        folder.log("train", step, step / 50, values)
        folder.log("eval", step, step / 50 + 1, {name: float(v) for name, v in table.items()})
    folder.environment.write_text(json.dumps({"vardistill": "9.8.7", "threads": 2, "accelerator": None}))
    np.savez(folder.path / "samples.npz", samples=samples.numpy())
    (folder.path / "evaluation.json").write_text(json.dumps(table))
    names = ("ratio", "diu", "dikl", "gap", "diu_error", "dikl_error", "gap_error", "quadrature_error")
    (folder.path / "bound.json").write_text(json.dumps({name: [0.1, 0.2] for name in names}))
    return folder


def report(run: RunFolder, **arguments: Any) -> Page:
    path = write_report(run, **arguments)
    assert path == run.path / "report.html"
    return Page(path).check()


def test_a_complete_run(run: RunFolder) -> None:
    page = report(run)
    assert all(section in page.text for section in SECTIONS)
    assert "my run" in page.text
    assert "Matches the target" in page.text
    assert "It finds 40 of the target's 40 modes" in page.text
    assert "A two-sample test cannot tell them from true samples (p = 0.400)." in page.text
    assert "Made by vardistill 9.8.7" in page.text
    assert "10 min 1 s" in page.text
    assert "None: all gradients were finite." in page.text
    assert page.text.count("problem: mog40") == page.text.count("weight: sigma2_linear") == 1
    assert page.markup.count("<svg") == 1 + 5 + 1 + 5
    assert "data:image/png;base64," in page.markup


def test_the_page_is_the_same_every_time(run: RunFolder) -> None:
    assert report(run).markup == report(run).markup


def test_a_bad_student_is_called_one(run: RunFolder, table: dict[str, Any]) -> None:
    bad = table | {"modes_found": 12, "off_mode": 0.3, "log_density_gap": -4.0, "mmd_p_value": 0.005}
    (run.path / "evaluation.json").write_text(json.dumps(bad))
    page = report(run)
    assert "Far from the target" in page.text
    assert "It finds 12 of the target's 40 modes" in page.text
    assert "4.000 nats below" in page.text
    assert "30.0 % of them lie off the modes" in page.text
    assert "A two-sample test tells them from true samples (p = 0.005)." in page.text


def test_the_last_evaluation_stands_in_for_the_final_one(run: RunFolder) -> None:
    (run.path / "evaluation.json").unlink()
    assert "last evaluation during training, at step 30,000" in report(run).text


def test_remarks(run: RunFolder, samples: torch.Tensor) -> None:
    log_mmd = np.linspace(-3, -5, 12)
    run.metrics.write_text("")
    for step, v in enumerate(log_mmd, 1):
        run.log("eval", 1000 * step, float(step), {"log_mmd": v})
    run.log("train", 12_000, 12.0, {"skipped": 3.0})
    spoilt = samples.clone()
    spoilt[:7] = float("nan")
    np.savez(run.path / "samples.npz", samples=spoilt.numpy())
    text = report(run).text
    assert "3 of 12,000 steps were skipped" in text
    assert "stopped at step 12,000 of 30,000" in text
    assert "still improving: log-MMD fell by 0.55" in text
    assert f"7 of {N:,} samples are not finite" in text


@pytest.mark.parametrize(
    "missing",
    ["config.yaml", "metrics.jsonl", "environment.json", "samples.npz", "evaluation.json", "bound.json"],
)
def test_any_file_may_be_missing(run: RunFolder, missing: str) -> None:
    (run.path / missing).unlink()
    assert "my run" in report(run).text


def test_an_empty_folder(tmp_path: Path) -> None:
    text = report(RunFolder(tmp_path)).text
    assert "The run has logged nothing yet." in text
    assert not any(section in text for section in SECTIONS)


def test_a_users_own_model_with_a_metric_of_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log("train", 100, 4.0, {"loss": 1.0})
    run.log("eval", 100, 4.5, {"fid": 12.3456})
    np.savez(run.path / "samples.npz", samples=np.zeros((5, 3, 8, 8)))
    text = report(run).text
    assert "Trained for 100 steps in 4.5 s; there is no evaluation against a known target." in text
    assert text.count("fid") == 2
    assert "12.3" in text
    assert "uniform in" not in text


def test_a_problem_may_be_given(run: RunFolder, problem: MoG40) -> None:
    run.config.unlink()
    assert "No verdict" in report(run).text
    assert "Matches the target" in report(run, problem=problem).text


def test_the_run_of_a_teacher(run: RunFolder) -> None:
    (run.path / "evaluation.json").write_text(json.dumps({"ratios": [1.0], "relative_score_error": [0.1]}))
    report(run)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_run_of_every_problem(tmp_path: Path, name: str) -> None:
    problem, run = PROBLEMS[name](), RunFolder(tmp_path)
    x = problem.sample(500, torch.Generator().manual_seed(3))
    run.config.write_text(f"domain: {{problem: {name}}}\n")
    np.savez(run.path / "samples.npz", samples=x.numpy())
    values = evaluate(x, problem, torch.Generator().manual_seed(4), p_value=False)
    (run.path / "evaluation.json").write_text(json.dumps(values))
    levels = {"ratio_05": 0.1, "ratio_50": 0.3, "ratio_95": 0.9}
    for step in (100, 200):
        run.log("train", step, float(step), levels)
        run.log("eval", step, float(step), {name: float(v) for name, v in values.items()})
    page = report(run)
    modes = 0 if problem.modes is None else len(problem.modes)
    assert ("modes_found" in values) == (f"of the target's {modes} modes" in page.text)
    assert ("precision" in values) == ("within the held-out data's manifold" in page.text)
    assert ("Contours hold" in page.text) == (problem.denoiser is not None)
    assert ("principal components" in page.text) == (name in ("mixture8", "mixture32", "mixture128"))
    assert "How the grades are made" in page.text
    assert "Samples" in page.text
    assert "nan" not in page.text.lower()


def test_what_files_say_is_escaped(run: RunFolder) -> None:
    hostile = RunFolder(run.path.rename(run.path.parent / HOSTILE.replace("/", "∕")))
    hostile.config.write_text(
        json.dumps({"domain": {"problem": HOSTILE, "teacher": {"teacher": HOSTILE}}, HOSTILE: HOSTILE})
    )
    hostile.environment.write_text(json.dumps({HOSTILE: HOSTILE, "vardistill": HOSTILE, "threads": [HOSTILE]}))
    hostile.log("eval", 40_000, 900.0, {HOSTILE: 1.0})
    hostile.log("train", 40_000, 900.0, {f"grad_norm_{HOSTILE}": 1.0})
    (hostile.path / "evaluation.json").write_text(json.dumps({HOSTILE: 1.0, "log_mmd": HOSTILE}))
    page = report(hostile)
    assert page.text.count("alert(1)") >= 8


def test_values_that_make_no_sense_are_left_out(run: RunFolder) -> None:
    senseless = [3, None, {}, {"kind": "eval"}, {"kind": "train", "step": "1", "seconds": 2}, [], "x"]
    senseless += [{"kind": "eval", "step": 10**400, "seconds": 1.0, "log_mmd": -8.0}]
    senseless += [
        {"kind": "eval", "step": 31_000, "seconds": 700.0, "log_mmd": v} for v in ("a", None, 1e308, True, {})
    ]
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in senseless)
        file.write('{"kind": "eval", "step": 32000, "seconds": 800, "off_mode": NaN, "mode_tv": -Infinity}\n')
    run.config.write_text("domain: {problem: [mog40], teacher: [3]}\ntraining: 3\nobjective: {candidates: {a: b}}\n")
    (run.path / "bound.json").write_text(json.dumps({"ratio": [1.0, 2.0], "diu": [1.0]}))
    page = report(run)
    assert "Bound per noise level" not in page.text
    assert "nan" not in page.text.lower()


@pytest.mark.parametrize("field", ["ratio", "gap_error"])
def test_a_bound_that_makes_no_sense_is_left_out(run: RunFolder, field: str) -> None:
    path = run.path / "bound.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: [-1.0, 1.0]}))
    assert "Bound per noise level" not in report(run).text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.npz", b"PK\x03\x04 cut short"),
        ("samples.npz", b""),
        ("evaluation.json", b'{"log_mmd": '),
        ("environment.json", b"\xff\xfe\x00"),
        ("bound.json", b"[" * 100_000),
        ("config.yaml", b"a: [1, 2"),
        ("metrics.jsonl", b"\xff\xff"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(run: RunFolder, name: str, content: bytes) -> None:
    (run.path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"cannot read .*{name}: ") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((3, 2))},
        {"samples": np.zeros(3)},
        {"samples": np.array(["a"])},
        {"samples": np.array([{}, print])},
    ],
)
def test_samples_that_are_none_are_refused(run: RunFolder, arrays: dict[str, Any]) -> None:
    np.savez(run.path / "samples.npz", **arrays)
    with pytest.raises(UsageError, match=r"cannot read .*samples\.npz: "):
        write_report(run)


@pytest.mark.parametrize("beside", [np.zeros((3, 2)), np.zeros((3, 8, 8)), np.zeros((0, 1, 8, 8))])
def test_pictures_beside_a_students_that_are_none_are_left_out(run: RunFolder, beside: np.ndarray) -> None:
    np.savez(run.path / "samples.npz", samples=np.zeros((3, 1, 8, 8)), teacher=beside, nearest=np.zeros((3, 4, 8, 8)))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Pictures: Student, Nearest in the training set" in page


def test_no_pictures_have_no_section(run: RunFolder) -> None:
    np.savez(run.path / "samples.npz", samples=np.zeros((0, 1, 8, 8)))
    assert "<h2>Pictures</h2>" not in write_report(run).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(run: RunFolder) -> None:
    (run.path / "report.html").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        write_report(run)


def test_the_bound_and_its_gap_have_curves(run: RunFolder) -> None:
    for step in (100, 200):
        run.log("eval", step, float(step), {"diu": 0.2 / step, "dikl": 0.1 / step, "gap": 0.1 / step})
    page = write_report(run).read_text()
    assert all(page.count(f">{title}<") >= 1 for title in ("Bound, DiU", "Diffusive KL", "Gap, DiU − DiKL"))


def test_the_size_of_the_evaluation_sets_its_floor_and_is_no_metric(run: RunFolder) -> None:
    def page(samples: int) -> str:
        (run.path / "evaluation.json").write_text(json.dumps({"log_mmd": -5.0, "samples": samples}))
        return write_report(run).read_text()

    assert page(1_000) != page(10_000)
    assert ">samples<" not in page(1_000)
