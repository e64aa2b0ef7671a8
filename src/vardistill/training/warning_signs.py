r"""Warning signs: what the logged scalars say about how a run goes wrong, early enough to act.

A rule watches a scalar of the lines of metrics. It looks at the median of the last few lines, so that one odd line is
no sign, and from a share of the run on, so that the start of training is none. `signs` is a pure function of the lines:
the progress bar, the report and a resumed run see the same. Thresholds and their reasons are in docs/warnings.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

Line = Mapping[str, Any]
"""A line of metrics, as in `metrics.jsonl`."""

WARM_UP = 0.1
"""Share of a run in which most rules look away."""

WINDOW = 5
"""Lines that a rule takes the median of."""


@dataclass(frozen=True)
class Sign:
    """Something that a user should act on.

    Attributes:
        name: short, for the progress bar; with a colon and the part of the objective that it is about, if any.
        since: step of the line that brought it.
        value: what was measured last.
        threshold: what it is beyond.
        meaning: what is wrong.
        remedy: what to do.
    """

    name: str
    since: int
    value: float
    threshold: float
    meaning: str
    remedy: str

    def __str__(self) -> str:
        numbers = f"{self.value:.3g}, threshold {self.threshold:.3g}"
        return f"{self.name} since step {self.since}: {self.meaning} ({numbers}). {self.remedy}"


@dataclass(frozen=True)
class Rule:
    """When a scalar is a sign.

    Attributes:
        name: of the sign.
        scalars: the values in a line, by the part that they are about ("" for the whole); non-finite ones are skipped.
        threshold: of their running median.
        meaning: see `Sign`.
        remedy: see `Sign`.
        kind: of the lines that have it: "train", or "eval".
        below: whether the sign is to be below the threshold, not above.
        warm_up: share of the run in which lines do not count.
        window: lines in the median.
        against: turns the median and the best median so far into what is held against the threshold.
        best: of two medians.
    """

    name: str
    scalars: Callable[[Line], Mapping[str, float]]
    threshold: float
    meaning: str
    remedy: str
    kind: str = "train"
    below: bool = False
    warm_up: float = WARM_UP
    window: int = WINDOW
    against: Callable[[float, float], float] = lambda now, best: now
    best: Callable[[float, float], float] = max


def column(name: str) -> Callable[[Line], dict[str, float]]:
    """The scalar of this name; NAME of a part of a sum is PART/NAME."""

    def scalars(line: Line) -> dict[str, float]:
        parts = {key: key.removesuffix(name).rstrip("/") for key in line if key == name or key.endswith(f"/{name}")}
        return {part: number(line[key]) for key, part in parts.items()}

    return scalars


def difference(a: str, b: str) -> Callable[[Line], dict[str, float]]:
    """Scalar a less scalar b, where a line has both."""
    return lambda line: {part: v - w for part, v, w in both(a, b, line)}


def share(a: str, b: str) -> Callable[[Line], dict[str, float]]:
    """Scalar a over scalar b, where a line has both."""
    return lambda line: {part: v / (w or math.nan) for part, v, w in both(a, b, line)}


def both(a: str, b: str, line: Line) -> Iterator[tuple[str, float, float]]:
    """Scalars a and b of every part that has them."""
    first, second = column(a)(line), column(b)(line)
    return ((part, v, second[part]) for part, v in first.items() if part in second)


def number(v: Any) -> float:
    """A logged value; null, which stands for what is not finite, and what is no number are NaN."""
    return float(v) if isinstance(v, int | float) else math.nan


def _untargeted_diversity(line: Line) -> dict[str, float]:
    return {} if "diversity_target" in line else column("diversity")(line)


def _gradient_norms(line: Line) -> dict[str, float]:
    prefix = "grad_norm_"
    return {key.removeprefix(prefix): number(v) for key, v in line.items() if key.startswith(prefix)}


LOST = "modes are being lost: the student's samples fill less than {} filled"
COVER = "Add an objective that covers (VarFlow), more candidates or posterior steps, or anneal the levels slower."

RULES = (
    Rule(
        "posterior-collapse",
        share("posterior_information", "posterior_capacity"),
        0.05,
        "q(z | x_t) tells next to nothing of the latent: it ignores x_t, or lags far behind the generator",
        "Give it a head_start (with posterior_steps of 2 or more), raise auxiliary_lr or posterior_steps, lower lr, or "
        "start the student as a linear map.",
        below=True,
    ),
    Rule(
        "mode-loss",
        difference("diversity_target", "diversity"),
        math.log(5 / 4),
        LOST.format("four fifths of what as many of the target's"),
        COVER,
    ),
    Rule(
        "mode-loss",
        _untargeted_diversity,
        math.log(2),
        LOST.format("half of what its own once"),
        COVER,
        against=lambda now, best: best - now,
    ),
    Rule(
        "collapse",
        column("spread"),
        0.25,
        "the student's samples are nearly one point: they spread over less than a quarter of the data's deviation",
        "Score distillation sampling does this whatever its settings (Diff-Instruct does not); else add an objective "
        "that covers (VarFlow), or lower lr.",
        below=True,
    ),
    Rule(
        "runaway",
        column("spread"),
        3.0,
        "the student runs away from the data: its samples spread over more than three times their deviation",
        "Lower lr, raise critic_steps or start the critic as the teacher; for SiD set a to 1 or below. The loss of SiD "
        "and SiM does not tell.",
    ),
    Rule(
        "adversarial-term",
        column("adversarial_share"),
        0.5,
        "the adversarial term drives the student more than the score difference does: it oversharpens what a "
        "discriminator can tell apart",
        "Lower generator_gan, which is for losses that are means over the data axes.",
    ),
    Rule(
        "critic-lag",
        column("critic_lag"),
        1.05,
        "the critic denoises the student's samples worse than the teacher does: what it passes on is its own error",
        "Raise critic_steps or auxiliary_lr, lower lr, or start the critic as the teacher.",
    ),
    Rule(
        "idle-levels",
        column("low_level_share"),
        1e-4,
        "a third of the rows, those of the lowest noise levels, has next to no gradient",
        "Raise the smallest level, or use a weight that falls less with the level (sigma2_linear).",
        below=True,
    ),
    Rule(
        "behind-teacher",
        column("teacher_excess"),
        0.01,
        "the student is far from its teacher's own sampler, and the run is nearly over",
        "Train longer or with a larger batch, or compare with the teacher's samples (VarFlow).",
        kind="eval",
        warm_up=0.8,
        window=1,
    ),
    Rule(
        "leaving-teacher",
        column("teacher_excess"),
        0.003,
        "the student moves away from its teacher's own sampler, to which it was nearer: it follows errors of the "
        "teacher's that this sampler does not meet",
        "Compare with the teacher's samples (VarFlow), raise the smallest level, or start a critic as the teacher.",
        kind="eval",
        window=3,
        against=lambda now, best: now - best,
        best=min,
    ),
    Rule(
        "skipped-updates",
        column("skipped"),
        0.0,
        "updates were skipped, as their loss or gradient was not finite",
        "Lower lr or clip, or raise the smallest level.",
        warm_up=0.0,
        window=1,
    ),
    Rule(
        "gradient-explosion",
        _gradient_norms,
        100.0,
        "the gradient's norm is many times its lowest",
        "Lower the learning rate of these weights, or clip.",
        warm_up=0.0,
        against=lambda now, best: now / best if best else math.nan,
        best=min,
    ),
)


class Watch:
    """All rules over a run's lines, one line at a time."""

    def __init__(self, history: Iterable[Line] = ()) -> None:
        self.series: dict[tuple[int, str], _Series] = {}
        self.told: set[str] = set()
        self.progress = 0.0
        for line in history:
            self.observe(line)

    def observe(self, line: Line) -> list[Sign]:
        """Take a line in; the signs that come up with it for the first time in the run."""
        kind = line.get("kind", "train")
        self.progress = number(line.get("progress", self.progress))  # of an evaluation the last train line's
        for i, rule in enumerate(RULES):
            if rule.kind == kind and self.progress >= rule.warm_up:
                for part, value in rule.scalars(line).items():
                    self.series.setdefault((i, part), _Series(rule, part)).observe(value, int(line["step"]))
        new = [sign for sign in self.signs if sign.name not in self.told]
        self.told |= {sign.name for sign in new}
        return new

    @property
    def signs(self) -> list[Sign]:
        """Those that are there after the last line."""
        return [sign for series in self.series.values() if (sign := series.sign) is not None]


def signs(history: Iterable[Line]) -> list[Sign]:
    """The signs that are there at the end of a run's lines, oldest first."""
    return sorted(Watch(history).signs, key=lambda sign: sign.since)


class _Series:
    """One scalar under one rule."""

    def __init__(self, rule: Rule, part: str) -> None:
        self.rule, self.part = rule, part
        self.recent: deque[float] = deque(maxlen=rule.window)
        self.best: float | None = None
        self.value = math.nan
        self.since: int | None = None

    def observe(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            return
        self.recent.append(value)
        if len(self.recent) < self.rule.window:
            return
        now = median(self.recent)
        self.best = now if self.best is None else self.rule.best(self.best, now)
        self.value = self.rule.against(now, self.best)
        beyond = self.value < self.rule.threshold if self.rule.below else self.value > self.rule.threshold
        self.since = (step if self.since is None else self.since) if beyond else None

    @property
    def sign(self) -> Sign | None:
        if self.since is None:
            return None
        rule = self.rule
        name = f"{rule.name}:{self.part}" if self.part else rule.name
        return Sign(name, self.since, self.value, rule.threshold, rule.meaning, rule.remedy)
