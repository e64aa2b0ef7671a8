"""The page of a run: one HTML file with its figures inside, which opens without a network.

It shows what the run folder holds (`runs`), reads files only, and leaves out what is not there. Beyond what training
writes it looks for `evaluation.json` (final metrics), `samples.npz` (array `samples`) and `bound.json` (the fields
of `metrics.BoundGap`). A run folder may come from somebody else: whatever its files say is escaped, and the page's
own policy allows neither scripts nor requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from vardistill import figures
from vardistill.errors import UsageError
from vardistill.figures import Curve, is_number, svg
from vardistill.problems import PROBLEMS, Problem
from vardistill.runs import RunFolder
from vardistill.verdict import DRAWS, LEVEL, LIMITS, MATCHING, Grade, Standard, grades, overall, standards

SAMPLES = 10_000
"""Per evaluation, where neither the samples nor the configuration tell."""

BOUND_FIELDS = ("ratio", "diu", "dikl", "gap", "diu_error", "dikl_error", "gap_error")

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page may load: pictures and styles in itself."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: in the page.
        show: a value.
        truth: what true samples score, where there is no `Standard`.
        meaning: in half a line.
        axis: arguments of `figures.quality_figure`.
    """

    title: str
    show: Callable[[float], str]
    meaning: str
    truth: str = ""
    axis: Mapping[str, bool] = field(default_factory=dict)


def fixed(digits: int, signed: bool = False) -> Callable[[float], str]:
    """Formats with this many decimals and a minus sign that is one."""
    return lambda v: f"{v:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def significant(v: float) -> str:
    """Three significant digits."""
    return f"{v:,.0f}" if 1000 <= abs(v) < 1e7 else f"{v:.3g}".replace("-", "−")


def percent(v: float) -> str:
    """A share, with two significant digits below 10 %."""
    return f"{100 * v:.2g} %" if abs(v) < 0.1 else f"{100 * v:.1f} %"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two largest that matter."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


METRICS = {
    "log_density": Metric("Mean log-density", fixed(3), "of the samples under the target, in nats"),
    "log_density_gap": Metric(
        "Log-density gap", fixed(3, signed=True), "its difference to the target's own mean, in nats"
    ),
    "log_mmd": Metric("log-MMD", fixed(2), "logarithm of the biased MMD² to as many true samples"),
    "mmd2_unbiased": Metric("MMD², unbiased", significant, "of either sign at the target", "0 in the mean"),
    "mmd_p_value": Metric(
        "Two-sample p-value",
        fixed(3),
        f"permutation test of MMD²; below {LEVEL:g} it tells the two apart",
        "uniform in (0, 1)",
    ),
    "energy_distance": Metric("Energy distance", significant, "unbiased estimate", "0 in the mean"),
    "modes_found": Metric("Modes found", fixed(0), "modes that hold at least a quarter of their mass"),
    "off_mode": Metric(
        "Samples off the modes",
        percent,
        "farther than 4 standard deviations from every mode",
        axis={"log": True, "percent": True},
    ),
    "mode_tv": Metric(
        "Mode total variation", fixed(3), "half the sum of the errors of the modes' masses", axis={"log": True}
    ),
}

CHARTS = ("log_density", "log_mmd", "modes_found", "off_mode", "mode_tv")

GRADES = {
    Grade.MATCHES: ("matches", "✓ matches the target", "Matches the target"),
    Grade.CLOSE: ("close", "✓ close", "Close to the target"),
    Grade.ROUGH: ("rough", "≈ rough", "Roughly the target"),
    Grade.FAR: ("far", "✕ far", "Far from the target"),
}
"""Class in the page, mark of a metric, heading of a run."""


@dataclass(frozen=True)
class Contents:
    """What a run folder holds, and what follows from it.

    Attributes:
        name: of the folder.
        train: lines of metrics.
        evals: lines of metrics.
        config_text: the configuration as written, "" without.
        config: the same, parsed; {} without.
        environment: versions and hardware.
        final: metrics at the end.
        measured: whether `final` comes from `evaluation.json`, not from the last evaluation during training.
        samples: (n, *data) or None.
        bound: the fields of `metrics.BoundGap`, or None.
        problem: the target, or None.
        truth: what as many true samples score.
    """

    name: str
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    final: dict[str, float]
    measured: bool
    samples: Tensor | None
    bound: dict[str, NDArray[np.float64]] | None
    problem: Problem | None
    truth: dict[str, Standard]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return self.train + self.evals

    @property
    def steps(self) -> int:
        """Updates done."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Time spent."""
        return max((float(line["seconds"]) for line in self.lines), default=0.0)

    def setting(self, *keys: str) -> Any:
        """A value of the configuration, None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def write_report(run: RunFolder, problem: Problem | None = None) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: the folder; every file in it is optional.
        problem: the target; default the one that the configuration names.

    Returns:
        The path of the page.

    Raises:
        UsageError: for files that cannot be read, or a folder that cannot be written.
    """
    path = run.path / "report.html"
    html = page(read(run, problem))
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return path


def read(run: RunFolder, problem: Problem | None = None) -> Contents:
    """Everything that the page shows; see `write_report`."""
    lines = [line for line in _read(run.metrics, lambda _: run.history(), []) if _is_line(line)]
    config_text = _read(run.config, lambda path: path.read_text(encoding="utf-8"), "")
    config = _mapping(_read(run.config, lambda path: yaml.safe_load(path.read_text(encoding="utf-8")), {}))
    if problem is None and config.get("problem") in list(PROBLEMS):
        problem = PROBLEMS[config["problem"]]()
    samples = _read(run.path / "samples.npz", lambda path: torch.from_numpy(np.load(path)["samples"]).float(), None)
    evaluation = _mapping(_read(run.path / "evaluation.json", _json, {}))
    evals = [line for line in lines if line["kind"] == "eval"]
    last = {key: v for key, v in evals[-1].items() if key not in ("kind", "step", "seconds")} if evals else {}
    final = {name: float(v) for name, v in (evaluation or last).items() if is_number(v)}
    n = len(samples) if samples is not None else _mapping(config.get("training")).get("eval_samples")
    n = n if isinstance(n, int) and 2 <= n <= 10**6 else SAMPLES
    return Contents(
        name=run.path.resolve().name,
        train=[line for line in lines if line["kind"] == "train"],
        evals=evals,
        config_text=config_text,
        config=config,
        environment=_mapping(_read(run.environment, _json, {})),
        final=final,
        measured=bool(evaluation),
        samples=samples,
        bound=_bound(_read(run.path / "bound.json", _json, None)),
        problem=problem,
        truth={} if problem is None else standards(problem, n),
    )


def _read(path: Path, reader: Callable[[Path], Any], default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return reader(path)
    except (OSError, ValueError, LookupError, TypeError, EOFError, BadZipFile, yaml.YAMLError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"cannot read {path}: {reason}") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mapping(v: object) -> dict[str, Any]:
    return {str(key): value for key, value in v.items()} if isinstance(v, dict) else {}


def _is_line(line: object) -> bool:
    return isinstance(line, dict) and "kind" in line and all(_is_finite(line.get(key)) for key in ("step", "seconds"))


def _is_finite(v: object) -> bool:
    return is_number(v) and bool(np.isfinite(float(v)))  # type: ignore[arg-type]


def _bound(table: object) -> dict[str, NDArray[np.float64]] | None:
    """The fields of a gap's table, None unless all are there as lists of numbers of one length."""
    columns = [_mapping(table).get(name) for name in BOUND_FIELDS]
    if not all(isinstance(column, list) and column and all(map(_is_finite, column)) for column in columns):
        return None
    if len({len(column) for column in columns if column is not None}) > 1:
        return None
    return {name: np.array(column, dtype=np.float64) for name, column in zip(BOUND_FIELDS, columns, strict=True)}


def page(run: Contents) -> str:
    """The page."""
    style = files("vardistill").joinpath("report.css").read_text(encoding="utf-8")
    sections = (header, headline, samples, quality, bound, optimisation, table, settings)
    body = "\n".join(section(run) for section in sections)
    version = run.environment.get("vardistill")
    made = f"vardistill {version}" if version else "vardistill"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(run.name)} · vardistill</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Made by {escape(made)} from the files of the run; this page loads nothing.</footer>
</main>
</body>
</html>
"""


def header(run: Contents) -> str:
    """The name and the facts of the run."""
    rate = steps_per_second(run.train)
    facts = {
        "problem": run.setting("problem") or (run.problem.name if run.problem else None),
        "teacher": run.setting("teacher", "teacher"),
        "posterior": run.setting("objective", "posterior"),
        "candidates": run.setting("objective", "candidates") or None,
        "steps": f"{run.steps:,}" if run.steps else None,
        "batch": run.setting("training", "batch"),
        "time": duration(run.seconds) if run.seconds else None,
        "steps/s": significant(rate) if rate else None,
        "processor": run.environment.get("accelerator") or run.environment.get("processor"),
        "threads": run.environment.get("threads"),
    }
    items = "".join(f"<li>{name} <b>{escape(str(v))}</b></li>" for name, v in facts.items() if v is not None)
    return f'<p class="kind">One-step generator</p>\n<h1>{escape(run.name)}</h1>\n<ul class="facts">{items}</ul>'


def headline(run: Contents) -> str:
    """The verdict and the metrics behind it."""
    graded = grades(run.final, run.truth)
    worst = overall(run.final, graded)
    kind, _, heading = GRADES[worst] if worst is not None else ("none", "", "No verdict")
    remarks = "".join(f"<li>{remark}</li>" for remark in notes(run))
    verdict = f'<section class="card verdict {kind}"><h2>{heading}</h2><p>{summary(run)}</p>'
    verdict += (f"<ul>{remarks}</ul>" if remarks else "") + "</section>"
    tiles = "".join(tile(run, name, g) for name, g in graded.items())
    return verdict + (f'\n<div class="tiles">{tiles}</div>' if tiles else "")


def summary(run: Contents) -> str:
    """The run in a sentence or two."""
    v, problem = run.final, run.problem
    if problem is None or not grades(v, run.truth):
        told = "there is no evaluation against a known target" if run.steps else "the run has logged nothing yet"
        return (
            f"Trained for {run.steps:,} steps in {duration(run.seconds)}; {told}."
            if run.steps
            else f"{told.capitalize()}."
        )
    parts = []
    if "modes_found" in v:
        parts.append(f"It finds {v['modes_found']:.0f} of the target's {len(problem.denoiser.means)} modes")
    if "log_density_gap" in v:
        gap = v["log_density_gap"]
        side = "above" if gap > 0 else "below"
        parts.append(f"its samples' mean log-density is {abs(gap):.3f} nats {side} the target's own")
    if "off_mode" in v:
        parts.append(f"{percent(v['off_mode'])} of them lie off the modes")
    sentence = "; ".join(parts)
    sentence = f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""
    if "mmd_p_value" in v:
        p = v["mmd_p_value"]
        told = "tells them from true samples" if p < LEVEL else "cannot tell them from true samples"
        sentence += f" A two-sample test {told} (p = {p:.3f})."
    return sentence


def notes(run: Contents) -> list[str]:
    """What a reader should know before trusting the figures, as HTML."""
    found = []
    skipped = Curve.of(run.train, "skipped")
    if skipped is not None and skipped.values[-1] > 0:
        found.append(f"{skipped.values[-1]:,.0f} of {run.steps:,} steps were skipped: their gradients were not finite.")
    planned, budget = run.setting("training", "steps"), run.setting("training", "max_minutes")
    if is_number(planned) and run.steps and run.steps < planned and budget is None:
        found.append(f"The run stopped at step {run.steps:,} of {planned:,}.")
    if run.final and not run.measured:
        found.append(f"Metrics are those of the last evaluation during training, at step {run.evals[-1]['step']:,}.")
    mmd = Curve.of(run.evals, "log_mmd")
    if mmd is not None and len(mmd.values) >= 8 and "log_mmd" in run.truth:
        late = len(mmd.values) // 4
        gain = float(np.median(mmd.values[-2 * late : -late]) - np.median(mmd.values[-late:]))
        if gain > 0.2 and mmd.values[-1] > run.truth["log_mmd"].mean + MATCHING * run.truth["log_mmd"].std:
            found.append(f"It was still improving: log-MMD fell by {gain:.2f} over the last quarter.")
    if run.samples is not None and (bad := int((~run.samples.isfinite().flatten(1).all(1)).sum())):
        found.append(f"{bad:,} of {len(run.samples):,} samples are not finite.")
    return found


def tile(run: Contents, name: str, g: Grade) -> str:
    """One metric, large."""
    metric, kind = METRICS[name], GRADES[g]
    unit = {"log_density_gap": " <small>nats</small>"}.get(name, "")
    if name == "modes_found" and run.problem is not None:
        unit = f" <small>of {len(run.problem.denoiser.means)}</small>"
    return (
        f'<div class="card tile {kind[0]}"><p class="note">{metric.title}</p>'
        f'<p class="value">{metric.show(run.final[name])}{unit}</p>'
        f'<p class="note">true samples {truth(run, name)}</p><p class="grade">{kind[1]}</p></div>'
    )


def truth(run: Contents, name: str) -> str:
    """What true samples score in a metric, as text."""
    metric, standard = METRICS[name], run.truth.get(name)
    if standard is None:
        return metric.truth if run.problem is not None else ""
    mean = metric.show(standard.mean)
    if name in ("modes_found", "off_mode") or not standard.std:
        return mean
    return f"{'0' if standard.mean == 0 else mean} ± {standard.std:.2g}"


def samples(run: Contents) -> str:
    """Samples over the density's contours, beside true samples."""
    x = run.samples
    if x is None or x.ndim != 2 or x.shape[1] != 2 or (run.problem is not None and run.problem.data_shape != (2,)):
        return ""
    caption = f"{min(len(x), figures.SHOWN):,} samples of the generator, one network evaluation each."
    if run.problem is not None:
        masses = ", ".join(f"{100 * mass:.0f}" for mass in figures.MASSES[::-1])
        caption = (
            '<span class="swatch student"></span> samples on the modes, <span class="swatch astray"></span> samples farther than '
            '4 standard deviations from every mode, <span class="swatch truth"></span> true samples. '
            f"Contours hold {masses} % of the target's mass; both panels have the same axes."
        )
    return f"<h2>Samples</h2>\n{card('', figures.samples_figure(x, run.problem), caption, 'Samples of the student')}"


def quality(run: Contents) -> str:
    """Evaluations over training."""
    names = [name for name in CHARTS if name != "log_density" or run.problem or run.evals]
    names += sorted({key for line in run.evals for key in line} - set(METRICS) - {"kind", "step", "seconds"})
    cards = []
    for name in names:
        curve, metric = Curve.of(run.evals, name), METRICS.get(name)
        if curve is None:
            continue
        title = metric.title if metric else name
        figure = figures.quality_figure(curve, run.truth.get(name), **(metric.axis if metric else {}))
        cards.append(card(title, figure, metric.meaning.capitalize() + "." if metric else ""))
    if not cards:
        return ""
    key = '<span class="swatch student"></span> The averaged generator during training'
    if run.truth:
        key += (
            ', <span class="swatch truth"></span> as many true samples: their mean, and a band of two standard deviations of one '
            "evaluation"
        )
    key += ". Steps run along the bottom, wall-clock time along the top."
    return f'<h2>Quality over training</h2>\n<p class="note">{key}</p>\n<div class="grid">{"".join(cards)}</div>'


def bound(run: Contents) -> str:
    """The bound at the end, per noise level."""
    if run.bound is None:
        return ""
    caption = (
        "At the end of the run: the bound on the KL divergence between the student's and the target's noisy densities, that divergence "
        "itself, and what the bound gives away, with two standard errors to either side. A student that matches has a KL of 0."
    )
    return f"<h2>Bound per noise level</h2>\n{card('', figures.gap_figure(run.bound), caption, 'Bound and gap per noise level')}"


def optimisation(run: Contents) -> str:
    """What happened step by step."""
    cards = []
    curves = {
        name: Curve.of(run.train, name)
        for name in ("bound", "loss", "lr", "skipped", "ratio_05", "ratio_50", "ratio_95")
    }
    if curve := curves["bound"]:
        caption = "An upper bound on the diffusive KL, averaged over the noise levels of the step: it rises where the levels fall."
        cards.append(card("Bound (nats)", figures.bound_figure(curve), caption))
    low, middle, high = (curves[f"ratio_{q}"] for q in ("05", "50", "95"))
    if low and middle and high and len(low.steps) == len(middle.steps) == len(high.steps):
        scales = {"data std": run.problem.data_std, "mode std": run.problem.std} if run.problem else {}
        figure = figures.levels_figure(low, middle, high, scales)
        cards.append(
            card(
                "Noise levels σ/α",
                figure,
                "Median, and the band from the 5 % to the 95 % quantile, of a step's levels.",
            )
        )
    norms = {name: Curve.of(run.train, f"grad_norm_{name}") for name in ("generator", "objective")}
    present = {name: curve for name, curve in norms.items() if curve}
    if present:
        cards.append(
            card(
                "Gradient norm",
                figures.lines_figure(present, log=True),
                f"Of the {' and the '.join(present)}, before clipping.",
            )
        )
    if curve := curves["loss"]:
        cards.append(
            card(
                "Loss", figures.bound_figure(curve), "The weighted integrand that is minimised; its value has no scale."
            )
        )
    if curve := curves["lr"]:
        cards.append(card("Learning rate", figures.lines_figure({"generator": curve}), "Of the generator."))
    if curve := curves["skipped"]:
        if curve.values[-1] > 0:
            cards.append(
                card(
                    "Skipped steps",
                    figures.lines_figure({"skipped": curve}),
                    "Steps with gradients that were not finite, so far.",
                )
            )
        else:
            cards.append(
                '<div class="card"><h3>Skipped steps</h3><p class="note">None: all gradients were finite.</p></div>'
            )
    return f'<h2>Optimisation</h2>\n<div class="grid">{"".join(cards)}</div>' if cards else ""


def table(run: Contents) -> str:
    """All final metrics, and how the grades are made."""
    if not run.final:
        return ""
    graded = grades(run.final, run.truth)
    rows = []
    for name in [n for n in METRICS if n in run.final] + sorted(set(run.final) - set(METRICS)):
        metric = METRICS.get(name, Metric(name, significant, ""))
        true = truth(run, name) if name in METRICS else ""
        mark = (
            f'<span class="grade {GRADES[graded[name]][0]}">{GRADES[graded[name]][1]}</span>' if name in graded else ""
        )
        rows.append(
            f'<tr><th scope="row">{escape(metric.title)}</th><td class="number">{metric.show(run.final[name])}</td>'
            f'<td class="plain">{true}</td><td>{mark}</td><td class="note">{metric.meaning}</td></tr>'
        )
    head = "<tr><th>Metric</th><th>Student</th><th>True samples</th><th></th><th></th></tr>"
    return (
        f'<h2>All metrics</h2>\n<div class="card"><div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"{rules() if graded else ''}</div>"
    )


def rules() -> str:
    """How the grades are made."""
    limits = "; ".join(
        f"{METRICS[name].title.lower()} {percent(a) if name in ('off_mode', 'modes_found') else f'{a:g}'} and "
        f"{percent(b) if name in ('off_mode', 'modes_found') else f'{b:g}'}"
        for name, (a, b) in LIMITS.items()
    )
    return (
        f'<details><summary>How the grades are made</summary><p class="note">A metric matches where it is within {MATCHING:g} standard '
        f"deviations of what as many true samples score ({DRAWS} sets of them; log-MMD: the problem's reference). Otherwise it is close or "
        f"rough by its distance from their mean: {limits}. The run has the worst of its metrics' grades, and matches only if the two-sample "
        f"test does not tell it apart at the level {LEVEL:g}.</p></details>"
    )


def settings(run: Contents) -> str:
    """Configuration, versions, hardware and timings."""
    cards = []
    timings = {
        "steps": f"{run.steps:,}" if run.steps else None,
        "time": duration(run.seconds) if run.seconds else None,
        "steps per second (median)": significant(rate) if (rate := steps_per_second(run.train)) else None,
        "steps per second (evaluations included)": significant(run.steps / run.seconds) if run.seconds else None,
        "evaluations": str(len(run.evals)) if run.evals else None,
    }
    if shown := [(name, v) for name, v in timings.items() if v is not None]:
        cards.append(f'<div class="card wide"><h3>Timings</h3>{pairs(shown)}</div>')
    if run.environment:
        values = [(name, "none" if v is None else str(v)) for name, v in run.environment.items()]
        cards.append(f'<div class="card wide"><h3>Versions and hardware</h3>{pairs(values)}</div>')
    left = f"<div>{''.join(cards)}</div>" if cards else ""
    text = re.sub(r"(?m)^(\s*[\w-]+:)", r"<b>\1</b>", escape(run.config_text.rstrip()))
    right = f'<div class="card"><h3>Configuration</h3><pre>{text}</pre></div>' if text else ""
    return f'<h2>How it was made</h2>\n<div class="grid">{left}{right}</div>' if left or right else ""


def steps_per_second(train: Iterable[Mapping[str, Any]]) -> float | None:
    """The median over the stretches between lines of metrics; None with fewer than two lines."""
    marks = np.array([(line["step"], line["seconds"]) for line in train], dtype=np.float64).reshape(-1, 2)
    steps, seconds = np.diff(marks, axis=0).T
    kept = (seconds > 0) & (steps > 0)
    return float(np.median(steps[kept] / seconds[kept])) if kept.any() else None


def card(title: str, figure: Figure, caption: str, label: str = "") -> str:
    """A figure with its title and, as HTML, its caption."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    foot = f'<p class="note">{caption}</p>' if caption else ""
    return f'<div class="card">{head}{svg(figure, label or title)}{foot}</div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a table."""
    body = "".join(f'<tr><td class="note">{escape(name)}</td><td>{escape(v)}</td></tr>' for name, v in rows)
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
