r"""A user's own network as a denoiser, and any denoiser under another schedule."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vardistill.diffusion.denoiser import Denoiser, DensityDenoiser, loss_weight, require_denoiser
from vardistill.diffusion.parametrisations import to_x, unit_weight
from vardistill.diffusion.schedules import Schedule, expand, require_schedule
from vardistill.errors import UsageError, require
from vardistill.networks import predict, require_network


class Rescheduled(nn.Module):
    """A denoiser under another schedule: D'(x_t, t) = D(x_t α'/α, t') at the time t' of equal ratio σ/α.

    Args:
        denoiser: the denoiser, under its own schedule.
        schedule: the schedule that x_t and t follow from now on.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        require_denoiser(denoiser, "denoiser")
        require_schedule(schedule)
        self.denoiser = denoiser
        self.schedule = schedule

    def _native(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule(t)
        native_t = self.denoiser.schedule.time(sigma / alpha)
        native_alpha, _ = self.denoiser.schedule(native_t)
        scale = native_alpha / alpha
        return x_t * expand(scale, x_t), native_t, scale

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t], shape of x_t."""
        native_x_t, native_t, _ = self._native(x_t, t)
        return self.denoiser(native_x_t, native_t, **condition)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """That of the denoiser within, at its own scales of the same ratio."""
        native = self.denoiser.schedule
        return loss_weight(self.denoiser, *native(native.time(sigma / alpha)))


class RescheduledDensity(Rescheduled):
    """`Rescheduled` for a denoiser that knows its density: log p'(x_t) = log p(c x_t) + d log c with c = α/α'."""

    denoiser: DensityDenoiser

    def log_prob(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """log p_t(x_t) in nats, (B,)."""
        native_x_t, native_t, scale = self._native(x_t, t)
        return self.denoiser.log_prob(native_x_t, native_t, **condition) + x_t[0].numel() * scale.log()


def reschedule(denoiser: Denoiser, schedule: Schedule) -> Denoiser:
    """The same denoiser under another schedule; its density comes along where it has one."""
    if isinstance(denoiser, DensityDenoiser):
        return RescheduledDensity(denoiser, schedule)
    return Rescheduled(denoiser, schedule)


class FromModule(nn.Module):
    """A user's own network as a denoiser; see `from_module`."""

    def __init__(
        self,
        module: Callable[..., Tensor],
        schedule: Schedule,
        predicts: str,
        time: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        require_network(module)
        require_schedule(schedule)
        if time is not None:
            require("time", time, callable(time), "a function of t, such as lambda t: 999 * t")
        self.module = module
        self.schedule = schedule
        self.predicts, self.to_x, self.loss_weight = predicts, to_x(predicts), unit_weight(predicts)
        self.time = time

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t], shape and type of x_t."""
        alpha, sigma = self.schedule(t)
        prediction = predict(self.module, x_t, t if self.time is None else self._time(t), **condition)
        return self.to_x(prediction, x_t, expand(alpha, x_t), expand(sigma, x_t))

    def _time(self, t: Tensor) -> Tensor:
        assert self.time is not None
        told: object = self.time(t)
        if not isinstance(told, Tensor) or told.shape != t.shape:
            shape = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
            raise UsageError(f"time must map t {tuple(t.shape)} to a tensor of its shape, but returns {shape}")
        return told


def from_module(
    module: Callable[..., Tensor],
    schedule: Schedule,
    predicts: str = "x",
    time: Callable[[Tensor], Tensor] | None = None,
) -> FromModule:
    """Make a teacher of a user's own network.

    Args:
        module: called as `module(x_t, time(t), **condition)`; returns a tensor of the shape of x_t. Where its weights
            are in half precision it runs under autocast, and x_t stays in single precision.
        schedule: the forward process under which the module was trained.
        predicts: `x`, `epsilon`, `v` (α ε − σ x), `velocity` (ε − x, rectified flow) or `score`.
        time: what the module takes as its time, from t ∈ [0, 1]; default t itself. A DDPM of 1000 steps takes
            `lambda t: 999 * t`; one that takes σ takes `lambda t: schedule(t)[1]`.

    Raises:
        UsageError: for an unknown `predicts`, or a module, schedule or time that is none; when it is called, for a
            module that returns other than a tensor of the shape of x_t.
    """
    return FromModule(module, schedule, predicts, time)
