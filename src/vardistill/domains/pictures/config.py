"""Configurations of runs on pictures. Importing this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, Union

import tyro

from vardistill.diffusion.levels import EDM
from vardistill.errors import require
from vardistill.runs.config import Distribution, NoiseConfig, TrainingConfig, check_choices


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
class ImagesTeachConfig:
    """A U-Net denoiser with EDM's preconditioning, fitted to pictures by denoising score matching.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    data: str = "digits"
    """digits, mnist, an .npz file, a folder of images, or hf:NAME of a Hugging Face data set."""
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
        for name in ("steps", "batch", "lr", "checkpoint_every"):
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "positive and finite")
        require("max_skipped", self.max_skipped, self.max_skipped >= 0, "0 or positive")
        require("eval_samples", self.eval_samples, self.eval_samples >= 2, "at least 2")
        require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        require("label_dropout", self.label_dropout, 0 <= self.label_dropout < 1, "in [0, 1)")
        require("sigma_min", self.sigma_min, 0 < self.sigma_min < self.sigma_max, "positive and below sigma_max")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")


@dataclass(frozen=True)
class OneStepConfig:
    """The student x = D(c z, t): the teacher's network at one noise level.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    start: Literal["teacher", "fresh"] = "teacher"
    """Initial weights: the teacher's, or new ones."""
    ratio: float | None = None
    """Noise-to-signal ratio σ/α of the level; default: five standard deviations of the data."""
    lora_rank: int = 0
    """Rank of adapters on frozen weights of the teacher; 0 trains all weights."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("ratio", self.ratio, self.ratio is None or self.ratio > 0, "positive")
        require("lora_rank", self.lora_rank, self.lora_rank >= 0, "0 or positive")
        require("start", self.start, not self.lora_rank or self.start == "teacher", "'teacher' with a lora_rank")


@dataclass(frozen=True)
class ImageVarDiUConfig:
    """VarDiU with a posterior over noise pictures.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    posterior: Literal["gaussian", "coupling"] = "gaussian"
    """Family of q(z | x_t): a convolutional Gaussian, or coupling layers on top of one."""
    rank: int = 0
    """Directions in which the Gaussian carries correlations, beside its diagonal."""
    width: int = 32
    """Channels of the posterior's network."""
    candidates: int = 0
    """K of the multi-sample bound: latents drawn from q."""
    posterior_steps: int = 1
    """Posterior updates per generator update."""
    control_variate: Literal["zero", "one", "gaussian"] = "gaussian"
    """c(t) of the teacher's term: 0, 1, or r²/(r² + σ_d²) at the noise-to-signal ratio r = σ/α."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("rank", "candidates"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        for name in ("width", "posterior_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class ImageVarFlowConfig:
    """VarFlow: the energy distance to real pictures.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    beta: float = 1.0
    """Power of the distance, in (0, 2)."""
    cross: Literal["all", "paired"] = "all"
    """Pairs of student and real samples: all K², or K."""
    space: Literal["pixels", "classifier", "teacher"] = "pixels"
    """Where distances are taken: between pictures, or features of the classifier or of the teacher's encoder."""
    label_distance: float = 10.0
    """What different labels add to the squared distance, for a conditional student."""
    real: Literal["data", "teacher"] = "data"
    """Real samples: the data's, or the teacher's own."""
    real_samples: int = 2000
    """Size of the set that the teacher's sampler makes at the start."""
    real_steps: int = 18
    """Steps of that sampler."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("beta", self.beta, 0 < self.beta < 2, "in (0, 2)")
        require("label_distance", self.label_distance, self.label_distance > 0, "positive")
        for name in ("real_samples", "real_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class ImageDiffInstructConfig:
    """Diff-Instruct, its critic started from the teacher.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    critic_steps: int = 1
    """Critic updates per generator update."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("critic_steps", self.critic_steps, self.critic_steps >= 1, "at least 1")


@dataclass(frozen=True)
class ImageSumConfig:
    """VarDiU + λ·VarFlow, or Diff-Instruct + λ·VarFlow.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    first: Annotated[Union[ImageVarDiUConfig, ImageDiffInstructConfig], tyro.conf.AvoidSubcommands] = field(  # noqa: UP007
        default_factory=ImageVarDiUConfig
    )
    varflow: ImageVarFlowConfig = field(default_factory=ImageVarFlowConfig)
    varflow_weight: float = 10.0
    """λ/√d at the start: a distance's gradient is of one size in any dimension d, a score's grows like √d."""
    varflow_weight_end: float = 10.0
    """λ/√d at the end; it moves geometrically in between."""
    varflow_shared: int = 2
    """Levels that VarFlow's rows share; the other part's rows have their own."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("varflow_weight", "varflow_weight_end", "varflow_shared"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")


ImageObjectiveConfig = Annotated[
    Union[ImageVarDiUConfig, ImageVarFlowConfig, ImageDiffInstructConfig, ImageSumConfig],  # noqa: UP007
    tyro.conf.AvoidSubcommands,
]


@dataclass(frozen=True)
class ImagesConfig:
    """One run on pictures, completely.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    teacher: str = ""
    """A folder of `vardistill teach`, a diffusers pipeline's folder, or its hub id."""
    data: str | None = None
    """Pictures to measure against and, for VarFlow, to learn from, as `vardistill teach` takes them; default: the
    teacher's own."""
    features: str | None = None
    """What pictures are measured with: a classifier's folder, or a transformers vision model's folder or hub id;
    default: the teacher's classifier, else a new one."""
    guidance: float = 1.0
    """Classifier-free guidance of a conditional teacher; 1 for none."""
    generator: OneStepConfig = field(default_factory=OneStepConfig)
    objective: ImageObjectiveConfig = field(default_factory=ImageVarDiUConfig)
    levels: NoiseConfig = field(default_factory=NoiseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_choices(self)
        require("guidance", self.guidance, 0 <= self.guidance < math.inf, "0 or positive, and finite")
