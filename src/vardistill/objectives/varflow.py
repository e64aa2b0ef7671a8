r"""VarFlow: the energy distance between the noisy marginals of student and data (Shao, Xia, Ren, Wang & Xiao).

For x_t^S = α_t g_θ(z) + σ_t ε and x_t^T = α_t y + σ_t ε′, y ~ p_d, all K of a group at the same t,

    L_t = w(t) [ E‖x_t^S − x_t^T‖^β − ½ E‖x_t^S − x_t^{S′}‖^β ],   β ∈ (0, 2),

which is half the squared energy distance (Székely & Rizzo 2013) up to the data's own term. The second mean is over the
K(K − 1) ordered pairs i ≠ j, the first over all K² pairs (a U-statistic) or over the K pairs i = j: both are unbiased,
and so are their gradients. Over several processes the groups are gathered, so K is that of the global batch.

Under labels the points are pairs (x_t, c), and the real sample of a latent is drawn under the latent's label. Only real
samples of other latents have a label that is independent of the row's, as the distance between the joint laws asks for:
the first mean is then over i ≠ j, or over the K pairs j = i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import Draw
from vardistill.errors import UsageError, first_line, unknown
from vardistill.objectives.base import Objective
from vardistill.objectives.energy import check_beta, mean_distances, paired_distances
from vardistill.processes import gather, gather_with_gradient, rank
from vardistill.students.student import Student
from vardistill.training.data import Conditions

Cross = Literal["all", "paired"]


class VarFlow(Objective):
    """The energy distance to real samples, which may be a data set's or a teacher's: no score is needed.

    Its levels must be shared by rows (`NoiseLevels(shared=...)`): a group of one level is what it compares.

    Args:
        beta: the power β of the distance.
        cross: `all` K² pairs of student and real samples, or only the K `paired` ones.
        features: a frozen map of noisy samples (R, *data) and their times (R,) → (R, *features) in which distances are
            taken; default none.
        classes: K, where steps draw labels 0..K−1: distances are then between the joint distributions of samples and
            labels, with the points (φ(x_t), √(λ/2) e_c).
        label_distance: λ, what different labels add to the squared distance; positive.
        teacher: only where another part of a run wants to know whom the real samples come from.

    Raises:
        UsageError: for β outside (0, 2), an unknown cross term, or a λ that is not positive and finite.
    """

    needs_real = True
    compares_groups = True
    smallest_batch = 2

    def __init__(
        self,
        beta: float = 1.0,
        cross: Cross = "all",
        features: Callable[[Tensor, Tensor], Tensor] | None = None,
        classes: int = 0,
        label_distance: float = 1.0,
        teacher: Denoiser | None = None,
    ) -> None:
        super().__init__(teacher)
        check_beta(beta)
        if cross not in get_args(Cross):
            raise unknown("cross term", cross, get_args(Cross))
        self.beta, self.cross = beta, cross
        if not 0 < label_distance < math.inf:
            raise UsageError(f"label_distance must be positive and finite, but is {label_distance:g}")
        self.classes, self.label_distance = classes, label_distance
        self.features = features
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VarFlow:
        """The feature map stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.features, nn.Module):
            self.features.eval()
        return self

    def check(self, generator: Student, conditions: Conditions | None = None) -> None:
        """Raise UsageError unless the feature map takes noisy samples and their times, and lets gradient through."""
        super().check(generator, conditions)
        if self.features is None:
            return
        like = next(generator.parameters())
        noise = torch.randn(2, *generator.data_shape, generator=torch.Generator().manual_seed(0))
        x_t = (generator.data_std * noise).to(like).requires_grad_()
        try:
            with torch.enable_grad():
                points = self.features(x_t, torch.full((2,), 0.5, dtype=like.dtype, device=like.device))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            shape, reason = tuple(x_t.shape), first_line(error)
            raise UsageError(
                f"the feature map does not take noisy samples, {shape}, and times, (2,): {reason}"
            ) from error
        if not isinstance(points, Tensor):
            raise UsageError(
                f"the feature map must return a tensor (R, *features), but returns {type(points).__name__}"
            )
        if points.ndim < 2 or len(points) != 2:
            raise UsageError(f"the feature map must return (R, *features), but returns {tuple(points.shape)} for R = 2")
        if not points.isfinite().all():
            raise UsageError("the feature map returns NaN or infinity for Gaussian noise at t = 0.5")
        if not points.requires_grad or torch.autograd.grad(points.sum(), x_t, allow_unused=True)[0] is None:
            raise UsageError(
                "no gradient passes the feature map: it cuts the graph, e.g. by no_grad; its weights are frozen anyway"
            )

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Nothing: the feature map is frozen."""
        return {}

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) [ mean_j ‖x_i − y_j‖^β − ½ mean_{j≠i} ‖x_i − x_j‖^β ] of each row i, (R,)."""
        x, y = self._groups(draw, draw.x_t), self._groups(draw, draw.real_t)
        cross = self._paired if self.cross == "paired" else self._between
        return draw.noise.weight * draw.noise.ungroup(cross(x, y, "labels" in draw.batch) - 0.5 * self._within(x))

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """The feature map at student and real samples."""
        return 0 if self.features is None else 2 * latents * draws

    @torch.no_grad()
    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """Half the energy distance, meaned over the step's levels: 0 in the mean where student and data agree."""
        x, y = self._groups(draw, draw.x_t), self._groups(draw, draw.real_t)
        distance = self._between(x, y, "labels" in draw.batch) - 0.5 * self._within(x) - 0.5 * self._within(y)
        return {"half_energy_distance": distance.mean()}

    def _groups(self, draw: Draw, x_t: Tensor) -> Tensor:
        """The points that distances are taken between, by groups of one level, (G·L, K, d)."""
        points = (x_t if self.features is None else self.features(x_t, draw.noise.t)).flatten(1)
        if "labels" in draw.batch:
            points = torch.cat([points, self._corners(draw.batch["labels"]).to(points)], dim=1)
        return draw.noise.groups(points)

    def _corners(self, labels: Tensor) -> Tensor:
        """√(λ/2) e_c, (R, K): corners of a simplex of squared side λ."""
        if not self.classes:
            raise UsageError("steps draw labels: tell VarFlow their number, classes=K")
        return functional.one_hot(labels, self.classes) * math.sqrt(self.label_distance / 2)

    def _between(self, x: Tensor, y: Tensor, labelled: bool) -> Tensor:
        """mean_j ‖x_i − y_j‖^β, over j ≠ i where the i-th real sample shares its label with the row."""
        everyone = gathered(y)
        mean, n = mean_distances(x, everyone, self.beta), everyone.shape[1]
        return (n * mean - paired_distances(x, y, self.beta)) / (n - 1) if labelled else mean

    def _paired(self, x: Tensor, y: Tensor, labelled: bool) -> Tensor:
        """‖x_i − y_i‖^β, or ‖x_i − y_{i+1}‖^β where the i-th real sample shares its label with the row."""
        own = slice(rank() * x.shape[1], (rank() + 1) * x.shape[1])
        return paired_distances(x, gathered(y).roll(-1, dims=1)[:, own] if labelled else y, self.beta)

    def _within(self, x: Tensor) -> Tensor:
        return mean_distances(x, gathered(x), self.beta, own=rank() * x.shape[1])


def gathered(x: Tensor) -> Tensor:
    """The groups (G, K, d) with all processes' samples, (G, P·K, d), with gradient where x has one."""
    collect = gather_with_gradient if x.requires_grad else gather
    return collect(x.transpose(0, 1)).transpose(0, 1)
