r"""Denoisers under prompts: a prompt is a label, and what the network is told of it a row of a table.

    D(x_t, t, y) = D(x_t, t, c_y),   c_0, ..., c_{K−1} of the prompts,   c_K of the empty one

So prompts are drawn, grouped, compared and guided as labels are, and their encoders run once, before training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.errors import UsageError

ADDED = ("text_embeds", "time_ids")
"""What SDXL's network takes in a dictionary of its own."""


class Conditions:
    """The rows by the names under which the network takes them; copies of a denoiser share them.

    Args:
        rows: (K + 1, ...) each, the last of the empty prompt.

    Raises:
        UsageError: for rows of different number, or without a prompt.
    """

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        numbers = {len(v) for v in rows.values()}
        if len(numbers) != 1 or min(numbers) < 2:
            raise UsageError(f"conditions must have as many rows each, at least 2, but have {sorted(numbers)}")
        self.rows = dict(rows)

    def __len__(self) -> int:
        """K, prompts without the empty one."""
        return len(next(iter(self.rows.values()))) - 1

    def __deepcopy__(self, memo: Any) -> Conditions:
        return self

    def of(self, labels: Tensor, like: Tensor) -> dict[str, Any]:
        """What the network is given under these labels (B,), in the dtype and on the device of `like`."""
        found: dict[str, Any] = {}
        for name, rows in self.rows.items():
            rows = rows[labels.to(rows.device)].to(like)
            (found.setdefault("added_cond_kwargs", {}) if name in ADDED else found)[name] = rows
        return found


class PromptedDenoiser(DiffusersDenoiser):
    """A text-to-image network, conditional on labels 0..K−1 that stand for prompts, and on K for the empty one.

    Args:
        network: see `DiffusersDenoiser`.
        scheduler: likewise.
        conditions: of the prompts.
    """

    def __init__(self, network: nn.Module, scheduler: Any, conditions: Conditions) -> None:
        super().__init__(network, scheduler, latents=True)
        self.tell(conditions)

    def tell(self, conditions: Conditions) -> None:
        """Labels stand for these prompts from now on."""
        self.conditions = conditions
        self.classes, self.classes_given, self.null_label = len(conditions), True, len(conditions)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **condition: Any) -> Tensor:
        """E[x | x_t, prompt] for x_t (B, C, H, W), t (B,) and labels (B,) int64 in [0, K]; shape of x_t.

        Raises:
            UsageError: without labels.
        """
        if labels is None:
            raise UsageError(f"the network is conditional on {self.classes} prompts: give labels, (B,) of int64")
        x: Tensor = self._denoise(x_t, t, **self.conditions.of(labels, x_t), **condition)
        return x


@torch.no_grad()
def prompted(denoiser: DiffusersDenoiser, conditions: Conditions) -> PromptedDenoiser:
    """The same network under prompts."""
    return PromptedDenoiser(denoiser.network, denoiser.scheduler, conditions)
