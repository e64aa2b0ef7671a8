r"""Denoisers: D(x_t, t) = E[x | x_t].

Everything else that a diffusion model may predict is an affine function of D and x_t (see `parametrisations`); the
score is Tweedie's s(x_t, t) = (α_t D(x_t, t) − x_t)/σ_t².
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vardistill.diffusion.schedules import Schedule, check_schedule, expand
from vardistill.diffusion.weights import named_weight
from vardistill.errors import UsageError, first_line


@runtime_checkable
class Denoiser(Protocol):
    """E[x | x_t] under `schedule`."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """Map x_t (B, *data) and t (B,) to E[x | x_t], shape of x_t."""
        ...


@runtime_checkable
class DensityDenoiser(Denoiser, Protocol):
    """A denoiser that knows the density of its noisy marginals."""

    def log_prob(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        ...


def score(denoiser: Denoiser, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """∇ log p_t(x_t) = (α_t D(x_t, t) − x_t)/σ_t², shape of x_t (Tweedie's formula)."""
    alpha, sigma = denoiser.schedule(t)
    return (expand(alpha, x_t) * denoiser(x_t, t, **condition) - x_t) / expand(sigma, x_t) ** 2


def loss_weight(denoiser: object, alpha: Tensor, sigma: Tensor) -> Tensor | None:
    """The denoiser's own `loss_weight(alpha, sigma)`; None for one that has none, an exact one for example."""
    own: Callable[[Tensor, Tensor], Tensor | None] | None = getattr(denoiser, "loss_weight", None)
    return None if own is None else own(alpha, sigma)


def dsm_weight(denoiser: Denoiser, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The w(t) under which w ‖D(x_t, t) − x‖² is the squared error of what the denoiser's network predicts, (R,).

    For a denoiser that does not tell (by a method `loss_weight(alpha, sigma)`) it is EDM's (arXiv 2206.00364, table 1).

    Args:
        denoiser: D.
        alpha: (R,) α_t.
        sigma: (R,) σ_t.
        sigma_data: σ_d of EDM's weight, where the denoiser does not tell.
    """
    own = loss_weight(denoiser, alpha, sigma)
    return named_weight("edm", sigma_data)(alpha, sigma) if own is None else own


def require_denoiser(denoiser: object, name: str) -> None:
    """Raise UsageError for what is no `Denoiser`, a bare network for example."""
    if isinstance(denoiser, type) or not (callable(denoiser) and hasattr(denoiser, "schedule")):
        kind = denoiser.__name__ if isinstance(denoiser, type) else type(denoiser).__name__
        raise UsageError(  # isinstance(Denoiser) does not see what wrappers pass on
            f"the {name} must be a denoiser, E[x | x_t] with a schedule, but is {kind}: wrap it, for example by "
            "vardistill.denoisers.from_module, or from_diffusers"
        )


def remedy(error: Exception) -> str:
    """What mends a failure of a network that torch tells in words of its own; "" for others."""
    told = str(error)
    if "scalar types: Long" in told:
        return "; if its time goes into an nn.Embedding, give from_module time=lambda t: (999 * t).round().long()"
    if "mixed dtype" in told:
        return "; in half precision its norms do not take single precision on this device: give it as network.float()"
    return ""


def check_denoiser(
    denoiser: Denoiser,
    data_shape: torch.Size | tuple[int, ...],
    like: Tensor,
    condition: Mapping[str, Tensor] | None = None,
    name: str = "teacher",
    trained: bool = False,
) -> None:
    """Call the denoiser twice at two points of `data_shape`, under conditions of two rows.

    Raises:
        UsageError: unless shape and dtype come back, finite, the same both times, and of a `trained` one with gradient
            for its parameters.
    """
    check_schedule(denoiser.schedule, like.device)
    x_t = torch.zeros(2, *data_shape, dtype=like.dtype, device=like.device)
    condition = condition or {}
    t = torch.full((2,), 0.5, dtype=like.dtype, device=like.device)
    try:
        with torch.set_grad_enabled(trained):
            out, again = denoiser(x_t, t, **condition), denoiser(x_t, t, **condition)
    except Exception as error:  # a user's network may raise anything
        reason, names = first_line(error) + remedy(error), "".join(f" with {name}" for name in condition)
        raise UsageError(
            f"the {name} does not take the generator's samples, {tuple(x_t.shape)} of {x_t.dtype}{names}: {reason}"
        ) from error
    if not isinstance(out, Tensor):
        raise UsageError(f"the {name} must return a tensor of the shape of x_t, but returns {type(out).__name__}")
    if out.shape != x_t.shape or out.dtype != x_t.dtype:
        raise UsageError(
            f"{name} and generator differ: for {tuple(x_t.shape)} of {x_t.dtype} the {name} returns "
            f"{tuple(out.shape)} of {out.dtype}"
        )
    if not out.isfinite().all():
        raise UsageError(f"the {name} returns NaN or infinity at x_t = 0, t = 0.5")
    if not torch.equal(out, again):
        raise UsageError(
            f"the {name} is random beside its input (dropout that ignores evaluation mode?): neither a seed nor a "
            "checkpoint would hold its numbers"
        )
    if trained and not out.requires_grad:
        raise UsageError(
            f"no gradient reaches the {name}'s parameters: its forward cuts the graph (no_grad), or they are frozen"
        )
