r"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) of a teacher.

    D(x_t, t, c) = D_∅ + w (D_c − D_∅),   D_c = E[x | x_t, c],   D_∅ = E[x | x_t]

w = 1 is no guidance and w = 0 ignores the condition; the paper's own w is one less (eq. 6). The two weights add up to
1, so guiding D, ε, v or the score is the same. For w > 1 the result is no longer a posterior mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vardistill.denoisers.mixed import Mixed
from vardistill.diffusion.denoiser import Denoiser, loss_weight
from vardistill.errors import UsageError


class Guided(nn.Module):
    """A denoiser with classifier-free guidance: one evaluation of 2B rows, or of B where w = 1.

    Args:
        denoiser: conditional, and trained with the condition left out at times.
        scale: w.
        null: what stands for "no condition", by the condition's name: a number, or a tensor that broadcasts to the
            condition, such as {"labels": 10}. Conditions that are not named are given to both evaluations.

    Raises:
        UsageError: for a scale that is not finite, or nothing in `null`.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Mapping[str, Tensor | int]) -> None:
        super().__init__()
        if not math.isfinite(scale):
            raise UsageError(f"the guidance scale must be a finite number (1: no guidance), but is {scale:g}")
        if not null:
            raise UsageError("guidance needs what stands for no condition, for example null={'labels': 10}")
        self.denoiser = denoiser
        self.scale = scale
        self.null = dict(null)
        self.schedule = denoiser.schedule
        self.data_shape: tuple[int, ...] | None = getattr(denoiser, "data_shape", None)
        self.classes: int = getattr(denoiser, "classes", 0)

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """D_∅ + w (D_c − D_∅), shape of x_t.

        Raises:
            UsageError: where a condition of `null` is not given.
        """
        missing = sorted(self.null.keys() - condition.keys())
        if missing:
            raise UsageError(
                f"guidance by {', '.join(missing)} needs {missing[0]} as a keyword: D(x_t, t, {missing[0]}=...)"
            )
        if self.scale == 1:
            return self.denoiser(x_t, t, **condition)
        both = {name: torch.cat([value, self._without(name, value)]) for name, value in condition.items()}
        conditional, unconditional = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """That of the denoiser within."""
        return loss_weight(self.denoiser, alpha, sigma)

    def _without(self, name: str, value: Tensor) -> Tensor:
        """Rows like those of `value` that stand for no condition."""
        return torch.as_tensor(self.null.get(name, value), dtype=value.dtype, device=value.device).expand_as(value)


def guided_as(denoiser: Denoiser, scale: float) -> Guided:
    """The denoiser guided by its own label for no class.

    Raises:
        UsageError: for one that has none.
    """
    null = getattr(denoiser.denoiser if isinstance(denoiser, Mixed) else denoiser, "null_label", None)
    if null is None:
        raise UsageError("guidance needs a conditional denoiser with a label for no class, after those of the data")
    return Guided(denoiser, scale, {"labels": null})


def unguided(denoiser: Denoiser) -> Denoiser:
    """The denoiser that is guided, in its precision; the denoiser itself without guidance."""
    if isinstance(denoiser, Mixed):
        return Mixed(unguided(denoiser.denoiser))
    return denoiser.denoiser if isinstance(denoiser, Guided) else denoiser
