"""The page of a run: one HTML file with its figures inside, which opens without a network.

It shows what the run folder holds (`contents`), reads files only, and leaves out what is not there. A run folder may
come from somebody else: whatever its files say is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
from torch import Tensor

from vardistill.domains.pictures.figures import grids_figure
from vardistill.domains.points.problems import Problem
from vardistill.files import write_whole
from vardistill.metrics.modes import mode_radius
from vardistill.reports import figures
from vardistill.reports.card import configured_steps, last_part, objective_name, own_teacher, teachers
from vardistill.reports.contents import COSTS, LINE, Contents, read, steps_per_second
from vardistill.reports.figures import Curve, is_finite
from vardistill.reports.formats import METRICS, SHARES, duration, metric_of, percent, sentence_case, significant
from vardistill.reports.pages import card, document, grid, masthead, pairs, scroll_table, swatch
from vardistill.reports.samples import is_plane
from vardistill.reports.verdict import (
    LEVEL,
    LIMITS,
    MATCHING,
    P_VALUES,
    Grade,
    Standard,
    grade,
    grades,
    of_teachers,
    overall,
    told_apart,
)
from vardistill.training.folder import RunFolder
from vardistill.training.warning_signs import Sign, signs

CHARTS = (
    "log_density", "log_mmd", "modes_found", "off_mode", "mode_tv", "energy_distance_held_out", "fd", "precision",
    "recall", "prompt_accuracy", "clip_score", "diversity", "diu", "dikl", "gap",
)  # fmt: skip

GRADES = {
    Grade.MATCHES: ("matches", "✓ matches", "Matches"),
    Grade.CLOSE: ("close", "≈ close", "Close to"),
    Grade.ROUGH: ("rough", "△ rough", "Roughly"),
    Grade.FAR: ("far", "✕ far", "Far from"),
}
"""Class in the page, mark of a metric, heading of a run before what it is compared with."""

PICTURES = 100
"""Shown of a student and of its teacher."""


def write_report(
    run: RunFolder, problem: Problem | None = None, evaluation: Mapping[str, object] | None = None
) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run: the folder; every file in it is optional.
        problem: the target; default the one that the configuration names.
        evaluation: final metrics; default those of `evaluation.json`.

    Returns:
        The path of the page.

    Raises:
        UsageError: for files that cannot be read, or a folder that cannot be written.
    """
    path = run.path / "report.html"
    write_whole(path, page(compared(run, problem, evaluation)))
    return path


def compared(
    run: RunFolder, problem: Problem | None = None, evaluation: Mapping[str, object] | None = None
) -> Contents:
    """What the folder holds beside what a teacher of pictures scores; arguments and errors as `write_report`'s."""
    contents = read(run, problem, evaluation)
    columns = teachers(run, contents.config)
    return replace(contents, columns=columns, truth=contents.truth or of_teachers(columns))


def page(run: Contents) -> str:
    """The page."""
    sections = (header, headline, warnings, samples, quality, bound, optimisation, all_metrics, settings)
    body = "\n".join(section(run) for section in sections)
    version = run.environment.get("vardistill")
    made = f"vardistill {version}" if version else "vardistill"
    return document(run.name, body, f"Made by {made} from the files of the run; this page loads nothing.")


def header(run: Contents) -> str:
    """The name and the facts of the run."""
    rate = steps_per_second(run.train)
    facts = {
        "problem": run.setting("domain", "problem") or (run.problem.name if run.problem else None),
        "teacher": teacher_of(run),
        "objective": objective_name(run.setting("objective")),
        "seed": run.setting("training", "seed"),
        "posterior": run.setting("objective", "posterior"),
        "candidates": run.setting("objective", "candidates") or None,
        "steps per sample": configured_steps(run.config),
        "steps": f"{run.steps:,}" if run.steps else None,
        "batch": run.setting("training", "batch"),
        "time": duration(run.seconds) if run.seconds else None,
        "steps/s": significant(rate) if rate else None,
        "processor": run.environment.get("accelerator") or run.environment.get("processor"),
        "threads": run.environment.get("threads"),
    }
    return masthead("Generator", run.name, facts)


def teacher_of(run: Contents) -> str | None:
    """The teacher's kind on points, and the last part of its source, or of what it is fitted to, for pictures."""
    if not run.setting("domain"):
        return own_teacher(run.config)
    teacher = run.setting("domain", "teacher")
    if isinstance(teacher, dict):
        named = teacher.get("teacher")
        return str(named) if named else None
    source = teacher or run.setting("domain", "data")
    return last_part(str(source)) if source else None


def evaluations(run: Contents) -> str:
    """Those of the network for a sample, in words."""
    steps = configured_steps(run.config)
    return "one network evaluation" if steps == 1 else f"{steps} network evaluations"


def verdict(run: Contents) -> tuple[str, str]:
    """In a few words, and the run in a sentence or two."""
    worst = overall(run.final, grades(run.final, run.truth))
    if worst is None:
        return "No verdict", summary(run)
    told = ", but told from it" if worst is Grade.CLOSE and told_apart(run.final) else ""
    return f"{GRADES[worst][2]} {run.target}{told}", summary(run)


def headline(run: Contents) -> str:
    """The verdict and the metrics behind it."""
    graded = grades(run.final, run.truth)
    worst, (heading, told) = overall(run.final, graded), verdict(run)
    kind = GRADES[worst][0] if worst is not None else "none"
    remarks = "".join(f"<li>{remark}</li>" for remark in notes(run))
    box = f'<section class="card verdict {kind}"><h2>{heading}</h2><p>{told}</p>'
    box += (f"<ul>{remarks}</ul>" if remarks else "") + "</section>"
    tiles = "".join(tile(run, name, g) for name, g in graded.items())
    return box + (f'\n<div class="tiles">{tiles}</div>' if tiles else "")


def summary(run: Contents) -> str:
    """The run in a sentence or two."""
    v, problem = run.final, run.problem
    if not grades(v, run.truth):
        if not run.steps:
            return "The run has logged nothing yet."
        if "fd" in v:
            return f"{summary_of_pictures(v)} Its teacher's own distance is not known here."
        time = f"{run.steps:,} steps in {duration(run.seconds)}"
        return f"Trained for {time}; there is no evaluation against a known target."
    if "fd" in v:
        return f"{summary_of_pictures(v)} Its teacher's own distance is {run.truth['fd'].mean:.3g}."
    if problem is None:
        return summary_of_own(run)
    parts = []
    if "modes_found" in v and problem.modes is not None:
        parts.append(f"It finds {v['modes_found']:.0f} of the target's {len(problem.modes)} modes")
    if "log_density_gap" in v:
        gap = v["log_density_gap"]
        side = "above" if gap > 0 else "below"
        parts.append(f"its samples' mean log-density is {abs(gap):.3f} nats {side} the target's own")
    if "off_mode" in v:
        parts.append(f"{percent(v['off_mode'])} of them lie off the modes")
    if "precision" in v and "recall" in v:
        parts.append(
            f"{percent(v['precision'])} of its samples lie within the held-out data's manifold, and "
            f"{percent(v['recall'])} of those data within the samples'"
        )
    return sentence_case("; ".join(parts)) + test_sentence(v, "true samples")


def test_sentence(v: Mapping[str, float], others: str) -> str:
    """What the two-sample test says; nothing without one."""
    told = "tells" if told_apart(v) else "cannot tell"
    return "".join(f" A two-sample test {told} them from {others} (p = {v[p]:.3f})." for p in P_VALUES if p in v)


def summary_of_own(run: Contents) -> str:
    """The distance of a run in Python to its teacher's samples, or the data."""
    (name,) = (name for name in run.truth if name in run.final)
    v, standard = run.final[name], run.truth[name]
    whose = "the data" if name == "energy_distance_data" else "those of its teacher's own sampler"
    share = f", {100 * v / standard.scale:.2g} % of the distance between two of them" if standard.scale else ""
    sentence = f"Its samples are at an energy distance of {significant(v)} from {whose}{share}."
    return sentence + test_sentence(run.final, "these")


def summary_of_pictures(v: Mapping[str, float]) -> str:
    """The metrics of pictures in two sentences."""
    sentence = f"Its pictures are at a Fréchet distance of {v['fd']:.3g} from the training set"
    if "precision" in v and "recall" in v:
        sentence += (
            f"; {percent(v['precision'])} of them lie within the held-out pictures' manifold, and "
            f"{percent(v['recall'])} of those within theirs"
        )
    if "speedup" in v:
        n = int(v.get("evaluations", 1))
        takes = "one network evaluation" if n == 1 else f"{n} network evaluations"
        sentence += f". A picture takes {takes}, {v['speedup']:.0f} times less time than the teacher's"
    return f"{sentence}."


def notes(run: Contents) -> list[str]:
    """What a reader should know before trusting the figures, as HTML."""
    found = []
    skipped = Curve.of(run.train, "skipped")
    if skipped is not None and skipped.values[-1] > 0:
        count = f"{skipped.values[-1]:,.0f} of {run.steps:,}"
        found.append(f"{count} steps were skipped: their gradients were not finite.")
    planned, budget = run.setting("training", "steps"), run.setting("training", "max_minutes")
    if is_finite(planned) and run.steps and run.steps < planned and budget is None:
        found.append(f"The run stopped at step {run.steps:,} of {planned:,}.")
    if run.final and not run.measured:
        step = f"{run.evals[-1]['step']:,.0f}"
        found.append(f"Metrics are those of the last evaluation during training, at step {step}.")
    mmd = Curve.of(run.evals, "log_mmd")
    if mmd is not None and len(mmd.values) >= 8 and "log_mmd" in run.truth:
        late = len(mmd.values) // 4
        gain = float(np.median(mmd.values[-2 * late : -late]) - np.median(mmd.values[-late:]))
        if gain > 0.2 and grade("log_mmd", mmd.values[-1], run.truth["log_mmd"]) is not Grade.MATCHES:
            found.append(f"It was still improving: log-MMD fell by {gain:.2f} over the last quarter.")
    if run.samples is not None and (bad := int((~run.samples.isfinite().flatten(1).all(1)).sum())):
        found.append(f"{bad:,} of {len(run.samples):,} samples are not finite.")
    return found


def tile(run: Contents, name: str, g: Grade) -> str:
    """One metric, large."""
    metric, kind = METRICS[name], GRADES[g]
    unit = {"log_density_gap": " <small>nats</small>"}.get(name, "")
    if name == "modes_found" and run.problem is not None and run.problem.modes is not None:
        unit = f" <small>of {len(run.problem.modes)}</small>"
    return (
        f'<div class="card tile {kind[0]}"><p class="note">{metric.title}</p>'
        f'<p class="value">{metric.show(run.final[name])}{unit}</p>'
        f'<p class="note">{others(run)} {truth(run, name)}{times(run, name)}</p><p class="grade">{kind[1]}</p></div>'
    )


def others(run: Contents) -> str:
    """Whose scores stand beside the student's."""
    return "true samples" if run.problem else "its teacher" if "fd" in run.truth else "its own samples"


def times(run: Contents, name: str) -> str:
    """How many times as many samples are off the modes as of true ones, where they are twice as many."""
    standard = run.truth[name]
    ratio = run.final[name] / standard.mean if name == "off_mode" and standard.mean > 0 else 0.0
    return f", of which it has {ratio:.0f} times as many" if ratio >= 2 else ""


def truth(run: Contents, name: str) -> str:
    """What true samples, or the teacher's, score in a metric, as text."""
    metric, standard = METRICS.get(name), run.truth.get(name)
    if metric is None or not run.truth:
        return ""
    if standard is None:
        return metric.truth
    mean = metric.show(standard.mean)
    if name in ("modes_found", "off_mode") or not standard.std:
        return mean
    if name in SHARES:
        return f"{mean} ± {100 * standard.std:.2g}"
    return f"{'0' if standard.mean == 0 else mean} ± {standard.std:.2g}"


def warnings(run: Contents) -> str:
    """The signs that are there at the end, and what to do; nothing for a run that did not look for them."""
    numbers = [{name: v for name, v in line.items() if is_finite(v)} for line in run.train]
    found = signs(numbers)
    if not found and not any("diversity" in line for line in numbers):
        return ""
    body = '<p class="note">None at the end of the run.</p>'
    if found:
        headings = ("Sign", "Since step", "Value", "Threshold", "What it means")
        body = scroll_table((warning_row(sign) for sign in found), headings)
    return f'<h2>Warning signs</h2>\n<div class="card">{body}</div>'


def warning_row(sign: Sign) -> str:
    """One sign."""
    return (
        f'<tr><th scope="row">{escape(sign.name)}</th><td class="plain">{sign.since:,}</td>'
        f'<td class="number">{significant(sign.value)}</td><td class="plain">{significant(sign.threshold)}</td>'
        f'<td class="note">{escape(f"{sentence_case(sign.meaning)} {sign.remedy}")}</td></tr>'
    )


def samples(run: Contents) -> str:
    """Samples beside true samples, over the density's contours where there is a density."""
    x, problem = run.samples, run.problem
    if x is not None and x.ndim == 4 and x.numel():
        return pictures(x, run)
    if x is not None and problem is None and run.beside and is_plane(x):
        return pair(x, run)
    if x is None or tuple(x.shape[1:]) != ((2,) if problem is None else problem.data_shape):
        return ""
    caption = f"{min(len(x), figures.SHOWN):,} samples of the generator, {evaluations(run)} each."
    if problem is not None:
        caption = caption_of_points(problem) if problem.image_shape is None else "The first samples of each."
    picture = card("", figures.samples_figure(x, problem), caption, "Samples of the student")
    return f"<h2>Samples</h2>\n{picture}"


def pair(x: Tensor, run: Contents) -> str:
    """A student's points beside its teacher's, or the data."""
    title, others = next(iter(run.beside.items()))
    caption = f"{swatch('student')} the student's, {evaluations(run)} each; {swatch('truth')} {title.lower()}."
    picture = card("", figures.pair_figure(x, title, others), caption, f"Samples: Student, {title}")
    return f"<h2>Samples</h2>\n{picture}"


def pictures(x: Tensor, run: Contents) -> str:
    """A student's pictures, and beside them its teacher's and those of the training set that are nearest."""
    grids = {"Student": x[:PICTURES]} | {title: own[:PICTURES] for title, own in run.beside.items()}
    caption = sentence_case(f"{evaluations(run)} each" + ("; the teacher's take many steps" if run.beside else ""))
    picture = card("", grids_figure(grids), caption, f"Pictures: {', '.join(grids)}")
    return f"<h2>Pictures</h2>\n{picture}"


def caption_of_points(problem: Problem) -> str:
    """What the colours, the contours and the axes mean, as HTML."""
    (d,) = problem.data_shape
    parts = [f"{swatch('student')} samples, {swatch('truth')} true samples."]
    if problem.modes is not None:
        parts = [
            f"{swatch('student')} samples on the modes, {swatch('astray')} samples farther than "
            f"{mode_radius(d):.3g} standard deviations from every mode, {swatch('truth')} true samples."
        ]
    if d > 2:
        parts.append(f"Of {d} dimensions the first two principal components of the target.")
    if problem.denoiser is not None:
        *smaller, largest = (f"{100 * mass:.0f}" for mass in figures.MASSES[::-1])
        parts.append(f"Contours hold {', '.join(smaller)} and {largest} % of the target's mass.")
    return " ".join([*parts, "Both panels have the same axes."])


def quality(run: Contents) -> str:
    """Evaluations over training."""
    own = {name for line in run.evals for name in line} - {*METRICS, *LINE, *COSTS}
    curves = {name: Curve.of(run.evals, name) for name in (*CHARTS, *sorted(own))}
    cards = []
    for name, curve in curves.items():
        if curve is not None:
            metric = metric_of(name)
            figure = figures.quality_figure(curve, run.truth.get(name), metric.scale)
            cards.append(card(metric.title, figure, sentence_case(metric.meaning)))
    if not cards:
        return ""
    key = f"{swatch('student')} The averaged generator during training"
    if run.truth:
        key += f", {swatch('truth')} as many true samples: their mean, and two standard deviations of one evaluation"
    key += ". Steps run along the bottom, wall-clock time along the top."
    return f'<h2>Quality over training</h2>\n<p class="note">{key}</p>\n{grid(cards)}'


def bound(run: Contents) -> str:
    """The bound at the end, per noise level."""
    if run.bound is None:
        return ""
    caption = (
        "At the end of the run: the bound on the KL divergence between the student's and the target's noisy "
        "densities, that divergence itself, and what the bound gives away, with two standard errors to either "
        "side. A student that matches has a KL of 0."
    )
    picture = card("", figures.gap_figure(run.bound), caption, "Bound and gap per noise level")
    return f"<h2>Bound per noise level</h2>\n{picture}"


def optimisation(run: Contents) -> str:
    """What happened step by step."""
    charts = (bound_chart, levels_chart, gradients_chart, loss_chart, rate_chart, skipped_chart)
    cards = [made for chart in charts if (made := chart(run))]
    return f"<h2>Optimisation</h2>\n{grid(cards)}" if cards else ""


def bound_chart(run: Contents) -> str:
    """The bound over training."""
    curve = Curve.of(run.train, "bound")
    caption = (
        "An upper bound on the diffusive KL, averaged over the step's noise levels: it may rise where they fall. "
        f"The {swatch('truth')} line is 0, the least it can be."
    )
    return card("Bound (nats)", figures.noisy_figure(curve, floor=0.0), caption) if curve else ""


def levels_chart(run: Contents) -> str:
    """The noise levels over training."""
    low, middle, high = (Curve.of(run.train, f"ratio_{q}") for q in ("05", "50", "95"))
    if not (low and middle and high and len(low.steps) == len(middle.steps) == len(high.steps)):
        return ""
    scales = {}
    if run.problem is not None:
        scales["data std"] = run.problem.data_std
        scales |= {"mode std": run.problem.modes.std} if run.problem.modes is not None else {}
    caption = "Median, and the band from the 5 % to the 95 % quantile, of a step's levels."
    return card("Noise levels σ/α", figures.levels_figure(low, middle, high, scales), caption)


def gradients_chart(run: Contents) -> str:
    """The norms of the gradients."""
    found = dict.fromkeys(name for line in run.train for name in line if name.startswith("grad_norm_"))
    norms = {name.removeprefix("grad_norm_"): Curve.of(run.train, name) for name in found}
    present = {name: curve for name, curve in norms.items() if curve}
    if not present:
        return ""
    caption = f"Of the {escape(' and the '.join(present))}, before clipping."
    return card("Gradient norm", figures.lines_figure(present, log=True), caption)


def loss_chart(run: Contents) -> str:
    """The loss over training."""
    curve = Curve.of(run.train, "loss")
    caption = "The weighted integrand that is minimised; its value has no scale."
    return card("Loss", figures.noisy_figure(curve), caption) if curve else ""


def rate_chart(run: Contents) -> str:
    """The learning rate over training."""
    curve = Curve.of(run.train, "lr")
    return card("Learning rate", figures.lines_figure({"generator": curve}), "Of the generator.") if curve else ""


def skipped_chart(run: Contents) -> str:
    """Skipped steps over training; a line of text where there are none."""
    curve = Curve.of(run.train, "skipped")
    if curve is None:
        return ""
    if not curve.values.any():
        return '<div class="card"><h3>Skipped steps</h3><p class="note">None: all gradients were finite.</p></div>'
    caption = "Steps with gradients that were not finite, so far."
    return card("Skipped steps", figures.lines_figure({"skipped": curve}), caption)


def all_metrics(run: Contents) -> str:
    """All final metrics, and how the grades are made."""
    if not run.final:
        return ""
    graded = grades(run.final, run.truth)
    names = [n for n in METRICS if n in run.final] + sorted(set(run.final) - set(METRICS))
    rows = (metric_row(run, name, graded.get(name)) for name in names)
    beside = [sentence_case(title)[:-1] for title in run.columns] or [sentence_case(others(run))[:-1]]
    body = scroll_table(rows, ("Metric", "Student", *beside, "", ""))
    return f'<h2>All metrics</h2>\n<div class="card">{body}{rules(graded, run.truth) if graded else ""}</div>'


def metric_row(run: Contents, name: str, g: Grade | None) -> str:
    """One metric."""
    metric = metric_of(name)
    kind, mark, _ = GRADES[g] if g is not None else ("none", "", "")
    columns = [metric.show(column[name]) if name in column else "" for column in run.columns.values()]
    beside = "".join(f'<td class="plain">{text}</td>' for text in columns or [truth(run, name)])
    return (
        f'<tr><th scope="row">{escape(metric.title)}</th><td class="number">{metric.show(run.final[name])}</td>'
        f'{beside}<td class="grade {kind}">{mark}</td><td class="note">{metric.meaning}</td></tr>'
    )


def rules(graded: Iterable[str], truth: Mapping[str, Standard]) -> str:
    """How the grades are made."""

    def limit(name: str, v: float) -> str:
        return percent(v) if name in (*SHARES, "modes_found") else f"{v * truth[name].scale:.3g}"

    limits = "; ".join(
        f"{METRICS[name].title} " + " and ".join(limit(name, v) for v in LIMITS[name]) for name in graded
    )
    text = (
        f"A metric matches where it is within {MATCHING:g} standard deviations of what as many true samples (of "
        f"pictures the teacher's) score. Otherwise its distance from their mean "
        f"makes it close or rough, up to these limits: {limits}. The run has the worst of its metrics' grades, and "
        f"matches only if the two-sample test does not tell it apart at the level {LEVEL:g}."
    )
    return f'<details><summary>How the grades are made</summary><p class="note">{text}</p></details>'


def settings(run: Contents) -> str:
    """Configuration, versions, hardware and timings."""
    cards = []
    rate = steps_per_second(run.train)
    timings = {
        "steps": f"{run.steps:,}" if run.steps else None,
        "time": duration(run.seconds) if run.seconds else None,
        "steps per second, median": significant(rate) if rate else None,
        "steps per second, evaluations included": significant(run.steps / run.seconds) if run.seconds else None,
        "evaluations": str(len(run.evals)) if run.evals else None,
    }
    if shown := [(name, v) for name, v in timings.items() if v is not None]:
        cards.append(f'<div class="card wide"><h3>Timings</h3>{pairs(shown)}</div>')
    if run.environment:
        values = [(name, "none" if v is None else str(v)) for name, v in run.environment.items()]
        cards.append(f'<div class="card wide"><h3>Versions and hardware</h3>{pairs(values)}</div>')
    columns = [f"<div>{''.join(cards)}</div>"] if cards else []
    if run.config_text:
        text = re.sub(r"(?m)^(\s*[\w-]+:)", r"<b>\1</b>", escape(run.config_text.rstrip()))
        columns.append(f'<div class="card"><h3>Configuration</h3><pre>{text}</pre></div>')
    body = f'<div class="grid columns">{"".join(columns)}</div>'
    return f"<h2>How it was made</h2>\n{body}" if columns else ""
