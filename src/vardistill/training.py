r"""The loop that drives an objective.

Each step draws latents z, noise (t, ε) and further latents η for the whole batch from one generator of random numbers, the same on every
process, and each process keeps its share: the result does not depend on the number of processes. Gradients are averaged by
the data-parallel wrapper that Accelerate chooses. A step whose gradient is not finite leaves all parameters alone (the fused
optimisers skip it on the device, without a host sync) and is counted.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from vardistill import checkpoints
from vardistill.config import TrainingConfig
from vardistill.denoisers import Denoiser, check_denoiser
from vardistill.devices import find_device
from vardistill.errors import UsageError
from vardistill.generators import Generator
from vardistill.levels import LogNormal
from vardistill.noise_levels import Draw, Noise, NoiseLevels, named_weight
from vardistill.objectives import Objective, VarDiU
from vardistill.posteriors import Prior
from vardistill.runs import RunFolder, create, environment

Evaluate = Callable[[Generator], Mapping[str, float]]
"""Metrics of a generator in evaluation mode."""

LIVE_FIGURES = ("loss", "bound", "log_density", "log_mmd", "modes_found")


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C) and has kept a checkpoint."""


class Diverged(Exception):
    """Too many steps had gradients that were not finite; the last good state is kept."""


@dataclass
class Run:
    """A finished run.

    Attributes:
        generator: the moving average of the student (the student itself without one), in evaluation mode.
        objective: with its trained auxiliary networks.
        history: the lines of metrics.
        path: the run folder, or None.
    """

    generator: Generator
    objective: Objective
    history: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None


class Step(nn.Module):
    """The differentiable part of a step as one module, so that a wrapper sees each parameter's use."""

    def __init__(self, generator: Generator, objective: Objective, precision: str) -> None:
        super().__init__()
        self.generator = generator
        self.objective = objective
        self.mixed = precision == "bf16"

    def forward(self, z: Tensor, noise: Noise, eta: Tensor | None, batch: Mapping[str, Tensor], critic: bool) -> Tensor:
        """The mean loss over this process's rows."""
        with torch.set_grad_enabled(not critic):
            x = self._generate(z)
        draw = Draw(noise.rows(z), noise.rows(x), noise, self._generate, eta, batch)
        loss = self.objective.critic_loss(draw) if critic else self.objective.generator_loss(draw)
        if loss.shape != noise.t.shape:
            raise UsageError(
                f"an objective returns one value per row, {tuple(noise.t.shape)}, but got {tuple(loss.shape)}"
            )
        return loss.mean()

    def _generate(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.mixed):
            x: Tensor = self.generator(z)
        return x.to(z.dtype)


def default_levels(denoiser: Denoiser, data_std: float) -> NoiseLevels:
    """Half the levels anneal from 2 to 0.05 standard deviations of the data, half stay log-uniform between the two."""
    largest, smallest = 2 * data_std, 0.05 * data_std
    annealed = LogNormal(
        base_start=largest,
        base_end=smallest,
        sigma_min=0.02 * smallest,
        sigma_max=5 * largest,
        broad=0.5,
        broad_min=smallest,
        broad_max=largest,
    )
    return NoiseLevels(denoiser.schedule, annealed, named_weight("sigma2_linear", data_std), stratified=True)


def distill(
    generator: Generator,
    *,
    teacher: Denoiser | None = None,
    objective: Objective | None = None,
    levels: NoiseLevels | None = None,
    training: TrainingConfig | None = None,
    evaluate: Evaluate | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Distil a diffusion model into a one-step generator.

    Args:
        generator: the student; its weights are trained in place.
        teacher: the denoiser to distil with the default objective, multi-sample `VarDiU` with the batch's candidates.
        objective: instead of `teacher`, an objective that knows its own.
        levels: noise levels; default `default_levels` for the generator's `data_std`.
        training: optimisation settings.
        evaluate: metrics of the (averaged) generator, called at intervals.
        out: a new or empty folder for the run; None keeps nothing on disk.
        resume: go on from the latest checkpoint in `out`.

    Raises:
        UsageError: for not exactly one of `teacher` and `objective`, a teacher that does not fit the generator, or a run
            folder that cannot be used.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    training = TrainingConfig() if training is None else training
    if (teacher is None) == (objective is None):
        raise UsageError("give either a teacher (for the default objective) or an objective, not both and not neither")
    if objective is None:
        assert teacher is not None
        objective = VarDiU(teacher, Prior(), candidates="batch", control_variate="one")
    if levels is None:
        levels = default_levels(objective.teacher, float(getattr(generator, "data_std", 1.0)))
    folder = None
    if out is not None:
        folder = RunFolder(Path(out)) if resume else create(Path(out))
    return Trainer(generator, objective, levels, training, evaluate, folder).run(resume)


class Trainer:
    """The state of a run and the loop over its steps; see `distill`."""

    def __init__(
        self,
        generator: Generator,
        objective: Objective,
        levels: NoiseLevels,
        training: TrainingConfig,
        evaluate: Evaluate | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        self.config, self.levels, self.evaluate, self.folder = training, levels, evaluate, folder
        self.accelerator = _accelerator(training, objective, folder)
        device = find_device(training.device) or self.accelerator.device
        processes = self.accelerator.num_processes
        self.generator, self.objective = generator.to(device).train(), objective.to(device).train()
        if training.batch % processes:
            raise UsageError(f"batch must be divisible by the {processes} processes, but is {training.batch}")
        if getattr(objective, "candidates", 0) == "batch" and training.batch < 2:
            raise UsageError(
                f"candidates shared across the batch need a batch of at least 2, but batch={training.batch}"
            )
        parameter = next(generator.parameters())
        check_denoiser(objective.teacher, generator.data_shape, parameter)
        self.average = copy.deepcopy(generator).eval().requires_grad_(False) if training.ema else generator
        if training.compile:
            for module in (generator, *objective.children()):
                module.compile()
        step = Step(generator, objective, training.precision)
        self.step_module = self.accelerator.prepare_model(step, device_placement=False)
        self.optimizers = {"generator": _adam(generator.parameters(), training)}
        self.peaks = {"generator": training.lr, "objective": training.posterior_lr}
        if auxiliary := objective.auxiliary_parameters():
            self.optimizers["objective"] = _adam(auxiliary, training)
        self.rng = torch.Generator(device).manual_seed(training.seed)
        self.skipped = torch.zeros((), device=device)
        self.dtype = parameter.dtype
        self.step, self.clock = 0, Clock(training, self.accelerator)
        self.figures: dict[str, Tensor] = {}
        self.live: dict[str, str] = {}
        self.history: list[dict[str, Any]] = []
        self.stop_requested = False

    def run(self, resume: bool = False) -> Run:
        """Train to the last step or to the end of the budget, and return the result."""
        if resume:
            self._restore()
        elif self.folder is not None and self.accelerator.is_main_process:
            facts = environment() | {"processes": self.accelerator.num_processes}
            self.folder.environment.write_text(json.dumps(facts, indent=2))
        if self.folder is not None:
            self.accelerator.init_trackers("logs")
        self.clock.start()
        with self._graceful_interrupt(), self._progress_bar() as bar:
            while self.step < self.config.steps and (progress := self.clock.progress(self.step)) < 1:
                self._train_step(progress)
                self.step += 1
                self._keep_books(bar)
                bar.update()
                if self.stop_requested:
                    self._save()
                    raise Interrupted(f"stopped at step {self.step}")
            self._log(bar)
            self._evaluate(bar)
        return self._finish()

    def _train_step(self, progress: float) -> None:
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * learning_rate(self.config, progress)
        for _ in range(self.objective.critic_steps):
            self._update(progress, critic=True)
        self._update(progress, critic=False)
        if self.average is not self.generator:
            self._update_average()

    def _update(self, progress: float, critic: bool) -> None:
        loss = self.step_module(*self._draw(progress), critic)
        self.accelerator.backward(loss)
        stepping = {name: o for name, o in self.optimizers.items() if name == "objective" or not critic}
        norms = {name: _clip(optimizer, self.config.clip) for name, optimizer in stepping.items()}
        not_finite = (~torch.stack([*norms.values(), loss.detach().to(self.skipped)]).isfinite()).any().float()
        for optimizer in stepping.values():
            optimizer.found_inf = not_finite  # the fused kernels leave parameters and state alone where this is 1
            optimizer.step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.skipped += not_finite
        if not critic:
            self.figures = {"loss": loss.detach(), **{f"grad_norm_{name}": norm for name, norm in norms.items()}}

    def _draw(self, progress: float) -> tuple[Tensor, Noise, Tensor | None, Mapping[str, Tensor]]:
        """This process's share of the step's latents, noise and further latents; the whole batch's are drawn everywhere."""
        batch, generator = self.config.batch, self.generator
        z = generator.latents(batch, self.rng)
        noise = self.levels.draw(generator.data_shape, batch, progress, self.rng, self.dtype)
        eta = None
        if k := self.objective.fresh_latents:
            shape = (k, self.levels.draws, batch, *generator.latent_shape)
            eta = torch.randn(shape, generator=self.rng, device=self.rng.device, dtype=self.dtype)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = slice(rank * batch // processes, (rank + 1) * batch // processes)
        eta = None if eta is None else eta[:, :, share].flatten(1, 2)
        return z[share], noise.shard(rank, processes), eta, {}

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.average.parameters(), self.generator.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
        for a, b in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            a.copy_(b)

    def _keep_books(self, bar: tqdm[None]) -> None:
        """Log, evaluate and save where this step is due; the end of the run logs and evaluates by itself."""
        if self.step == self.config.steps:
            return
        if self.step % self.config.log_every == 0:
            self._log(bar)
        if self.config.eval_every and self.step % self.config.eval_every == 0:
            self._evaluate(bar)
        if self.step % self.config.checkpoint_every == 0:
            self._save()

    def _log(self, bar: tqdm[None]) -> None:
        draw = self._diagnostic_draw()
        values = {name: float(v) for name, v in (self.figures | self.objective.diagnostics(draw)).items()}
        progress = self.clock.progress(self.step)
        levels = (draw.noise.sigma / draw.noise.alpha).quantile(torch.tensor([0.05, 0.5, 0.95]).to(draw.noise.sigma))
        values |= dict(zip(("ratio_05", "ratio_50", "ratio_95"), levels.tolist(), strict=True))
        values |= {"lr": self.config.lr * learning_rate(self.config, progress), "skipped": float(self.skipped)}
        self._record("train", values, bar)
        if values["skipped"] > self.config.max_skipped:
            self._save()
            raise Diverged(
                f"{values['skipped']:.0f} of {self.step} steps had gradients that are not finite (limit {self.config.max_skipped}); "
                "the last good state is kept: try a smaller lr, clip, or a larger smallest noise level"
            )

    @torch.no_grad()
    def _diagnostic_draw(self) -> Draw:
        """A draw of its own random numbers, so that logging does not change the run."""
        rng, self.rng = self.rng, torch.Generator(self.rng.device).manual_seed(self.step)
        try:
            z, noise, eta, batch = self._draw(self.clock.progress(self.step))
        finally:
            self.rng = rng
        return Draw(noise.rows(z), noise.rows(self.generator(z)), noise, self.generator, eta, batch)

    def _evaluate(self, bar: tqdm[None]) -> None:
        if self.evaluate is not None and self.accelerator.is_main_process:
            self._record("eval", {name: float(v) for name, v in self.evaluate(self.average.eval()).items()}, bar)
            self.generator.train()

    def _record(self, kind: str, values: dict[str, float], bar: tqdm[None]) -> None:
        if not self.accelerator.is_main_process:
            return
        seconds = self.clock.elapsed()
        self.history.append({"kind": kind, "step": self.step, "seconds": seconds, **values})
        if self.folder is not None:
            self.folder.log(kind, self.step, seconds, values)
            self.accelerator.log({f"{kind}/{name}": v for name, v in values.items()}, step=self.step)
        self.live |= {name: f"{values[name]:.4g}" for name in LIVE_FIGURES if name in values}
        bar.set_postfix(self.live, refresh=False)

    def _save(self) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        tensors = {
            "generator": dict(self.generator.state_dict()),
            "objective": self.objective.auxiliary_state(),
            "random": {"training": self.rng.get_state()},
            "counters": {"skipped": self.skipped},
        }
        if self.average is not self.generator:
            tensors["average"] = dict(self.average.state_dict())
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer.{name}"] = _optimizer_state(optimizer)
        state = checkpoints.State(self.step, self.clock.elapsed(), tensors)
        checkpoints.save(self.folder.checkpoints, state, self.config.keep_checkpoints)

    def _restore(self) -> None:
        assert self.folder is not None
        state = checkpoints.load(checkpoints.latest(self.folder.checkpoints), self.rng.device)
        self._restore_module("generator", self.generator, state)
        if self.average is not self.generator:
            self._restore_module("average", self.average, state)
        loaded = state.tensors.get("objective", {})
        checkpoints.match("objective", loaded, self.objective.auxiliary_state())
        self.objective.load_state_dict(loaded, strict=False)
        for name, optimizer in self.optimizers.items():
            _restore_optimizer(optimizer, state.tensors.get(f"optimizer.{name}", {}), name)
        self.rng.set_state(state.tensors["random"]["training"].cpu())
        self.skipped.copy_(state.tensors["counters"]["skipped"])
        self.step, self.clock.spent = state.step, state.seconds
        if self.accelerator.is_main_process:
            self.folder.rewind(self.step)
        self.history = self.folder.history()

    @staticmethod
    def _restore_module(section: str, module: nn.Module, state: checkpoints.State) -> None:
        loaded = state.tensors.get(section, {})
        checkpoints.match(section, loaded, module.state_dict())
        module.load_state_dict(loaded)

    def _finish(self) -> Run:
        self._save()
        generator = self.average.eval()
        if self.folder is not None and self.accelerator.is_main_process:
            if isinstance(generator, PyTorchModelHubMixin):
                generator.save_pretrained(self.folder.generator)
            self.accelerator.end_training()
        return Run(generator, self.objective, self.history, self.folder.path if self.folder else None)

    def _progress_bar(self) -> tqdm[None]:
        hidden = not self.accelerator.is_local_main_process
        return tqdm(total=self.config.steps, initial=self.step, unit="step", disable=hidden, mininterval=0.5)

    @contextmanager
    def _graceful_interrupt(self) -> Iterator[None]:
        """Finish the step under way on the first SIGINT or SIGTERM; a second one stops at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Clock:
    """How far a run is: steps done or, with a budget, time spent, whichever is further."""

    def __init__(self, training: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = training, accelerator
        self.spent, self.started = 0.0, time.monotonic()

    def start(self) -> None:
        """Begin to count."""
        self.started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds spent, those before a resume included."""
        return self.spent + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """In [0, 1]; the same on every process."""
        by_steps = step / self.config.steps
        if self.config.max_minutes is None:
            return min(by_steps, 1.0)
        elapsed = self.elapsed()
        if self.accelerator.num_processes > 1:
            elapsed = float(broadcast(torch.tensor(elapsed, device=self.accelerator.device)))
        return min(max(by_steps, elapsed / (60 * self.config.max_minutes)), 1.0)


def learning_rate(training: TrainingConfig, progress: float) -> float:
    """The share of the peak learning rate at this progress: linear warm-up, then constant or a half cosine."""
    if progress < training.warmup:
        return progress / training.warmup
    if training.lr_schedule == "constant":
        return 1.0
    along = (progress - training.warmup) / (1 - training.warmup)
    return training.lr_final + (1 - training.lr_final) * 0.5 * (1 + math.cos(math.pi * along))


def _accelerator(training: TrainingConfig, objective: Objective, folder: RunFolder | None) -> Accelerator:
    tracker = None if folder is None or training.tracker == "none" else training.tracker
    return Accelerator(
        cpu=training.device == "cpu",
        mixed_precision="no",
        log_with=tracker,
        project_dir=None if folder is None else str(folder.path),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=objective.critic_steps > 0)],
    )


def _adam(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(list(parameters), betas=betas, weight_decay=training.weight_decay, fused=True)


def _clip(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Scale the gradients to a norm of at most `largest` and return the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, largest)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{i}/{key}": v for i, part in optimizer.state_dict()["state"].items() for key, v in part.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, loaded: Mapping[str, Tensor], name: str) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(parameters):
        try:
            state = {key: loaded[f"{i}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        except KeyError as error:
            raise UsageError(
                f"the checkpoint is of another run: it lacks optimizer state {error} of the {name}"
            ) from error
        optimizer.state[p] = state
