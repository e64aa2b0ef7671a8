"""The configuration of a fit of a text-to-image teacher of shapes. Importing this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vardistill.choices import check_choices
from vardistill.diffusion.config import Distribution
from vardistill.diffusion.levels import EDM
from vardistill.domains.pictures.config import UNetConfig
from vardistill.errors import require


@dataclass(frozen=True)
class ShapesTeachConfig:
    """A text-to-image pipeline of shapes: an autoencoder, a text encoder, and then a U-Net between them.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    pictures: int = 20_000
    """Captioned pictures that it is fitted to, drawn once."""
    kept: int = 2000
    """Further captioned pictures that are kept beside it, for students."""
    autoencoder_steps: int = 1600
    """Updates of the autoencoder."""
    text_steps: int = 600
    """Updates of the text encoder."""
    network: UNetConfig = field(default_factory=lambda: UNetConfig((32, 64)))
    text_width: int = 64
    """Size of the text encoder's states; a multiple of 4."""
    text_layers: int = 2
    """Layers of the text encoder."""
    prompt_dropout: float = 0.1
    """Share of pictures with the empty prompt, for guidance."""
    distribution: Distribution = field(default_factory=lambda: EDM(-0.4, 1.2))
    steps: int = 2000
    """Updates of the U-Net."""
    max_minutes: float | None = None
    """Budget in minutes, for the U-Net; the learning rate then follows the clock."""
    clock: Literal["wall", "cpu"] = "wall"
    """What the budget counts: wall-clock time, or processor time."""
    batch: int = 48
    """Pictures per step."""
    lr: float = 2e-3
    """Peak learning rate, decayed along a half cosine."""
    ema: float = 0.998
    """Decay of the moving average of the weights."""
    seed: int = 0
    """Fixes pictures, initial weights and all draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    max_skipped: int = 100
    """Skipped steps (gradients that are not finite) after which the fit ends with an error."""
    eval_samples: int = 300
    """Pictures that the samplers draw at the end to be judged."""

    def __post_init__(self) -> None:
        check_choices(self)
        positive = (
            "pictures", "kept", "autoencoder_steps", "text_steps", "text_layers", "steps", "batch", "lr",
            "checkpoint_every",
        )  # fmt: skip
        for name in positive:
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "positive and finite")
        width = self.text_width
        require("text_width", width, width >= 4 and width % 4 == 0, "a multiple of 4")
        require("prompt_dropout", self.prompt_dropout, 0 < self.prompt_dropout < 1, "in (0, 1): guidance needs it")
        require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        require("max_skipped", self.max_skipped, self.max_skipped >= 0, "0 or positive")
        require("eval_samples", self.eval_samples, self.eval_samples >= 6, "at least 6")
        known = len(self.network.channels) <= 3
        require("network", self.network.channels, known, "of at most 3 resolutions: latents are 8×8")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")

    @property
    def label(self) -> str:
        """What tells a fit from others, in a word."""
        return f"shapes-seed{self.seed}"
