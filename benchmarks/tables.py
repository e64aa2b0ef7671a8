"""Writes the measured tables into README.md, the documentation and benchmarks/README.md: `python benchmarks/tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and comes from `results/*.json` alone.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import numpy as np
from measured import HERE

from vardistill.bench.named import TUNED
from vardistill.bench.results import spread

PAGES = (
    "README.md",
    "docs/images.md",
    "docs/own_model.md",
    "docs/results.md",
    "docs/warnings.md",
    "benchmarks/README.md",
)
Rows = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Fill in every table of every page."""
    for page in PAGES:
        path = HERE.parent / page
        if path.exists():
            path.write_text(re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", _fill, path.read_text(), flags=re.S))


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"


def quality() -> str:
    """The default preset and the demo over seeds."""
    return _rows_table(
        "mog40_quality", ("log_density_gap", "log_mmd", "mmd_p_value", "modes_found", "mode_tv", "off_mode")
    )


def overhead() -> str:
    """The trainer against the bare loop, and the phases of a step."""
    result = _load("step_overhead")
    rows, where = result["rows"], result["environment"]
    ratio = rows["ratio"]
    lines = [
        f"Trainer / bare loop: median **{ratio['median']:.3f}**, {len(ratio['pairs'])} pairs from "
        f"{min(ratio['pairs']):.3f} to {max(ratio['pairs']):.3f}. {_where(where)}",
        "",
        "| phase of the bare step | ms | share |",
        "|---|---|---|",
    ]
    step = rows["bare step, ms"]
    lines += [f"| {name} | {share * step:.2f} | {share:.0%} |" for name, share in rows["shares"].items()]
    lines += [f"| whole step | {step:.2f} | |", "", "| what was done | before, ms | after, ms |", "|---|---|---|"]
    lines += [f"| {n} | {v['before, ms']:.2f} | {v['after, ms']:.2f} |" for n, v in rows["choices"].items()]
    return "\n".join(lines)


def speed() -> str:
    """Steps per second of four presets, of this tree and of others."""
    result = _load("speed")
    names = list(next(iter(result["rows"].values())))
    lines = ["| preset | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| `{p}` | " + " | ".join(f"{median(v):.2f}" for v in r.values()) + " |" for p, r in result["rows"].items()
    ]
    return "\n".join([*lines, "", f"Steps per second of processor time. {_where(result['environment'])}"])


def own_models() -> str:
    """Foreign models' students beside their teachers, a number for every seed."""
    result = _load("own_models")
    lines = ["| teacher | default levels | levels to 0.05 σ_d | seconds |", "|---|---|---|---|"]
    rows: Rows = result["rows"]
    for name, found in rows.items():
        if "distance" in found[0] and f"{name}, levels to 0.05" in rows:
            cells = [", ".join(f"{r['distance']:.5f}" for r in rows[f"{name}{of}"]) for of in ("", ", levels to 0.05")]
            lines.append(f"| {name} | {' | '.join(cells)} | {max(r['seconds'] for r in found):.0f} |")
    pictures = {name: found for name, found in rows.items() if "student" in found[0]}
    lines += ["", "| teacher | student | teacher's 40 steps | seconds |", "|---|---|---|---|"] if pictures else []
    for name, found in pictures.items():
        cells = [", ".join(f"{r[of]:.3g}" for r in found) for of in ("student", "teacher")]
        lines.append(f"| {name} | {' | '.join(cells)} | {max(r['seconds'] for r in found):.0f} |")
    return "\n".join([*lines, "", f"A number for every seed. {_where(result['environment'])}"])


def startup() -> str:
    """How long the command line takes to answer."""
    result = _load("startup")
    lines = ["| command | median, s | slowest of 10, s |", "|---|---|---|"]
    lines += [f"| `{name}` | {r['median, s']:.2f} | {r['slowest, s']:.2f} |" for name, r in result["rows"].items()]
    return "\n".join([*lines, "", _where(result["environment"])])


def energy() -> str:
    """The energy loss and its gradient: ours, plain, cdist, geomloss."""
    result = _load("energy")
    rows = list(result["rows"].values())
    names = list(rows[0]["methods"])
    lines = ["| d | K | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [_time_and_memory(row["methods"][name]) for name in names]
        if any("MiB" in cell for cell in cells):
            lines.append(f"| {row['d']} | {row['K']} | " + " | ".join(cells) + " |")
    limits = f"{result['limit, GiB']:g} GiB or {result['longest evaluation, s']:g} s"
    return "\n".join(
        [*lines, "", f"Not run: what was predicted to take over {limits}. {_where(result['environment'])}"]
    )


def _time_and_memory(result: dict[str, Any]) -> str:
    if "left out" in result:
        return str(result["left out"])
    time, memory = result["forward and backward, ms"], result["memory, MiB"]
    return f"{time:,.{0 if time >= 100 else 1}f} ms, {f'{memory:,.0f}' if memory >= 1 else '< 1'} MiB"


def bench(name: str, metrics: Iterable[str], **labels: str) -> str:
    """The rows of a bench with these labels, as markdown; bold as `vardistill.bench.significance` has it."""
    result = _load(f"bench-{name}")
    rows = [row for row in result["rows"] if all(row[key] == value for key, value in labels.items())]
    first = [key for key in ("problem", "teacher", "objective") if key not in labels]
    first = [key for key in first if key == "objective" or len({row[key] for row in rows}) > 1]
    known = {metric for cell in result["cells"] for metric in cell["values"]}
    metrics = [metric for metric in metrics if metric in known]
    head = [*(key if key != "objective" else "" for key in first), "seeds", *(HEADINGS.get(m, m) for m in metrics)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [cell["values"] for cell in result["cells"] if all(cell[k] == row[k] for k in ROW)]
        texts = [_known(metric, cells) for metric in metrics]
        texts = [f"**{t}**" if metric in row["best"] else t for metric, t in zip(metrics, texts, strict=True)]
        lines.append("| " + " | ".join([*(row[key] for key in first), str(len(cells)), *texts]) + " |")
    return "\n".join([*lines, "", _settings(result)])


def _settings(result: dict[str, Any]) -> str:
    """A bench's budget, and where it was measured."""
    settings = result["settings"]
    budget = settings["budget"]
    spent = {"cpu": "minutes of processor time per cell:", "wall": "minutes per cell:", "steps": "steps per cell:"}
    where = result["environment"] | {"threads": settings["threads"], "runs at a time": settings["jobs"]}
    amount = "" if budget["amount"] is None else f"{spent[budget['kind']].capitalize()} {budget['amount']:g}. "
    return f"{amount}{_where(where)}"


def _known(metric: str, cells: list[dict[str, float]]) -> str:
    """A metric over the cells that have it, and how many these are where some have not."""
    values = [cell[metric] for cell in cells if metric in cell]
    return _cell(metric, values) + (f" ({len(values)} of {len(cells)})" if 0 < len(values) < len(cells) else "")


def images(name: str) -> str:
    """Students of pictures by objective beside the data, their teacher and its first step."""
    result = _load(f"bench-{name}")
    (teacher,) = result["teachers"].values()
    rows: Rows = {row if row == "held-out data" else f"teacher, {row}": [v] for row, v in teacher.items()}
    for cell in result["cells"]:
        rows.setdefault(cell["objective"], []).append(cell["values"])
    best = {row["objective"]: row["best"] for row in result["rows"]}
    metrics = ("fd", "kd", "precision", "recall", "density", "coverage", "label_accuracy", "memorisation")
    timed = [*metrics, "seconds_per_image", "speedup"]
    lines = ["| | " + " | ".join(HEADINGS.get(m, m) for m in timed) + " |", "|---" * (len(timed) + 1) + "|"]
    for row, seeds in rows.items():
        texts = [_picture_cell(m, [r[m] for r in seeds if m in r]) for m in timed]
        texts = [f"**{t}**" if m in best.get(row, ()) else t for m, t in zip(timed, texts, strict=True)]
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    facts = f"{teacher['18 steps']['samples']} samples a row, {result['settings']['seeds']} seeds."
    return "\n".join([*lines, "", f"{facts} {_settings(result)}"])


def _picture_cell(metric: str, values: list[float]) -> str:
    if metric == "seconds_per_image" and values:
        return f"{1000 * sum(values) / len(values):.2f}"
    if metric == "speedup" and values:
        return f"{sum(values) / len(values):.0f}×"
    return _cell(metric, values)


def start() -> str:
    """The bench `start`, and how much of the students' maps is folded."""
    folds = _load("folds")
    lines = ["| | folded |", "|---|---|"]
    lines += [f"| {row} | {spread([r['folded'] for r in seeds])} |" for row, seeds in folds["rows"].items()]
    return "\n".join([bench("start", (*MOG40[:7], "step")), "", *lines, "", f"{folds['samples']} latents a run."])


def teachers() -> str:
    """MoG-40's teachers by their own samples."""
    result = _load("teachers")
    rows: Rows = result["rows"]
    metrics = ("log_density", "log_mmd", "modes_found", "mode_tv", "off_mode")
    lines = ["| teacher | " + " | ".join(HEADINGS[m] for m in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(spread([r[m] for r in found]) for m in metrics) + " |" for row, found in rows.items()
    ]
    return "\n".join([*lines, "", f"{len(rows['true'])} seeds. {_where(result['environment'])}"])


def diff_instruct() -> str:
    """Diff-Instruct beside the published rows (1,000,000 steps on a GPU, the means of the authors' notebook)."""
    published = {
        ("true", 1): (-10.18, -5.60, 15_500),
        ("true", 5): (-8.10, -6.09, 38_000),
        ("true", 10): (-7.86, -5.79, 88_000),
        ("learned", 10): (-8.48, -5.83, 81_500),
    }
    measured = [_load(f"bench-mog40-{minutes}min") for minutes in (3, 10)]
    head = [f"here, {60 * result['settings']['budget']['amount']:g} s" for result in measured]
    lines = [
        "| teacher | critic steps | published: log-density / log-MMD | seconds | " + " | ".join(head) + " |",
        "|---|---|---|---|---|---|",
    ]
    for (teacher, steps), (density, mmd, seconds) in published.items():
        before = f"{density:.2f} / {mmd:.2f}".replace("-", "−")
        row = (f"Diff-Instruct {steps}", teacher)
        ours = []
        for result in measured:
            found = [cell["values"] for cell in result["cells"] if (cell["objective"], cell["teacher"]) == row]
            pair = [spread([values[metric] for values in found]) for metric in ("log_density", "log_mmd") if found]
            ours.append(" / ".join(pair) or "–")
        lines.append(f"| {teacher} | {steps} | {before} | {seconds:,} | " + " | ".join(ours) + " |")
    return "\n".join(lines)


def course() -> str:
    """Log-density, log-MMD and the share off the modes at some times with the true teacher, between two evaluations
    interpolated."""
    cells = _load("bench-mog40-3min")["cells"]
    seconds = (40, 80, 120, 150, 180)
    lines = ["| | " + " | ".join(f"{s} s" for s in seconds) + " |", "|---" * (len(seconds) + 1) + "|"]
    for name in ("VarFlow", "VarDiU + VarFlow", "VarDiU, batch candidates"):
        found = [c["curve"] for c in cells if (c["objective"], c["teacher"]) == (name, "true")]
        density, mmd, off = (_at(seconds, found, metric) for metric in ("log_density", "log_mmd", "off_mode"))
        entries = [f"{a:.2f} / {b:.2f}, {c:.1%}".replace("-", "−") for a, b, c in zip(density, mmd, off, strict=True)]
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _at(seconds: Iterable[float], curves: Iterable[list[dict[str, float]]], metric: str) -> list[float]:
    """A metric at these times, a mean over runs."""
    of_runs = [np.interp(seconds, *zip(*((p["cpu_seconds"], p[metric]) for p in c), strict=True)) for c in curves]
    return [float(v) for v in np.mean(of_runs, 0)]


def tuning() -> str:
    """Log-density and log-MMD of presets and of their neighbours, a row for each objective."""
    result = _load("bench-tuning")
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for cell in result["cells"]:
        name = max((n for n in TUNED if cell["objective"].startswith(n)), key=len)
        values = cell["values"]
        modes = "" if values["modes_found"] == 40 else f", {values['modes_found']:.0f} modes"
        entry = f"{values['log_density']:.2f} / {values['log_mmd']:.2f}{modes}".replace("-", "−")
        found[name][cell["objective"].removeprefix(name).removeprefix(", ")] = entry
    moved = [f"{thing} × {f:g}" for thing in ("rates", "noise", "batch") for f in (0.5, 2)]
    lines = ["| | preset | " + " | ".join(moved) + " | its own choice |", "|---" * (len(moved) + 3) + "|"]
    for name, choices in found.items():
        own = [f"{choice}: {entry}" for choice, entry in choices.items() if choice not in ("", *moved)]
        cells = [choices.get(choice, "–") for choice in ("", *moved)] + ["; ".join(own)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _settings(result)])


def signs() -> str:
    """How far the diversity of runs falls short of the target's, of those that lost modes and the others."""
    result = _load("signs")
    lines = ["| bench | runs that lost modes | shortfall | others | shortfall |", "|---|---|---|---|---|"]
    for name, runs in result["rows"].items():
        found = [[run["shortfall"] for run in runs if run["lost"] is lost] for lost in (True, False)]
        entries = [f"{len(values)} | {min(values):.2f} to {max(values):.2f}" if values else "0 | –" for values in found]
        lines.append(f"| `{name.removesuffix('-3min')}` | {' | '.join(entries)} |".replace("-", "−"))
    return "\n".join([*lines, "", f"{result['samples']} samples. {_where(result['environment'])}"])


def critics() -> str:
    """What Diff-Instruct's critics leave: their error, and the bias that it is, over training."""
    cells = _load("bench-mog40-3min")["cells"]
    lines = ["| critic steps | critic's error, first | last | bias / gradient, median | from | to |", "|---" * 6 + "|"]
    for steps in (1, 5, 10):
        found = [c for c in cells if (c["objective"], c["teacher"]) == (f"Diff-Instruct {steps}", "true")]
        ends = [spread([cell["curve"][place]["critic_error"] for cell in found]) for place in (0, -1)]
        points = [point["gradient_bias"] for cell in found for point in cell["curve"]]
        told = [bias for bias in points if bias is not None]
        bias = f"{median(told):.2g} ({len(told)} of {len(points)} evaluations) | {min(told):.2g} | {max(told):.2g}"
        lines.append(f"| {steps} | {ends[0]} | {ends[1]} | {bias} |")
    return "\n".join(lines)


ROW = ("objective", "teacher", "problem")
MOG40 = ("log_density", "log_mmd", "modes_found", "mode_tv", "off_mode", "dikl", "gap", "step")
HIGH = ("log_density_gap", "log_mmd", "modes_found", "mode_tv", "off_mode", "energy_distance", "step")
DIGITS = ("energy_distance_held_out", "precision", "recall", "log_mmd", "step")
SNR = tuple(f"snr_{ratio}" for ratio in ("0.5", "1", "2", "4", "8", "16"))

TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "overhead": overhead,
    "speed": speed,
    "startup": startup,
    "own-models": own_models,
    "energy": energy,
    "diff-instruct": diff_instruct,
    "course": course,
    "tuning": tuning,
    "signs": signs,
    "critics": critics,
    "teachers": teachers,
    "mog40-readme": lambda: bench("mog40-3min", MOG40[:6], teacher="true"),
    "mog40-true": lambda: bench("mog40-3min", MOG40, teacher="true"),
    "mog40-10min": lambda: bench("mog40-10min", MOG40, teacher="true"),
    "tuning-3min": lambda: bench("tuning-3min", MOG40[:5]),
    "mog40-empirical": lambda: bench("mog40-3min", MOG40, teacher="empirical"),
    "mog40-learned": lambda: bench("mog40-3min", MOG40, teacher="learned"),
    "start": start,
    "teacher-quality": lambda: bench(
        "teacher-quality", ("teacher_error", "log_density", "log_mmd", "modes_found", "mode_tv", "off_mode", "step")
    ),
    "capacity": lambda: bench("posterior-capacity", ("gap", "diu", "dikl", "log_mmd", "modes_found", "step")),
    "ablation": lambda: bench(
        "varflow-ablation", ("log_density", "log_mmd", "modes_found", "mode_tv", "off_mode", "step")
    ),
    "dimension": lambda: bench("dimension", HIGH, teacher="true"),
    "digits-empirical": lambda: bench("dimension", DIGITS, teacher="empirical"),
    "digits-learned": lambda: bench("dimension", DIGITS, teacher="learned"),
    "digits-4min": lambda: bench("dimension-4min", DIGITS),
    "images-digits": lambda: images("digits"),
    "images-digits-choices": lambda: images("digits-choices"),
    "images-mnist": lambda: images("mnist"),
    "images-steps": lambda: images("steps"),
    "variance": lambda: bench("variance", SNR),
}

HEADINGS = {
    "log_density": "log-density",
    "log_density_gap": "log-density gap",
    "log_mmd": "log-MMD",
    "mmd_p_value": "two-sample p",
    "modes_found": "modes",
    "mode_tv": "mode TV",
    "off_mode": "off the modes",
    "diu": "DiU",
    "dikl": "DiKL",
    "gap": "gap",
    "energy_distance": "energy distance",
    "energy_distance_held_out": "energy distance to held-out",
    "gradient_bias": "critic's bias / gradient",
    "teacher_error": "teacher's score error",
    **{f"snr_{ratio}": f"r = {ratio}" for ratio in ("0.5", "1", "2", "4", "8", "16")},
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "label_accuracy": "label accuracy",
    "memorisation": "copies",
    "seconds_per_image": "ms per picture",
    "speedup": "faster than 18 steps",
    "step": "steps",
    "seconds": "seconds",
}


def _rows_table(name: str, metrics: Iterable[str]) -> str:
    result = _load(name)
    metrics = [*metrics, "seconds"]
    lines = [
        "| | " + " | ".join(HEADINGS[m] for m in metrics) + " |",
        "|---|" + "---|" * len(metrics),
    ]
    rows: Rows = result["rows"]
    for row, seeds in rows.items():
        lines.append(f"| {row} | " + " | ".join(_cell(m, [r[m] for r in seeds if m in r]) for m in metrics) + " |")
    seeds = " and ".join(dict.fromkeys(str(len(r)) for r in rows.values()))
    return "\n".join([*lines, "", f"Mean ± standard deviation over {seeds} seeds. {_where(result['environment'])}"])


def _cell(metric: str, values: list[float]) -> str:
    if not values:
        return "–"
    if metric == "mmd_p_value":
        return ", ".join(f"{v:.2g}" for v in values)
    if metric in ("seconds", "step"):
        return f"{sum(values) / len(values):.0f}"
    return spread(values)


def _where(environment: dict[str, Any]) -> str:
    threads, runs = environment["threads"], environment["runs at a time"]
    return (
        f"{environment['processor']}, {threads} thread{'s' if threads > 1 else ''} a run"
        f"{f', {runs} runs at a time' if runs > 1 else ''}, torch {environment['torch']}."
    )


def _load(name: str) -> Any:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
