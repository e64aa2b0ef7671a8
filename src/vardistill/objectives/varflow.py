r"""VarFlow: the energy distance between the noisy marginals of student and data (Shao, Xia, Ren, Wang & Xiao).

For x_t^S = α_t g_θ(z) + σ_t ε and x_t^T = α_t y + σ_t ε′, y ~ p_d, all K of a group at the same t, and ‖·‖ the root
mean square over the data axes (the Euclidean norm over √d, as all losses here are means over these axes),

    L_t = w(t) [ E‖x_t^S − x_t^T‖^β − ½ E‖x_t^S − x_t^{S′}‖^β ],   β ∈ (0, 2),

which is half the squared energy distance (Székely & Rizzo 2013) up to the data's own term. The second mean is over the
K(K − 1) ordered pairs i ≠ j, the first over all K² pairs (a U-statistic) or over the K pairs i = j: both are unbiased,
and so are their gradients. Over several processes the groups are gathered, so K is that of the global batch.

Under a condition the points are pairs (x_t, c), and the real sample of a latent is drawn under the latent's condition.
Only real samples of other latents have a condition that is independent of the row's, as the distance between the joint
laws asks for: the first mean is then over i ≠ j, or over the K pairs j = i + 1.

With m latents that share a condition there is another way: distances are taken among these alone, as if each condition
were a run of its own. The loss is then the energy score of p_S(· | c) at real samples under c (Gneiting & Raftery 2007,
J. Am. Stat. Assoc. 102, 359–378), which one real sample of a condition is enough for. It suits conditions of which
there are many: among all pairs hardly two would share one.

Features may come in several views φ_v at several places p (blocks of a network, say). The loss is then the mean over
all of them of L_t between φ_vp(x_t)/s_v, with s_v the step's mean distance ‖φ_vp(x_t^S) − φ_vp(x_t^T)‖, without
gradient: views of different scale count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from vardistill.errors import UsageError, first_line, require, unknown
from vardistill.lazy import Later
from vardistill.objectives.base import Needs, Objective, Parts, RealConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vardistill import processes
    from vardistill.diffusion import Denoiser, Draw
    from vardistill.objectives import energy
    from vardistill.students import Student
else:
    torch, nn = Later("torch"), Later("torch.nn")
    processes, energy = Later("vardistill.processes"), Later("vardistill.objectives.energy")

Cross = Literal["all", "paired"]


@dataclass(frozen=True)
class VarFlowConfig(RealConfig):
    """VarFlow: the energy distance to real samples. Its levels must be shared by rows (`shared`).

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "varflow"
    cost: ClassVar[int] = 1
    compares_groups: ClassVar[bool] = True
    beta: float = 1.0
    """Power of the distance, in (0, 2)."""
    cross: Cross = "all"
    """Pairs of student and real samples: all K², or K."""
    space: Literal["data", "classifier", "teacher", "teacher-blocks"] = "data"
    """Where distances are taken: between the data themselves, or features of pictures: of their classifier, of the
    teacher's encoder, or of all blocks of the teacher, place by place."""
    label_distance: float = 0.15
    """What different labels add to the squared root mean square distance, for a conditional student."""
    per_condition: int = 0
    """Latents that share a condition, among which alone distances are taken; 0 for all pairs, with labels in the
    distance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_per_condition(self.per_condition)
        require("beta", self.beta, 0 < self.beta < 2, "in (0, 2)")
        require("label_distance", self.label_distance, self.label_distance > 0, "positive")

    @property
    def takes_teacher(self) -> bool:
        """Whether it has a teacher: from data alone it has none, unless distances are taken in its features."""
        return self.real == "teacher" or self.space.startswith("teacher")

    def build(self, parts: Parts) -> VarFlow:
        """The objective; it knows the teacher only as whose samples it may compare with."""
        return VarFlow(
            self.beta,
            self.cross,
            features=parts.space(self.space),
            classes=parts.student.classes,
            label_distance=self.label_distance,
            teacher=parts.teacher,
            per_condition=self.per_condition if parts.student.condition_names else 0,
        )


class VarFlow(Objective):
    """The energy distance to real samples, which may be a data set's or a teacher's: no score is needed.

    Its levels must be shared by rows (`NoiseLevels(shared=...)`): a group of one level is what it compares.

    Args:
        beta: the power β of the distance.
        cross: `all` K² pairs of student and real samples, or only the K `paired` ones.
        features: a frozen map of noisy samples (R, *data) and their times (R,) → (R, *features) in which distances are
            taken, or → a list of views (R, places, f), each of which is compared at each of its places; default none.
        classes: K, where steps draw labels 0..K−1: distances are then between the joint distributions of samples and
            labels, with the points (φ(x_t)/√f, √(λ/2) e_c).
        label_distance: λ, what different labels add to the squared distance; positive.
        condition_features: for conditions other than labels: maps them, (R, ...) by name, to points (R, f) whose
            squared distances are added likewise.
        teacher: only where another part of a run wants to know whom the real samples come from.
        per_condition: m ≥ 2, latents that share a condition, among which alone distances are taken; 0 for all pairs.

    Raises:
        UsageError: for β outside (0, 2), an unknown cross term, a λ that is not positive and finite, or an m of 1.
    """

    def __init__(
        self,
        beta: float = 1.0,
        cross: Cross = "all",
        features: Callable[[Tensor, Tensor], Tensor] | None = None,
        classes: int = 0,
        label_distance: float = 1.0,
        condition_features: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        teacher: Denoiser | None = None,
        per_condition: int = 0,
    ) -> None:
        _check_per_condition(per_condition)
        super().__init__(teacher, frozen=(features,) if isinstance(features, nn.Module) else ())
        energy.check_beta(beta)
        if cross not in get_args(Cross):
            raise unknown("cross term", cross, get_args(Cross))
        self.beta, self.cross = beta, cross
        if not 0 < label_distance < math.inf:
            raise UsageError(f"label_distance must be positive and finite, but is {label_distance:g}")
        self.classes, self.label_distance = classes, label_distance
        self.features, self.condition_features = features, condition_features
        self.per_condition = per_condition

    @property
    def needs(self) -> Needs:
        """Real samples, and groups of one level."""
        return Needs(real=True, groups=True, smallest_batch=2, per_condition=self.per_condition)

    def check(self, student: Student, condition: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless the feature map takes noisy samples and lets gradient through, and conditions fit."""
        super().check(student, condition)
        if list(condition) == ["labels"] and self.condition_features is None and self.classes < student.classes:
            raise UsageError(f"the generator takes {student.classes} labels: tell VarFlow, classes={student.classes}")
        if condition:
            self._condition_points(condition)
        if self.features is None:
            return
        like = next(student.parameters())
        noise = torch.randn(2, *student.data_shape, generator=torch.Generator().manual_seed(0))
        x_t = (student.data_std * noise).to(like).requires_grad_()
        try:
            with torch.enable_grad():
                points = self.features(x_t, torch.full((2,), 0.5, dtype=like.dtype, device=like.device))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            shape, reason = tuple(x_t.shape), first_line(error)
            raise UsageError(
                f"the feature map does not take noisy samples, {shape}, and times, (2,): {reason}"
            ) from error
        for view in points if isinstance(points, list) and points else [points]:
            self._check_points(view, x_t, like="(R, places, f)" if view is not points else "(R, *features)")

    def _check_points(self, points: object, x_t: Tensor, like: str) -> None:
        """Raise UsageError unless these are features of two rows x_t, and differentiable."""
        if not isinstance(points, torch.Tensor):
            raise UsageError(f"the feature map must return a tensor {like}, but returns {type(points).__name__}")
        axes = points.ndim == 3 if "places" in like else points.ndim >= 2
        if not axes or len(points) != 2:
            raise UsageError(f"the feature map must return {like}, but returns {tuple(points.shape)} for R = 2")
        if not points.isfinite().all():
            raise UsageError("the feature map returns NaN or infinity for Gaussian noise at t = 0.5")
        if (
            not points.requires_grad
            or torch.autograd.grad(points.sum(), x_t, allow_unused=True, retain_graph=True)[0] is None
        ):
            raise UsageError(
                "no gradient passes the feature map: it cuts the graph, e.g. by no_grad; its weights are frozen anyway"
            )

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) [ mean_j ‖x_i − y_j‖^β − ½ mean_{j≠i} ‖x_i − x_j‖^β ] of each row i, (R,); a mean over views."""
        losses = [self._cross(x, y, draw) - 0.5 * self._within(x) for x, y in self._views(draw)]
        return draw.noise.weight * draw.noise.ungroup(torch.stack([loss.flatten(2).mean(1) for loss in losses]).mean(0))

    def evaluations(self, latents: int, draws: int) -> int:
        """The feature map at student and real samples."""
        return 0 if self.features is None else 2 * latents * draws

    def measure(self, draw: Draw) -> dict[str, Tensor]:
        """Half the energy distance, meaned over the step's levels: 0 in the mean where student and data agree."""
        with torch.no_grad():
            distances = [
                (self._between(x, y, draw) - 0.5 * self._within(x) - 0.5 * self._within(y)).mean()
                for x, y in self._views(draw)
            ]
            return {"half_energy_distance": torch.stack(distances).mean()}

    def _views(self, draw: Draw) -> list[tuple[Tensor, Tensor]]:
        """What distances are taken between, of student and data, (G·L, places, ..., K, d) each.

        The groups are those of one level or, with m latents that share a condition, the (K/m, m) of these within them.
        """
        found = [v if self.features is None else self.features(v, draw.noise.t) for v in (draw.x_t, draw.real_t)]
        views = [found] if isinstance(found[0], torch.Tensor) else list(zip(*found, strict=True))
        pairs = []
        for pair in views:
            x, y = (draw.noise.groups(v.flatten(1)[:, None] if pair is found else v).transpose(1, 2) for v in pair)
            scale = math.sqrt(x.shape[-1]) if pair is found else mean_distance(x, y)
            pairs.append((self._conditional(draw, x / scale), self._conditional(draw, y / scale)))
        return pairs

    def _conditional(self, draw: Draw, points: Tensor) -> Tensor:
        """Points (G·L, places, K, d) with those of their conditions beside them, or by conditions."""
        if self.per_condition:
            return points.reshape(*points.shape[:2], -1, self.per_condition, points.shape[3])
        if not draw.batch:
            return points
        own = draw.noise.groups(self._condition_points(draw.batch))[:, None].to(points)
        return torch.cat([points, own.expand(-1, points.shape[1], -1, -1)], dim=3)

    def _condition_points(self, condition: Mapping[str, Tensor]) -> Tensor:
        """What stands for the conditions among the points, (R, f): of labels the corners √(λ/2) e_c of a simplex."""
        if self.condition_features is not None:
            return self.condition_features(condition)
        if list(condition) != ["labels"]:
            raise UsageError(
                f"steps draw the conditions {', '.join(condition)}, and VarFlow has to be told what their distances "
                "are: give condition_features"
            )
        if not self.classes:
            raise UsageError("steps draw labels: tell VarFlow their number, classes=K")
        corners = torch.nn.functional.one_hot(condition["labels"], self.classes)
        return corners * math.sqrt(self.label_distance / 2)

    def _cross(self, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        return (self._paired if self.cross == "paired" else self._between)(x, y, draw)

    def _between(self, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        """mean_j ‖x_i − y_j‖^β, over j ≠ i where the i-th real sample alone shares the row's condition."""
        everyone, _ = self._gathered(y)
        mean, n = energy.mean_distances(x, everyone, self.beta), everyone.shape[-2]
        if self._independent(draw):
            return mean
        return (n * mean - energy.paired_distances(x, y, self.beta)) / (n - 1)

    def _paired(self, x: Tensor, y: Tensor, draw: Draw) -> Tensor:
        """‖x_i − y_i‖^β, or ‖x_i − y_{i+1}‖^β where the i-th real sample alone shares the row's condition."""
        if self._independent(draw):
            return energy.paired_distances(x, y, self.beta)
        everyone, first = self._gathered(y)
        return energy.paired_distances(x, everyone.roll(-1, dims=-2)[..., first : first + x.shape[-2], :], self.beta)

    def _within(self, x: Tensor) -> Tensor:
        everyone, first = self._gathered(x)
        return energy.mean_distances(x, everyone, self.beta, own=first)

    def _independent(self, draw: Draw) -> bool:
        """Whether the i-th real sample is drawn as all others of its group are."""
        return bool(self.per_condition) or not draw.batch

    def _gathered(self, x: Tensor) -> tuple[Tensor, int]:
        """A group's samples of all processes, and where this one's begin; a condition's are on one process."""
        return (x, 0) if self.per_condition else (gathered(x), processes.rank() * x.shape[-2])


def _check_per_condition(m: int) -> None:
    require("per_condition", m, m == 0 or m >= 2, "0, or at least 2: distances need two samples of a condition")


def gathered(x: Tensor) -> Tensor:
    """The groups (..., K, d) with all processes' samples, (..., P·K, d), with gradient where x has one."""
    collect = processes.gather_with_gradient if x.requires_grad else processes.gather
    return collect(x.movedim(-2, 0)).movedim(0, -2)


def mean_distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean ‖x_i − y_{i+1}‖ of all groups and processes, (..., K, d) each, without gradient; 1 where it is 0."""
    distances = energy.paired_distances(x.detach(), y.detach().roll(-1, dims=-2))
    mean = processes.gather(distances.mean().reshape(1)).mean()
    return torch.where(mean > 0, mean, 1.0)
