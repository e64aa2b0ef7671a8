r"""Figures of a run, drawn by matplotlib without `pyplot` and its global figures.

Every figure is drawn in the light theme's colours (`COLOURS`). As SVG inside a page, each of them becomes the
CSS variable of its name, so that a page restyles its figures with its theme.

Points of more than two dimensions are shown by their first two principal components u = Vᵀx, those of the target's
own samples. A mixture of isotropic Gaussians has as their density the mixture of the projected means, Σ_k π_k N(u;
Vᵀμ_k, s_k² I). Contours of a density hold 50, 90 and 99 % of its mass: they are the level sets of log p at the 50, 10
and 1 % quantiles of log p(u) over the target.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from vardistill.denoisers import GaussianMixture
from vardistill.domains.points.problems import Problem
from vardistill.errors import UsageError
from vardistill.metrics.modes import mode_radius
from vardistill.reports.verdict import Standard

COLOURS = {
    "ink": "#1c2128",
    "muted": "#646d7a",
    "rule": "#d5dae1",
    "student": "#2f6fdb",
    "truth": "#0f8a72",
    "astray": "#d9660b",
}
"""Light theme, by the name of the CSS variable; `astray` is for samples off the modes."""

INK, MUTED, RULE, STUDENT, TRUTH, ASTRAY = COLOURS.values()

MASSES = (0.99, 0.9, 0.5)
"""Shares of the mass within the contours."""

GRID = 240
"""Points per axis at which contours are computed."""

LARGEST = 1e100
"""Larger values count as infinite."""

SHOWN = 10_000
"""Samples in a picture."""

PICTURES = 100
"""Pictures of each kind, a square number."""

TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10.5, "color": INK}
"""Of a panel."""

Scale = Literal["linear", "count", "log", "share"]
"""Of an axis: numbers; whole numbers; logarithmic; logarithmic in per cent."""

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
        kept = [row for row in rows if all(is_finite(v) for v in row)]
        return cls(*np.array(kept, dtype=np.float64).T) if kept else None


def is_finite(v: object) -> bool:
    """Whether v is an int or a float, no bool, and small enough to compute with."""
    return isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= LARGEST


def samples_figure(samples: Tensor, problem: Problem | None = None) -> Figure:
    """Samples beside as many true samples; alone, and in the plane, without a problem.

    Pictures where the problem's points are pictures, else points over the density's contours, where there is a
    density. Samples of the student that are off the modes have a colour of their own. At most `SHOWN` are drawn.

    Raises:
        UsageError: for samples that are not points of the problem, or of the plane.
    """
    x = _shown(samples, problem)
    if problem is None:
        figure = Figure(figsize=(5.2, 5.2), layout="constrained")
        _scatter(_plane(figure.add_subplot(), f"Student: {len(x):,} samples"), x, STUDENT)
        return figure
    truth = problem.sample(max(len(x), 2), torch.Generator().manual_seed(0))
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    if problem.image_shape is not None:
        _pictures(figure, x, truth, problem.image_shape)
    else:
        _points(figure, x, truth, problem)
    return figure


def _shown(samples: Tensor, problem: Problem | None) -> Tensor:
    shape = (2,) if problem is None else problem.data_shape
    if tuple(samples.shape[1:]) != shape:
        whose, expected = "" if problem is None else f" of {problem.name}", ", ".join(str(n) for n in ("n", *shape))
        raise UsageError(f"figures{whose} need samples of shape ({expected}), but these have {tuple(samples.shape)}")
    x = samples[:SHOWN].detach().cpu()
    return x[x.isfinite().all(1)]


def pair_figure(samples: Tensor, title: str, others: Tensor) -> Figure:
    """Points (n, d), d at least 2, beside others under their title, in the plane of the others' largest variance."""
    x, y = (v[:SHOWN].detach().cpu().float() for v in (samples, others))
    plane = plane_of(y)
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = _window(y @ plane)
    left.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _scatter(_plane(left, f"Student: {len(x):,} samples"), x[x.isfinite().all(1)] @ plane, STUDENT)
    _scatter(_plane(right, f"{title}: {len(y):,} samples"), y @ plane, TRUTH)
    return figure


def _pictures(figure: Figure, x: Tensor, truth: Tensor, shape: tuple[int, int]) -> None:
    """The first `PICTURES` of each in a square."""
    for ax, images, whose in zip(figure.subplots(1, 2), (x, truth), ("Student", "Target"), strict=True):
        ax.imshow(_mosaic(images, shape), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_axis_off()
        number = min(len(images), PICTURES)
        ax.set_title(f"{whose}: {number:,} {'samples' if whose == 'Student' else 'true samples'}", **TITLE)


def _mosaic(images: Tensor, shape: tuple[int, int]) -> NDArray[np.float32]:
    side = math.isqrt(PICTURES)
    tiles = images.new_full((PICTURES, shape[0] + 2, shape[1] + 2), float("nan"))  # with a margin
    shown = images[:PICTURES].view(-1, *shape)
    tiles[: len(shown), 1:-1, 1:-1] = shown
    mosaic: NDArray[np.float32] = tiles.unflatten(0, (side, side)).transpose(1, 2).flatten(2).flatten(0, 1).numpy()
    return mosaic


def _points(figure: Figure, x: Tensor, truth: Tensor, problem: Problem) -> None:
    """Both clouds in the target's plane, on the same axes."""
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    cloud(_plane(left, f"Student: {len(x):,} samples"), x, truth, problem)
    cloud(_plane(right, f"Target: {len(truth):,} true samples"), truth, truth, problem)
    if problem.data_shape != (2,):
        for ax in (left, right):
            ax.set_xlabel("first principal component", fontsize=9, color=MUTED)
        left.set_ylabel("second principal component", fontsize=9, color=MUTED)


def cloud(ax: Axes, x: Tensor, truth: Tensor, problem: Problem) -> None:
    """Samples in the target's plane over the density's contours, or the true samples themselves."""
    plane = principal_plane(problem)
    low, high = _window(truth @ plane)
    if x is truth:
        _scatter(ax, x @ plane, TRUTH)
    else:
        astray = off_modes(x, problem)
        _scatter(ax, x[~astray] @ plane, STUDENT)
        _scatter(ax, x[astray] @ plane, ASTRAY, size=5.0)
    if problem.denoiser is not None:
        _contours(ax, projected(problem.denoiser, plane), truth @ plane, low, high)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def small_figure(samples: Tensor, truth: Tensor, problem: Problem) -> Figure:
    """One set of samples, or the true ones themselves, for a page with many of them; errors as `samples_figure`'s."""
    figure = Figure(figsize=(3.9, 3.9), layout="constrained")
    ax, x = figure.add_subplot(), truth if samples is truth else _shown(samples, problem)
    if problem.image_shape is not None:
        ax.imshow(_mosaic(x, problem.image_shape), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_axis_off()
    else:
        cloud(_plane(ax, ""), x, truth, problem)
    return figure


def principal_plane(problem: Problem) -> Tensor:
    """V (d, 2): the plane's own axes, or the first two principal directions of true samples, signs fixed."""
    return plane_of(problem.sample(SHOWN, torch.Generator().manual_seed(1)))


def plane_of(truth: Tensor) -> Tensor:
    """The same of points (n, d)."""
    if truth.shape[1] == 2:
        return torch.eye(2)
    v: Tensor = torch.linalg.eigh(truth.T.cov()).eigenvectors[:, [-1, -2]]
    return v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()


def projected(mixture: GaussianMixture, plane: Tensor) -> GaussianMixture:
    """The density of Vᵀx for x of an isotropic mixture."""
    return GaussianMixture(mixture.means @ plane, std=mixture.std, weights=mixture.weights)


def off_modes(x: Tensor, problem: Problem) -> Tensor:
    """Whether each sample (n, d) is farther than `mode_radius` standard deviations from every mode, (n,)."""
    if problem.modes is None:
        return torch.zeros(len(x), dtype=torch.bool)
    distance = torch.cdist(x, problem.modes.means.to(x), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return distance > mode_radius(x.shape[1]) * problem.modes.std


def _window(truth: Tensor) -> tuple[list[float], list[float]]:
    low, high = truth.amin(0), truth.amax(0)
    centre, half = (low + high) / 2, 0.54 * (high - low).amax()
    return (centre - half).tolist(), (centre + half).tolist()


def _plane(ax: Axes, title: str) -> Axes:
    bare(ax)
    ax.set_aspect("equal")
    ax.set_title(title, **TITLE)
    return ax


def _scatter(ax: Axes, x: Tensor, colour: str, size: float = 1.6) -> None:
    ax.scatter(x[:, 0], x[:, 1], s=size, c=colour, alpha=0.55, linewidths=0, rasterized=True)


def _contours(ax: Axes, density: GaussianMixture, truth: Tensor, low: list[float], high: list[float]) -> None:
    u, v = (torch.linspace(a, b, GRID) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(u, v).to(truth)
    log_prob = density.log_prob(grid).view(GRID, GRID).T
    levels = density.log_prob(truth).quantile(1 - torch.tensor(MASSES).to(truth))
    distinct = sorted(set(levels.tolist()))
    ax.contour(u, v, log_prob, levels=distinct, colors=INK, linewidths=0.5, linestyles="solid", alpha=0.55)


def quality_figure(curve: Curve, standard: Standard | None, scale: Scale = "linear") -> Figure:
    """An evaluation's metric over steps (below) and time (above), with the line and band of true samples.

    The band is two standard deviations of one evaluation of true samples to either side.
    """
    figure, ax = _chart(curve)
    log, low = scale in ("log", "share"), -np.inf
    if log:
        low = min(v for v in (*curve.values, standard.mean if standard else 1.0, 1.0) if v > 0) / 2
        ax.set_yscale("log")
    values = np.maximum(curve.values, low)
    known = [] if standard is None else [max(standard.mean, low)]
    ax.set_ylim(*_limits(values, known, log))
    if standard is not None:
        bottom, top = (max(standard.mean + 2 * sign * standard.std, low) for sign in (-1, 1))
        ax.fill_between([0, 1], bottom, top, transform=ax.get_yaxis_transform(), color=TRUTH, alpha=0.18, lw=0)
        ax.axhline(known[0], color=TRUTH, linewidth=1.2)
    marker = "o" if len(values) < 40 else ""
    ax.plot(curve.steps, values, color=STUDENT, linewidth=1.8, marker=marker, markersize=3)
    ticks(ax, scale)
    return figure


def noisy_figure(curve: Curve, floor: float | None = None) -> Figure:
    """A value that differs from step to step: as logged, its running median, and the least it can be."""
    figure, ax = _chart(curve)
    known = [] if floor is None else [floor]
    for level in known:
        ax.axhline(level, color=TRUTH, linewidth=1.2)
    ax.plot(curve.steps, curve.values, color=STUDENT, linewidth=0.8, alpha=0.4)
    ax.plot(curve.steps, running_median(curve.values), color=STUDENT, linewidth=1.8)
    ax.set_ylim(*_limits(curve.values, known, log=False))
    ticks(ax)
    return figure


def levels_figure(low: Curve, middle: Curve, high: Curve, scales: Mapping[str, float]) -> Figure:
    """Noise levels σ/α over training, from the 5 % to the 95 % quantile, with named scales of the data."""
    figure, ax = _chart(middle)
    ax.set_yscale("log")
    ax.fill_between(low.steps, low.values, high.values, color=STUDENT, alpha=0.2, linewidth=0)
    ax.plot(middle.steps, middle.values, color=STUDENT, linewidth=1.8)
    for name, scale in scales.items():
        ax.axhline(scale, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.annotate(
            name, (1, scale), (-2, 3), ax.get_yaxis_transform(), "offset points", ha="right", fontsize=8, color=MUTED
        )
    ticks(ax, "log")
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
    ticks(ax, "log" if log else "linear")
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
    ratio, dikl, diu = (ordered[name] for name in ("ratio", "dikl", "diu"))
    left.fill_between(ratio, dikl, diu, color=STUDENT, alpha=0.12, linewidth=0)
    left.legend(loc="best", fontsize=9, frameon=False, labelcolor=INK)
    _errors(right, ordered, "gap", ASTRAY, "gap")
    for ax, title in ((left, "Bound and diffusive KL (nats)"), (right, "Gap: bound − KL (nats)")):
        bare(ax)
        ax.set_title(title, loc="left", fontsize=10, color=INK)
        ax.axhline(0, color=RULE, linewidth=0.8, zorder=0)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(plain))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("noise level σ/α", fontsize=9, color=MUTED)
        ticks(ax)
    return figure


def _errors(ax: Axes, bound: Mapping[str, NDArray[np.float64]], name: str, colour: str, label: str) -> None:
    ax.errorbar(
        bound["ratio"], bound[name], 2 * bound[f"{name}_error"],
        color=colour, label=label, linewidth=1.6, elinewidth=1.0, marker="o", markersize=3.5,
    )  # fmt: skip


def _chart(curve: Curve) -> tuple[Figure, Axes]:
    """An empty chart with steps below and the clock above."""
    figure = Figure(figsize=(3.9, 2.35), layout="constrained")
    ax = figure.add_subplot()
    bare(ax)
    end = max(float(curve.steps[-1]), 1.0)
    ax.set_xlim(0, 1.015 * end)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.set_xlabel("steps", fontsize=9, color=MUTED, labelpad=1)
    seconds = float(curve.seconds[-1])
    unit, name = next(((u, n) for u, n in ((3600.0, "h"), (60.0, "min")) if seconds > 2 * u), (1.0, "s"))
    marks = [v for v in MaxNLocator(5).tick_values(0, seconds / unit) if 0 <= v * unit <= seconds]
    clock = ax.twiny()
    bare(clock)
    clock.spines["bottom"].set_visible(False)
    clock.set_xlim(0, 1.015 * end)
    along = np.interp([v * unit for v in marks], [0.0, *curve.seconds], [0.0, *curve.steps])
    clock.set_xticks(along, [f"{v:g} {name}" for v in marks])
    clock.tick_params(pad=0)
    return figure, ax


def bare(ax: Axes) -> None:
    """Axes of two thin lines on the page's own ground."""
    ax.set_facecolor("none")
    for spine in ax.spines.values():
        spine.set_color(RULE)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=3, width=0.8, color=RULE)


def legend_beside(figure: Figure) -> None:
    """The names of the lines, those of the last panel, to the right of all panels."""
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8.5, frameon=False, labelcolor=INK)


def doublings(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic horizontal axis with ticks at these values alone."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(plain))


def ticks(ax: Axes, scale: Scale = "linear") -> None:
    """A few ticks of the vertical axis, with lines across."""
    if scale in ("log", "share"):
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,), numticks=6))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=scale == "count", min_n_ticks=1))
    ax.yaxis.set_major_formatter(FuncFormatter(_percent if scale == "share" else plain))
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)


def plain(v: float, position: int | None = None) -> str:
    """A number on an axis: short, with a minus sign that is one."""
    if v and not 1e-2 <= abs(v) < 1e5:
        mantissa, exponent = f"{v:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}").replace("-", "−")


def _percent(v: float, position: int | None = None) -> str:
    return f"{100 * v:.3g} %"


def _limits(values: NDArray[np.float64], known: list[float], log: bool) -> tuple[float, float]:
    """Limits for the values and known lines; without the first tenth where it alone would double the span."""
    late = np.array([*values[len(values) // 10 :], *known])
    everything = np.array([*values, *known])
    shown = late if _span(everything, log) > 2 * _span(late, log) else everything
    low, high = float(shown.min()), float(shown.max())
    if log:
        return low / 1.4, high * 1.4
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _span(values: NDArray[np.float64], log: bool) -> float:
    return float(np.ptp(np.log(values) if log else values))


def running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over a tenth of the values around each, itself included."""
    half = len(values) // 20
    return np.array([np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element for a page, as wide as its place.

    `COLOURS` are CSS variables, text stays text in the reader's fonts, samples are an embedded PNG, and
    identifiers differ between labels. Matplotlib's settings change for the length of the call alone.
    """
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.sans-serif": FONTS}
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure.savefig(buffer, format="svg", dpi=180, transparent=True, metadata={"Date": None})
    markup = re.sub(r"<(metadata|style)\b.*?</\1>", "", buffer.getvalue(), flags=re.DOTALL)
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    for name, colour in COLOURS.items():
        markup = markup.replace(colour, f"var(--{name})")
    head, body = markup[markup.index("<svg") :].split(">", 1)
    shape = head.split('viewBox="')[1].split('"')[0]
    return f'<svg viewBox="{shape}" role="img" aria-label="{escape(label)}">{body.strip()}'
