"""Updates: AdamW, the course of its learning rate, steps that are skipped, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vardistill.errors import UsageError
from vardistill.training.config import Optimiser, TrainingConfig

LEAST = 0.01
"""Share of the peak learning rate that the first update of a warm-up has, at least: at 0 it would train nothing."""


def learning_rate(training: TrainingConfig, progress: float) -> float:
    """The share of the peak learning rate of the step that begins at this progress.

    Linear warm-up, which counts the step itself, then constant or a half cosine.
    """
    end = progress + 1 / training.steps
    if end < training.warmup:
        return max(end / training.warmup, LEAST)
    if training.lr_schedule == "constant":
        return 1.0
    along = max(0.0, progress - training.warmup) / (1 - training.warmup)
    return training.lr_final + (1 - training.lr_final) * cosine(along)


def cosine(progress: float) -> float:
    """Half a cosine, from 1 at progress 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def adam(parameters: Iterable[nn.Parameter], settings: Optimiser | TrainingConfig) -> torch.optim.AdamW:
    """AdamW for the parameters that are not frozen, with all its state there from the start, for checkpoints.

    Raises:
        UsageError: where all are frozen.
    """
    betas = (settings.beta1, settings.beta2)
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise UsageError("nothing to train: every parameter is frozen, requires_grad=False")
    optimizer = torch.optim.AdamW(trained, betas=betas, weight_decay=settings.weight_decay, fused=True)
    for p in _parameters(optimizer):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def adam_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's own tensors, not copies, by PARAMETER/NAME."""
    parameters = enumerate(_parameters(optimizer))
    return {f"{i}/{key}": v for i, p in parameters for key, v in optimizer.state[p].items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Scale the gradients to a norm of at most `largest` and return the norm before."""
    return nn.utils.clip_grad_norm_(_parameters(optimizer), largest)


def step_unless(not_finite: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """A step of each fused optimiser, none where `not_finite` is 1 and not 0; decided on the device, without a sync."""
    for optimizer in optimizers:
        optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # 1: the fused kernels leave all alone
        optimizer.step()


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float, n: int) -> None:
    """θ̄ ← d θ̄ + (1 − d) θ, d = min(decay, (1 + n)/(10 + n)), after n earlier updates; buffers are copied."""
    pairs = zip(average.parameters(), current.parameters(), strict=True)
    moving, trained = zip(*((a, p) for a, p in pairs if a is not p), strict=True)  # what is not trained is shared
    torch._foreach_lerp_(moving, trained, 1 - min(decay, (1 + n) / (10 + n)))
    for a, b in zip(average.buffers(), current.buffers(), strict=True):
        a.copy_(b)
