"""The configuration of a run: typed and complete; `config_files` keeps it beside its results.

Importing this module does not import torch, so that the command line can answer `--help` at once.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from vardistill.errors import require, unknown
from vardistill.diffusion.levels import EDM, LogNormal, PowerLaw, UniformTime

ProblemName = Literal["mog40", "mog9", "mixture2", "mixture8", "mixture32", "mixture128", "moons", "digits"]
Distribution = Annotated[Union[LogNormal, PowerLaw, EDM, UniformTime], tyro.conf.AvoidSubcommands]  # noqa: UP007

ScheduleName = Literal["ve", "vp", "cosine", "rectified"]
"""Forward processes."""

WeightName = Literal["one", "sigma2", "sigma2_max", "inverse_sigma", "snr", "edm", "sigma2_linear"]
"""Weights w(t) of noise levels; see `noise_levels.weights`."""

ActivationName = Literal["silu", "gelu", "relu", "leaky_relu", "tanh"]
"""Activation functions of perceptrons."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The one-step generator, a perceptron.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    latent: int = 2
    """Dimension of z."""
    depth: int = 4
    """Hidden layers."""
    width: int = 256
    """Units of a hidden layer."""
    activation: ActivationName = "silu"
    """Activation function."""
    fourier: int = 0
    """Random Fourier features of z beside z itself; they make sharper maps."""
    linear: bool = False
    """Start as a linear map with the mean and covariance of a sample of the problem (`teacher_samples`), a learned
    posterior as its exact one; for at most as many latents as dimensions."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("latent", "depth", "width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("fourier", self.fourier, self.fourier >= 0, "0 or positive")


@dataclass(frozen=True)
class TeacherConfig:
    """The denoiser to distil.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    teacher: Literal["true", "empirical", "learned"] = "true"
    """The problem's exact denoiser; the exact one of a sample of it; or a network fitted to that sample."""
    teacher_run: Path | None = None
    """Folder of a teacher made by `vardistill teach`, for a learned teacher; default: fit one first."""
    teacher_samples: int = 10_000
    """Size of the sample that an empirical or a learned teacher sees, and a linear start."""
    bandwidth: float = 0.0
    """Standard deviation of the Gaussian that an empirical teacher puts on every point."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("teacher_samples", self.teacher_samples, self.teacher_samples >= 1, "at least 1")
        require("bandwidth", self.bandwidth, self.bandwidth >= 0, "0 or positive")
        unused = self.teacher_run is not None and self.teacher != "learned"
        require("teacher", self.teacher, not unused, "'learned' with a teacher_run")
        unused = self.bandwidth != 0 and self.teacher != "empirical"
        require("teacher", self.teacher, not unused, "'empirical' with a bandwidth")


@dataclass(frozen=True)
class VarDiUConfig:
    """VarDiU.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    posterior: Literal["prior", "diagonal", "full", "mixture", "nsf"] = "prior"
    """Family of q(z | x_t)."""
    candidates: int | Literal["batch"] = 0
    """K of the multi-sample bound: latents drawn from q, or the batch's other latents (posterior prior)."""
    pool: int = 0
    """Further latents from the prior beside the batch's, as candidates without gradient."""
    control_variate: Literal["zero", "one", "gaussian"] = "one"
    """c(t) of the teacher's term: 0, 1, or r²/(r² + σ_d²) at the noise-to-signal ratio r = σ/α."""
    posterior_steps: int = 1
    """Posterior updates per generator update."""
    posterior_depth: int = 4
    """Hidden layers of the posterior's network."""
    posterior_width: int = 256
    """Units of its hidden layers."""
    posterior_activation: ActivationName = "silu"
    """Its activation function."""

    def __post_init__(self) -> None:
        check_choices(self)
        known = self.candidates == "batch" or self.candidates >= 0
        require("candidates", self.candidates, known, "'batch' or at least 0")
        require("pool", self.pool, self.pool >= 0, "0 or positive")
        for name in ("posterior_steps", "posterior_depth", "posterior_width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class VarFlowConfig:
    """VarFlow: the energy distance to real samples. Its levels must be shared by rows (`shared`).

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    beta: float = 1.0
    """Power of the distance, in (0, 2)."""
    cross: Literal["all", "paired"] = "all"
    """Pairs of student and real samples: all K², or K."""
    real: Literal["teacher", "data"] = "teacher"
    """Real samples: the teacher's own, or the problem's."""
    real_samples: int = 20_000
    """Size of the set that a learned teacher's sampler makes at the start."""
    real_steps: int = 20
    """Steps of that sampler."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("beta", self.beta, 0 < self.beta < 2, "in (0, 2)")
        for name in ("real_samples", "real_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class DiffInstructConfig:
    """Diff-Instruct: score distillation with a learned critic.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    critic_steps: int = 1
    """Critic updates per generator update."""
    critic_start: Literal["fresh", "teacher"] = "fresh"
    """Initial critic: new weights, or those of a learned teacher."""
    critic_depth: int = 4
    """Hidden layers of a fresh critic."""
    critic_width: int = 256
    """Units of its hidden layers."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("critic_steps", "critic_depth", "critic_width"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class VarDiUVarFlowConfig:
    """VarDiU + λ·VarFlow, each with noise of its own from the same distribution of levels.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    vardiu: VarDiUConfig = field(default_factory=VarDiUConfig)
    varflow: VarFlowConfig = field(default_factory=VarFlowConfig)
    varflow_weight: float = 1.0
    """λ at the start."""
    varflow_weight_end: float = 1.0
    """λ at the end; it moves geometrically in between."""
    varflow_shared: int = 8
    """Levels that VarFlow's rows share; VarDiU's rows have their own."""
    varflow_level_weight: WeightName = "one"
    """w(t) of VarFlow."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("varflow_weight", "varflow_weight_end", "varflow_shared"):
            require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "positive and finite")


ObjectiveConfig = Annotated[
    Union[VarDiUConfig, VarFlowConfig, DiffInstructConfig, VarDiUVarFlowConfig],  # noqa: UP007
    tyro.conf.AvoidSubcommands,
]


@dataclass(frozen=True)
class NoiseConfig:
    """Noise levels and their weights, under the teacher's forward process.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    distribution: Distribution = field(default_factory=LogNormal)
    weight: WeightName = "sigma2_linear"
    """w(t)."""
    draws: int = 1
    """Noise draws per latent."""
    antithetic: bool = False
    """Draw ε in pairs of opposite sign."""
    stratified: bool = False
    """Draw a step's levels from equal strata."""
    shared: int = 0
    """Levels that the latents of a draw share, for VarFlow; 0 gives every row its own."""

    def __post_init__(self) -> None:
        check_choices(self)
        require("draws", self.draws, self.draws >= 1, "at least 1")
        require("shared", self.shared, self.shared >= 0, "0 or positive")


@dataclass(frozen=True)
class LevelsConfig(NoiseConfig):
    """Noise levels and their weights, and the forward process of teachers that know any.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    schedule: ScheduleName = "ve"
    """Forward process."""


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation and what a run keeps.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    steps: int = 20_000
    """Updates of the generator, and steps of a head start."""
    max_minutes: float | None = None
    """Budget in minutes; the schedules then follow the clock, and the run ends at the budget or after `steps`."""
    clock: Literal["wall", "cpu"] = "wall"
    """What the budget counts: wall-clock time, or the processor time of training alone."""
    batch: int = 1024
    """Latents per step, over all processes."""
    accumulate: int = 1
    """Parts of a process's share of the batch that go through the networks one by one, to save memory."""
    lr: float = 1e-3
    """Peak learning rate of the generator."""
    auxiliary_lr: float = 1e-3
    """Peak learning rate of the objective's own networks (posterior, critic)."""
    beta1: float = 0.9
    """Adam's β₁."""
    beta2: float = 0.99
    """Adam's β₂."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Decay to `lr_final` along a half cosine, or none."""
    lr_final: float = 0.0
    """Share of the peak learning rate at the end of a cosine."""
    warmup: float = 0.01
    """Share of the run in which the learning rate rises linearly."""
    head_start: float = 0.0
    """Share of the run in which the objective's own networks learn alone. Noise levels and learning rates go through
    their whole schedules in it, and again in what follows; a step is the objective's critic steps."""
    clip: float = float("inf")
    """Largest norm of a gradient, for the generator and the objective's networks apart."""
    ema: float = 0.999
    """Decay of the moving average of the generator's weights; 0 for none."""
    seed: int = 0
    """Fixes initial weights and all draws."""
    log_every: int = 100
    """Steps between lines of metrics."""
    eval_every: int = 1000
    """Steps between evaluations; 0 for those at milestones alone."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    milestones: int = 1
    """Points spread evenly over the run, its end the last, at which it logs, evaluates and keeps a checkpoint, too."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep."""
    eval_samples: int = 10_000
    """Samples per evaluation."""
    max_skipped: int = 100
    """Skipped steps (NaN or infinite gradients) after which the run stops."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the generator's forward pass; where a run is built from its configuration, of perceptrons as
    posteriors, of critics and of the teachers of pictures, too. In Python, wrap a network teacher in
    `denoisers.Mixed`."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Accelerate's tracker, or none."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch", "lr", "auxiliary_lr", "clip", "log_every", "checkpoint_every", "eval_samples"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("lr", "auxiliary_lr"):
            require(name, getattr(self, name), getattr(self, name) < float("inf"), "finite")
        for name in ("max_skipped", "weight_decay", "eval_every"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        for name in ("beta1", "beta2", "ema", "warmup", "head_start"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        require("lr_final", self.lr_final, 0 <= self.lr_final <= 1, "in [0, 1]")
        require("accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        require("milestones", self.milestones, self.milestones >= 1, "at least 1")
        require("keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "at least 1")
        require("eval_samples", self.eval_samples, self.eval_samples >= 2, "at least 2")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")


@dataclass(frozen=True)
class Config:
    """One run, completely.

    Raises:
        UsageError: for an unknown problem.
    """

    problem: ProblemName = "mog40"
    """The target."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    objective: ObjectiveConfig = field(default_factory=lambda: VarDiUConfig(candidates="batch"))
    levels: LevelsConfig = field(default_factory=LevelsConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class TeachConfig:
    """A network denoiser, fitted to a sample of a problem by denoising score matching.

    Raises:
        UsageError: for a number out of its range or an unknown choice.
    """

    problem: ProblemName = "mog40"
    """The target."""
    samples: int = 10_000
    """Size of the data set."""
    steps: int = 10_000
    """Updates."""
    max_minutes: float | None = None
    """Wall-clock budget."""
    batch: int = 1024
    """Points per step."""
    lr: float = 1e-3
    """Peak learning rate, decayed along a half cosine."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    depth: int = 4
    """Hidden layers."""
    width: int = 256
    """Units of a hidden layer."""
    schedule: ScheduleName = "ve"
    """Forward process."""
    distribution: Distribution = field(default_factory=lambda: LogNormal(base_start=1.5, base_end=1.5, spread=1.4))
    seed: int = 0
    """Fixes the data, the initial weights and all draws."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("samples", "steps", "batch", "lr", "depth", "width"):
            require(name, getattr(self, name), 0 < getattr(self, name) < float("inf"), "positive")
        require("ema", self.ema, 0 <= self.ema < 1, "in [0, 1)")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def check_choices(config: object) -> None:
    """Raise a UsageError for a field that holds none of its choices, or no whole number that torch takes for an int."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), options_of(hint)
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        if value in choices or (value is None and types.NoneType in kinds):
            continue
        if int in kinds:
            require(name, value, _is_whole(value), " or ".join([*map(repr, choices), "a whole number of 64 bits"]))
        elif choices:
            raise unknown(name, str(value), choices)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
