r"""Figures of a run, with matplotlib but without its global state.

Every figure is drawn in the light theme's colours (`COLOURS`). As SVG inside a page, each of them becomes the CSS
variable of its name, so that a page restyles its figures with its theme.

Contours of a density hold 50, 90 and 99 % of its mass: they are the level sets of log p_d at the 50, 10 and 1 %
quantiles of log p_d(x), x ~ p_d.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.modes import RADIUS
from vardistill.problems import Problem
from vardistill.verdict import Standard

COLOURS = {
    "ink": "#1c2128",
    "muted": "#646d7a",
    "rule": "#d5dae1",
    "student": "#2f6fdb",
    "truth": "#0f8a72",
    "astray": "#d9660b",
}
"""Light theme, by the name of the CSS variable: text, ticks, lines, student, true samples, samples off the modes."""

INK, MUTED, RULE, STUDENT, TRUTH, ASTRAY = COLOURS.values()

MASSES = (0.99, 0.9, 0.5)
"""Shares of the mass within the contours."""

GRID = 240
"""Points per axis at which contours are computed."""

SHOWN = 10_000
"""Samples in a picture."""

FONTS = ["Inter", "Segoe UI", "Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"]


@dataclass(frozen=True)
class Curve:
    """A logged value: where, when and what, each (n,)."""

    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], name: str) -> Curve | None:
        """The finite values of this name, None where there are none."""
        rows = [[line.get(key) for key in ("step", "seconds", name)] for line in lines]
        kept = [row for row in rows if all(is_number(v) and np.isfinite(v) for v in row)]
        return cls(*np.array(kept, dtype=np.float64).T) if kept else None


def is_number(v: object) -> bool:
    """Whether v is an int or a float, and no bool."""
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def samples_figure(samples: Tensor, problem: Problem | None = None) -> Figure:
    """Samples (n, 2) over the density's contours, beside as many true samples; alone without a problem.

    Samples of the student that are off the modes have a colour of their own. At most `SHOWN` samples are drawn.

    Raises:
        UsageError: for samples that are not points in the plane.
    """
    if samples.ndim != 2 or samples.shape[1] != 2:
        raise UsageError(f"pictures need samples of shape (n, 2), but these have {tuple(samples.shape)}")
    x = samples[:SHOWN].detach().cpu()
    x = x[x.isfinite().all(1)]
    if problem is None:
        figure = Figure(figsize=(5.2, 5.2), layout="constrained")
        _scatter(_plane(figure.add_subplot(), f"Student: {len(x):,} samples"), x, STUDENT)
        return figure
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    truth = problem.sample(max(len(x), 2), torch.Generator().manual_seed(0))
    low, high = _window(truth)
    astray = off_modes(x, problem)
    _scatter(_plane(left, f"Student: {len(x):,} samples"), x[~astray], STUDENT)
    _scatter(left, x[astray], ASTRAY, size=3.0)
    _scatter(_plane(right, f"Target: {len(truth):,} true samples"), truth, TRUTH)
    for ax in (left, right):
        _contours(ax, problem, truth, low, high)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    return figure


def off_modes(x: Tensor, problem: Problem) -> Tensor:
    """Whether each sample (n, d) is farther than `RADIUS` standard deviations from every mode, (n,)."""
    means = problem.denoiser.means.to(x)
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").amin(1) > RADIUS * problem.std


def _window(truth: Tensor) -> tuple[list[float], list[float]]:
    low, high = truth.amin(0), truth.amax(0)
    centre, half = (low + high) / 2, 0.54 * (high - low).amax()
    return (centre - half).tolist(), (centre + half).tolist()


def _plane(ax: Axes, title: str) -> Axes:
    _bare(ax)
    ax.set_aspect("equal")
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    return ax


def _scatter(ax: Axes, x: Tensor, colour: str, size: float = 1.6) -> None:
    ax.scatter(x[:, 0], x[:, 1], s=size, c=colour, alpha=0.55, linewidths=0, rasterized=True)


def _contours(ax: Axes, problem: Problem, truth: Tensor, low: list[float], high: list[float]) -> None:
    u, v = (torch.linspace(a, b, GRID) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(u, v).to(truth)
    log_prob = problem.log_prob(grid).view(GRID, GRID).T
    levels = problem.log_prob(truth).quantile(1 - torch.tensor(MASSES).to(truth))
    distinct = sorted(set(levels.tolist()))
    ax.contour(u, v, log_prob, levels=distinct, colors=INK, linewidths=0.5, linestyles="solid", alpha=0.55)


def quality_figure(curve: Curve, standard: Standard | None, log: bool = False, percent: bool = False) -> Figure:
    """An evaluation's metric over steps (below) and time (above), with the line and band of true samples.

    The band is two standard deviations of one evaluation of true samples to either side.
    """
    figure, ax = _chart(curve)
    low = 0.0
    if log:
        low = min(v for v in (*curve.values, standard.mean if standard else np.inf, 1.0) if v > 0) / 2
        ax.set_yscale("log")
    values = np.maximum(curve.values, low) if log else curve.values
    known = [] if standard is None else [standard.mean]
    if standard is not None:
        bottom, top = standard.mean - 2 * standard.std, standard.mean + 2 * standard.std
        ax.axhspan(max(bottom, low) if log else bottom, top, color=TRUTH, alpha=0.18, linewidth=0)
        ax.axhline(standard.mean, color=TRUTH, linewidth=1.2)
    ax.plot(curve.steps, values, color=STUDENT, linewidth=1.8, marker="o", markersize=3 if len(values) < 60 else 0)
    ax.set_ylim(*_limits(values, known, log))
    _ticks(ax, log, percent)
    return figure


def bound_figure(curve: Curve) -> Figure:
    """The bound in nats over training: as logged, and its running median."""
    figure, ax = _chart(curve)
    smooth = running_median(curve.values)
    ax.axhline(0, color=TRUTH, linewidth=1.2)
    ax.plot(curve.steps, curve.values, color=STUDENT, linewidth=0.8, alpha=0.4)
    ax.plot(curve.steps, smooth, color=STUDENT, linewidth=1.8)
    ax.set_ylim(*_limits(curve.values, [0.0], log=False))
    _ticks(ax)
    return figure


def levels_figure(low: Curve, middle: Curve, high: Curve, scales: Mapping[str, float]) -> Figure:
    """Noise levels σ/α used over training, from the 5 % to the 95 % quantile, with named scales of the data."""
    figure, ax = _chart(middle)
    ax.set_yscale("log")
    ax.fill_between(low.steps, low.values, high.values, color=STUDENT, alpha=0.2, linewidth=0)
    ax.plot(middle.steps, middle.values, color=STUDENT, linewidth=1.8)
    for name, scale in scales.items():
        ax.axhline(scale, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.annotate(
            name, (1, scale), (-2, 3), ax.get_yaxis_transform(), "offset points", ha="right", fontsize=8, color=MUTED
        )
    _ticks(ax, log=True)
    return figure


def lines_figure(curves: Mapping[str, Curve], log: bool = False) -> Figure:
    """Up to two named curves over training."""
    first = next(iter(curves.values()))
    figure, ax = _chart(first)
    if log:
        ax.set_yscale("log")
    for (name, curve), colour in zip(curves.items(), (STUDENT, ASTRAY), strict=False):
        kept = curve.values > 0 if log else np.ones_like(curve.values, dtype=bool)
        ax.plot(curve.steps[kept], curve.values[kept], color=colour, linewidth=1.6, label=name)
    if len(curves) > 1:
        ax.legend(loc="best", fontsize=8.5, frameon=False, labelcolor=INK)
    if not log:
        ax.set_ylim(bottom=0)
    _ticks(ax, log)
    return figure


def gap_figure(bound: Mapping[str, NDArray[np.float64]]) -> Figure:
    """DiU and DiKL, and their gap, against the noise level σ/α, with two standard errors to either side.

    Args:
        bound: `ratio`, `diu`, `dikl`, `gap` and their `_error`s of `metrics.BoundGap`, each (L,).
    """
    order = np.argsort(bound["ratio"])
    ordered = {name: v[order] for name, v in bound.items()}
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _errors(left, ordered, "diu", STUDENT, "bound, DiU")
    _errors(left, ordered, "dikl", TRUTH, "diffusive KL")
    left.fill_between(ordered["ratio"], ordered["dikl"], ordered["diu"], color=STUDENT, alpha=0.12, linewidth=0)
    left.legend(loc="best", fontsize=9, frameon=False, labelcolor=INK)
    _errors(right, ordered, "gap", ASTRAY, "gap")
    for ax, title in ((left, "Bound and diffusive KL (nats)"), (right, "Gap: bound − KL (nats)")):
        _bare(ax)
        ax.set_title(title, loc="left", fontsize=10, color=INK)
        ax.axhline(0, color=RULE, linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_plain))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("noise level σ/α", fontsize=9, color=MUTED)
        _ticks(ax)
    return figure


def _errors(ax: Axes, bound: Mapping[str, NDArray[np.float64]], name: str, colour: str, label: str) -> None:
    ax.errorbar(
        bound["ratio"], bound[name], 2 * bound[f"{name}_error"],
        color=colour, label=label, linewidth=1.6, elinewidth=1.0, marker="o", markersize=3.5,
    )  # fmt: skip


def _chart(curve: Curve) -> tuple[Figure, Axes]:
    """An empty chart with steps below and the clock above."""
    figure = Figure(figsize=(4.8, 2.75), layout="constrained")
    ax = figure.add_subplot()
    _bare(ax)
    end = max(float(curve.steps[-1]), 1.0)
    ax.set_xlim(0, end)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.set_xlabel("steps", fontsize=9, color=MUTED, labelpad=1)
    seconds = float(curve.seconds[-1])
    unit, name = next(((u, n) for u, n in ((3600.0, "h"), (60.0, "min")) if seconds > 2 * u), (1.0, "s"))
    ticks = [v for v in MaxNLocator(5).tick_values(0, seconds / unit) if 0 <= v * unit <= seconds]
    clock = ax.twiny()
    _bare(clock)
    clock.spines["bottom"].set_visible(False)
    clock.set_xlim(0, end)
    along = np.interp([v * unit for v in ticks], [0.0, *curve.seconds], [0.0, *curve.steps])
    clock.set_xticks(along, [f"{v:g} {name}" for v in ticks])
    clock.tick_params(pad=0)
    return figure, ax


def _bare(ax: Axes) -> None:
    ax.set_facecolor("none")
    for spine in ax.spines.values():
        spine.set_color(RULE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=3, width=0.8, color=RULE)


def _ticks(ax: Axes, log: bool = False, percent: bool = False) -> None:
    shown = _percent if percent else _plain
    if not log:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    else:
        low, high = ax.get_ylim()
        subs = (1.0, 2.0, 5.0) if high / low < 50 else (1.0,)
        ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(shown))
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)


def _plain(v: float, position: int | None = None) -> str:
    if v and not 1e-3 <= abs(v) < 1e5:
        mantissa, exponent = f"{v:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}").replace("-", "−")


def _percent(v: float, position: int | None = None) -> str:
    return f"{100 * v:.3g} %"


def _limits(values: NDArray[np.float64], known: list[float], log: bool) -> tuple[float, float]:
    """Limits for all values but the first tenth, which is often far off, and for known lines."""
    late = [*values[len(values) // 10 :], *known]
    low, high = min(late), max(late)
    if log:
        return low / 1.4, high * 1.4
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over a tenth of the values around each, itself included."""
    half = len(values) // 20
    return np.array([np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page: no size but its shape, CSS variables for `COLOURS`, identifiers of its own.

    Text stays text, in the reader's fonts; samples are an embedded PNG.
    """
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.sans-serif": FONTS}
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=180, transparent=True, metadata={"Date": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    for name, colour in COLOURS.items():
        markup = markup.replace(colour, f"var(--{name})")
    return _head(markup, label)


def _head(markup: str, label: str) -> str:
    found = re.search(r'viewBox="([^"]*)"', markup)
    assert found is not None
    start = markup.index(">") + 1
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{found[1]}" role="img" aria-label="{escape(label)}">'
    )
    return head + markup[start:].strip()
