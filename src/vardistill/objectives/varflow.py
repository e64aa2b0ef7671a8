r"""VarFlow: the energy distance between the noisy marginals of student and data (Shao, Xia, Ren, Wang & Xiao).

For x_t^S = α_t g_θ(z) + σ_t ε and x_t^T = α_t y + σ_t ε′, y ~ p_d, all K of a group at the same t,

    L_t = w(t) [ E‖x_t^S − x_t^T‖^β − ½ E‖x_t^S − x_t^{S′}‖^β ],   β ∈ (0, 2),

which is half the squared energy distance (Székely & Rizzo 2013) up to the data's own term. The second mean is over the
K(K − 1) ordered pairs i ≠ j, the first over all K² pairs (a U-statistic) or over the K pairs i = j: both are unbiased,
and so are their gradients. Over several processes the groups are gathered, so K is that of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vardistill.denoisers import Denoiser
from vardistill.energy import check_beta, mean_distances, paired_distances
from vardistill.errors import unknown
from vardistill.noise_levels import Draw, Noise
from vardistill.objectives.base import Objective
from vardistill.processes import gather, gather_with_gradient, rank

Cross = Literal["all", "paired"]


class VarFlow(Objective):
    """The energy distance to real samples, which may be a data set's or a teacher's: no score is needed.

    Its levels must be shared by rows (`NoiseLevels(shared=...)`): a group of one level is what it compares.

    Args:
        beta: the power β of the distance.
        cross: `all` K² pairs of student and real samples, or only the K `paired` ones.
        features: a frozen map of noisy samples (R, *data) → (R, *features) in which distances are taken; default none.
        teacher: only where another part of a run wants to know whom the real samples come from.

    Raises:
        UsageError: for β outside (0, 2) or an unknown cross term.
    """

    needs_real = True
    compares_groups = True
    smallest_batch = 2

    def __init__(
        self,
        beta: float = 1.0,
        cross: Cross = "all",
        features: Callable[[Tensor], Tensor] | None = None,
        teacher: Denoiser | None = None,
    ) -> None:
        super().__init__(teacher)
        check_beta(beta)
        if cross not in get_args(Cross):
            raise unknown("cross term", cross, get_args(Cross))
        self.beta, self.cross = beta, cross
        self.features = features
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VarFlow:
        """The feature map stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.features, nn.Module):
            self.features.eval()
        return self

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Nothing: the feature map is frozen."""
        return {}

    def generator_loss(self, draw: Draw) -> Tensor:
        """w(t) [ mean_j ‖x_i − y_j‖^β − ½ mean_{j≠i} ‖x_i − x_j‖^β ] of each row i, (R,)."""
        x, y = self._groups(draw.noise, draw.x_t), self._groups(draw.noise, draw.real_t)
        return draw.noise.weight * draw.noise.ungroup(self._cross(x, y) - 0.5 * self._within(x))

    def evaluations(self, latents: int, draws: int, critic: bool) -> int:
        """The feature map at student and real samples."""
        return 0 if self.features is None else 2 * latents * draws

    @torch.no_grad()
    def diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """Half the energy distance, meaned over the step's levels: 0 in the mean where student and data agree."""
        x, y = self._groups(draw.noise, draw.x_t), self._groups(draw.noise, draw.real_t)
        distance = mean_distances(x, gathered(y), self.beta) - 0.5 * self._within(x) - 0.5 * self._within(y)
        return {"half_energy_distance": distance.mean()}

    def _groups(self, noise: Noise, v: Tensor) -> Tensor:
        """Samples or their features by groups of one level, (G·L, K, d)."""
        features = v if self.features is None else self.features(v)
        return noise.groups(features.flatten(1))

    def _cross(self, x: Tensor, y: Tensor) -> Tensor:
        if self.cross == "paired":
            return paired_distances(x, y, self.beta)
        return mean_distances(x, gathered(y), self.beta)

    def _within(self, x: Tensor) -> Tensor:
        return mean_distances(x, gathered(x), self.beta, own=rank() * x.shape[1])


def gathered(x: Tensor) -> Tensor:
    """The groups (G, K, d) with all processes' samples, (G, P·K, d), with gradient where x has one."""
    collect = gather_with_gradient if x.requires_grad else gather
    return collect(x.transpose(0, 1)).transpose(0, 1)
