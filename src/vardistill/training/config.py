"""The configuration of training. Importing this module does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import tyro

from vardistill.choices import check_choices
from vardistill.errors import UsageError, require, unknown
from vardistill.specs import parse_spec


@dataclass(frozen=True)
class Optimiser:
    """AdamW's settings for one network.

    Attributes:
        lr: peak learning rate.
        beta1: β₁.
        beta2: β₂.
        weight_decay: decoupled weight decay.
        clip: largest norm of a gradient.
    """

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class NetworkConfig:
    """Settings of one network where they differ from the run's.

    Raises:
        UsageError: for a number out of its range.
    """

    name: str
    """student, critic, posterior, ...; of a sum with several of a name PART.NAME."""
    lr: float | None = None
    """Peak learning rate."""
    beta1: float | None = None
    """Adam's β₁."""
    beta2: float | None = None
    """Adam's β₂."""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay."""
    clip: float | None = None
    """Largest norm of a gradient."""

    def __post_init__(self) -> None:
        for name in ("lr", "beta1", "beta2", "weight_decay", "clip"):
            value = getattr(self, name)
            known = value is None or (isinstance(value, int | float) and value >= 0 and not math.isnan(value))
            require(f"{self.name}'s {name}", value, known, "0 or positive")
        for name in ("beta1", "beta2"):
            require(f"{self.name}'s {name}", getattr(self, name), (getattr(self, name) or 0) < 1, "in [0, 1)")
        for name in ("lr", "clip"):
            require(f"{self.name}'s {name}", getattr(self, name), getattr(self, name) != 0, "positive")
        for name in ("lr", "weight_decay"):
            require(f"{self.name}'s {name}", getattr(self, name), getattr(self, name) != math.inf, "finite")

    @classmethod
    def parse(cls, words: list[str]) -> NetworkConfig:
        """From a line like 'critic(lr=1e-4, beta1=0)'; raises UsageError for what is none."""
        spec = parse_spec(words[0])
        known = [f.name for f in fields(cls)][1:]
        for key in spec.options:
            if key not in known:
                raise unknown(f"setting of {spec.name}", key, known)
        try:
            return cls(spec.name, **{key: float(v) for key, v in spec.options.items()})
        except (TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"the settings of {spec.name} must be numbers, but are {spec.options}") from error

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        return f"{self.name}({', '.join(f'{name}={v:g}' for name, v in given.items() if v is not None)})"


NetworkSpec = Annotated[
    NetworkConfig,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME(lr=...)",
        instance_from_str=NetworkConfig.parse,
        is_instance=lambda value: isinstance(value, NetworkConfig),
        str_from_instance=lambda value: [str(value)],
    ),
]


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
    """Peak learning rate of the student."""
    auxiliary_lr: float = 1e-3
    """Peak learning rate of the objective's own networks (posterior, critic)."""
    networks: tuple[NetworkSpec, ...] = ()
    """Settings of single networks where they differ from the run's: 'critic(lr=1e-4, beta1=0)', with lr, beta1, beta2,
    weight_decay and clip."""
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
    """Largest norm of a gradient, for each network apart."""
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
    precision: Literal["auto", "bf16", "no"] = "no"
    """Mixed precision of the student's forward pass, in bfloat16; where a run is built from its configuration, of
    posteriors of points, of critics and of the teachers of pictures, too. In Python, wrap a network teacher in
    `denoisers.Mixed`. auto: where the processor or accelerator has instructions for it."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Accelerate's tracker, or none."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "batch", "lr", "auxiliary_lr", "clip", "log_every", "checkpoint_every", "eval_samples"):
            require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        for name in ("max_skipped", "weight_decay", "eval_every"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or positive")
        for name in ("lr", "auxiliary_lr", "weight_decay"):
            require(name, getattr(self, name), getattr(self, name) < float("inf"), "finite")
        for name in ("beta1", "beta2", "ema", "warmup", "head_start"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        require("lr_final", self.lr_final, 0 <= self.lr_final <= 1, "in [0, 1]")
        require("accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        require("milestones", self.milestones, self.milestones >= 1, "at least 1")
        require("keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "at least 1")
        require("eval_samples", self.eval_samples, self.eval_samples >= 2, "at least 2")
        if self.max_minutes is not None:
            require("max_minutes", self.max_minutes, self.max_minutes > 0, "positive")
        object.__setattr__(self, "networks", tuple(self.networks) if isinstance(self.networks, list) else self.networks)
        known = isinstance(self.networks, tuple) and all(isinstance(own, NetworkConfig) for own in self.networks)
        require(
            "networks", self.networks, known, "a tuple of NetworkConfig, such as (NetworkConfig('critic', lr=1e-4),)"
        )
        names = [own.name for own in self.networks]
        require("networks", names, len(set(names)) == len(names), "of different names")

    def settings_of(self, network: str) -> Optimiser:
        """The optimiser's settings of a network: of NAME those of NAME, or of PART.NAME those of NAME, too."""
        lr = self.lr if network == "student" else self.auxiliary_lr
        found = Optimiser(lr, self.beta1, self.beta2, self.weight_decay, self.clip)
        for own in sorted(self.networks, key=lambda own: own.name == network):  # the exact name last
            if own.name in (network, network.rpartition(".")[2]):
                values = {f.name: getattr(own, f.name) for f in fields(Optimiser)}
                found = replace(found, **{name: v for name, v in values.items() if v is not None})
        return found
