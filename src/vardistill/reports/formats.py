"""How metrics and other numbers are shown in the pages of runs and benches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vardistill.metrics.modes import OFF_SHARE
from vardistill.reports.figures import Scale
from vardistill.reports.verdict import LEVEL


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: in the page.
        show: a value.
        truth: what true samples score, where there is no `Standard`.
        meaning: in half a line.
        scale: of its axis.
    """

    title: str
    show: Callable[[float], str]
    meaning: str
    truth: str = ""
    scale: Scale = "linear"


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
    "energy_distance": Metric(
        "Energy distance", significant, "to as many true samples, unbiased estimate", "0 in the mean"
    ),
    "energy_distance_teacher": Metric(
        "Energy distance to the teacher", significant, "to samples of the teacher's own sampler, unbiased estimate"
    ),
    "energy_distance_data": Metric("Energy distance to the data", significant, "to the data, unbiased estimate"),
    "energy_p_value": Metric(
        "Two-sample p-value",
        fixed(3),
        f"permutation test of the energy distance; below {LEVEL:g} it tells the two apart",
        "uniform in (0, 1)",
    ),
    "modes_found": Metric("Modes found", fixed(0), "modes that hold at least a quarter of their mass", scale="count"),
    "off_mode": Metric(
        "Samples off the modes",
        percent,
        f"farther from every mode than all but {percent(OFF_SHARE)} of its own mass",
        scale="share",
    ),
    "mode_tv": Metric("Mode total variation", fixed(3), "half the sum of the errors of the modes' masses", scale="log"),
    "energy_distance_held_out": Metric(
        "Energy distance, held out", significant, "to the held-out data, unbiased estimate"
    ),
    "precision": Metric(
        "Precision",
        percent,
        "samples within the 5-nearest-neighbour manifold of the held-out data, or of the teacher's samples",
    ),
    "recall": Metric(
        "Recall", percent, "held-out data, or the teacher's samples, within the samples' 5-nearest-neighbour manifold"
    ),
    "fd": Metric("Fréchet distance", fixed(3), "of the features of samples and training pictures"),
    "kd": Metric("Kernel distance", significant, "of these features, unbiased estimate", "0 in the mean"),
    "density": Metric("Density", fixed(3), "held-out pictures' neighbourhoods that a sample lies in, over k", "1"),
    "coverage": Metric("Coverage", percent, "held-out pictures with a sample in their neighbourhood"),
    "memorisation": Metric("Copies", percent, "samples that copy training pictures, an unbiased estimate", "0"),
    "label_accuracy": Metric("Label accuracy", percent, "samples that the classifier sees as the class asked for"),
    "prompt_accuracy": Metric("Prompt accuracy", percent, "pictures that are right in all that the prompt says"),
    "clip_score": Metric("CLIP score", fixed(1), "100 cos of picture and prompt, as the CLIP model sees them"),
    "diversity": Metric("Diversity", fixed(3), "difference of two pictures of a prompt, root mean square"),
    "seconds_per_image": Metric("Seconds per picture", significant, "of the student, one network evaluation"),
    "teacher_seconds_per_image": Metric("Seconds per picture, teacher", significant, "many steps, in the same run"),
    "teacher_evaluations": Metric("Evaluations per picture, teacher", fixed(0), "of its network"),
    "speedup": Metric("Speed-up", fixed(1), "the teacher's time over the student's"),
    "diu": Metric("Bound, DiU", fixed(3), "upper bound on the diffusive KL, nats, over a few noise levels", "0"),
    "dikl": Metric("Diffusive KL", fixed(3), "of the noisy student from the noisy target, nats, by quadrature", "0"),
    "gap": Metric(
        "Gap, DiU − DiKL", fixed(4), "what the bound gives away, in nats; large where the posterior lags", "0"
    ),
    "critic_error": Metric("Critic's error", fixed(3), "of its score, relative to the student's exact one", "0"),
    "gradient_bias": Metric(
        "Critic's bias", fixed(2), "what its error adds to the gradient, relative to the exact gradient", "0"
    ),
    "teacher_error": Metric(
        "Teacher's error", fixed(3), "of its score, relative to the exact one, mean over levels", "0"
    ),
}

SHARES = ("off_mode", "precision", "recall", "coverage", "memorisation", "label_accuracy", "prompt_accuracy")
"""Metrics that are shares, shown in per cent."""


def metric_of(name: str, title: str = "") -> Metric:
    """How a metric is shown; one that is not known under its title, or its name."""
    return METRICS.get(name, Metric(title or name, significant, ""))


def sentence_case(words: str) -> str:
    """With a capital letter and a full stop, where there is anything."""
    return f"{words[0].upper()}{words[1:]}." if words else ""
