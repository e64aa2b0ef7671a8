"""Configurations of runs on pictures. Importing this module does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vardistill.choices import check_choices
from vardistill.diffusion.config import Distribution
from vardistill.diffusion.levels import EDM
from vardistill.errors import require
from vardistill.files import located

if TYPE_CHECKING:
    from vardistill.training.config import TrainingConfig

BUILT_IN = ("digits", "mnist")
"""Names of data sets, which are no paths."""


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net of diffusers' `UNet2DModel`.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    channels: tuple[int, ...] = (32, 64)
    """Channels at each resolution, which halves from one to the next; multiples of 8."""
    blocks: int = 1
    """Residual blocks per resolution."""

    def __post_init__(self) -> None:
        check_choices(self)
        known = bool(self.channels) and all(c >= 8 and c % 8 == 0 for c in self.channels)
        require("channels", self.channels, known, "multiples of 8, at least one")
        require("blocks", self.blocks, self.blocks >= 1, "at least 1")


@dataclass(frozen=True)
class PicturesTeachConfig:
    """A U-Net denoiser with EDM's preconditioning, fitted to pictures by denoising score matching.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    data: str = "digits"
    """digits, mnist, an .npz or .npy file, a folder of images, or hf:NAME of a Hugging Face data set."""
    size: int | None = None
    """Height and width that pictures are resized and cropped to; default: their own, if all have the same."""
    mirrored: bool = False
    """Whether the mirror images of the training pictures are training pictures, too."""
    network: UNetConfig = field(default_factory=UNetConfig)
    conditional: bool = True
    """Whether the network sees labels, where the data have them."""
    label_dropout: float = 0.1
    """Share of a conditional network's training samples without a label, for guidance."""
    distribution: Distribution = field(default_factory=EDM)
    sigma_min: float = 0.002
    """Smallest σ of the sampler."""
    sigma_max: float = 80.0
    """Largest σ of the sampler."""
    steps: int = 20_000
    """Updates."""
    max_minutes: float | None = None
    """Budget in minutes; the learning rate then follows the clock."""
    clock: Literal["wall", "cpu"] = "wall"
    """What the budget counts: wall-clock time, or processor time."""
    batch: int = 128
    """Pictures per step."""
    lr: float = 1e-3
    """Peak learning rate, decayed along a half cosine."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the forward pass."""
    seed: int = 0
    """Fixes initial weights and all draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    max_skipped: int = 100
    """Skipped steps (gradients that are not finite) after which the fit ends with an error."""
    eval_samples: int = 1000
    """Pictures that the samplers draw at the end to be measured."""

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "data", located(self.data, BUILT_IN))
        for name in ("steps", "batch", "lr", "checkpoint_every"):
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "positive and finite")
        require("size", self.size, self.size is None or 1 <= self.size <= 4096, "from 1 to 4096")
        require("max_skipped", self.max_skipped, self.max_skipped >= 0, "0 or positive")
        require("eval_samples", self.eval_samples, self.eval_samples >= 2, "at least 2")
        require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        require("label_dropout", self.label_dropout, 0 <= self.label_dropout < 1, "in [0, 1)")
        require("sigma_min", self.sigma_min, 0 < self.sigma_min < self.sigma_max, "positive and below sigma_max")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")

    @property
    def label(self) -> str:
        """What tells a fit from others, in a word."""
        return f"{re.sub('[^A-Za-z0-9.]+', '-', Path(self.data).stem)}-seed{self.seed}"


def fit_of(data: str) -> PicturesTeachConfig:
    """The fit of a teacher to a source of pictures: small for the digits, else as for MNIST."""
    if data == "digits":
        return PicturesTeachConfig(network=UNetConfig((32, 64)), steps=1500, batch=64, checkpoint_every=500)
    return PicturesTeachConfig(
        data=data, network=UNetConfig((16, 32, 64), blocks=2), steps=6000, batch=64, checkpoint_every=500
    )


@dataclass(frozen=True)
class NetworkStudentConfig:
    """The student: the teacher's network at one noise level, or at several.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    start: Literal["teacher", "fresh"] = "teacher"
    """Initial weights: the teacher's, or new ones."""
    steps_per_sample: int = 1
    """Steps of the student's path from noise to a picture, each at a level of its own."""
    ratio: float | None = None
    """Noise-to-signal ratio σ/α of the first level; default: five standard deviations of the data."""
    lora_rank: int = 0
    """Rank of adapters on frozen weights of the teacher; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower steps in less memory."""
    base_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the teacher's frozen weights, under adapters of single precision; bf16 takes half the memory."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("ratio", self.ratio, self.ratio is None or self.ratio > 0, "positive")
        require("steps_per_sample", self.steps_per_sample, 1 <= self.steps_per_sample <= 64, "from 1 to 64")
        require("lora_rank", self.lora_rank, self.lora_rank >= 0, "0 or positive")
        require("start", self.start, not self.lora_rank or self.start == "teacher", "'teacher' with a lora_rank")
        on_base = self.base_precision == "fp32" or self.lora_rank > 0
        require("base_precision", self.base_precision, on_base, "fp32 without a lora_rank, whose base it is of")


@dataclass(frozen=True)
class PicturesConfig:
    """Pictures: a teacher, data and a student.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    name: ClassVar[str] = "pictures"
    built_in: ClassVar[tuple[str, ...]] = BUILT_IN
    teacher: str = ""
    """A folder of `vardistill teach`, a diffusers pipeline's folder, or its hub id; default: one is fitted to the data
    first."""
    variant: str | None = None
    """Of a pipeline's weights, such as fp16; default: those of no variant, else the only one."""
    data: str | None = None
    """Pictures to measure against and, for VarFlow, to learn from, as `vardistill teach` takes them; default: the
    teacher's own."""
    size: int | None = None
    """Height and width that --data are resized and cropped to; default: their own if all have the same, else the
    teacher's."""
    mirrored: bool = False
    """Whether the mirror images of the training pictures of --data are training pictures, too."""
    features: str | None = None
    """What pictures are measured with: a classifier's folder, or a transformers vision model's folder or hub id;
    default: the teacher's classifier, else a new one."""
    guidance: float = 1.0
    """Classifier-free guidance of a conditional teacher; 1 for none."""
    student: NetworkStudentConfig = field(default_factory=NetworkStudentConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("teacher", "data", "features"):
            if value := getattr(self, name):
                object.__setattr__(self, name, located(value, self.built_in if name == "data" else ()))
        require("size", self.size, self.size is None or 1 <= self.size <= 4096, "from 1 to 4096")
        changed = self.size is not None or self.mirrored  # but a teacher's own data are read as for its fit
        require("data", self.data, self.data is not None or not changed, "given with size or mirrored")
        require("guidance", self.guidance, 0 <= self.guidance < math.inf, "0 or positive, and finite")

    @property
    def labels(self) -> tuple[str, str]:
        """Teacher and target in a word each."""
        return Path(self.teacher).name or "learned", "its own" if self.data is None else Path(self.data).stem

    def learns_from(self, training: TrainingConfig) -> Any:
        """The fit of a teacher to the data where none is given, else None; seed and device are the run's."""
        if self.teacher or self.data is None:
            return None
        fit = fit_of(self.data)
        return replace(fit, size=self.size, mirrored=self.mirrored, seed=training.seed, device=training.device)

    def with_teacher(self, run: Path | None) -> PicturesConfig:
        """The same with a teacher from this run, None for one that has yet to be fitted."""
        return replace(self, teacher="" if run is None else str(run))
