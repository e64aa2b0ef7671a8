r"""The loop that drives an objective.

Each step draws latents z, noise (t, ε) and further latents η for the whole batch from one generator of random numbers,
the same on every process, and each process keeps its share: the result does not depend on the number of processes.
Gradients are averaged by the data-parallel wrapper that Accelerate chooses. An update whose loss or gradient is not
finite on any process leaves weights and optimisers alone (the fused optimisers skip it on the device, without a host
sync) and is counted. The moving average follows θ̄ ← d θ̄ + (1 − d) θ, d = min(ema, (1 + n)/(10 + n)) after n steps.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_model
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
from vardistill.processes import alone, several_on_cpu
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


class Drawn(NamedTuple):
    """The random part of a process's share of a step; see `Draw`."""

    z: Tensor
    noise: Noise
    eta: Tensor | None
    pool: Tensor | None

    def complete(self, x: Tensor, generator: Callable[[Tensor], Tensor]) -> Draw:
        """The draw with the latents' samples x (N, *data)."""
        return Draw(self.noise.rows(self.z), self.noise.rows(x), self.noise, generator, self.eta, self.pool)


class Step(nn.Module):
    """The differentiable part of a step as one module, so that a wrapper sees each parameter's use."""

    def __init__(self, generator: Generator, objective: Objective, precision: str) -> None:
        super().__init__()
        self.generator = generator
        self.objective = objective
        self.mixed = precision == "bf16"

    def forward(self, drawn: Drawn, critic: bool) -> Tensor:
        """The mean loss over this process's rows."""
        with torch.set_grad_enabled(not critic):
            x = self._generate(drawn.z)
        draw = drawn.complete(x, self._generate)
        loss = self.objective.critic_loss(draw) if critic else self.objective.generator_loss(draw)
        if loss.shape != draw.noise.t.shape:
            raise UsageError(f"an objective returns one value per row, ({len(draw.z)},), but got {tuple(loss.shape)}")
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
        out: a new or empty folder for the run; None keeps nothing on disk. A generator that is no hub mixin leaves
            its weights there alone, without a configuration.
        resume: go on from the latest checkpoint in `out`.

    Raises:
        UsageError: for not exactly one of `teacher` and `objective`, a teacher that does not fit the generator, a run
            folder that cannot be used, or a checkpoint that is damaged or of another run.
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
    if resume and out is None:
        raise UsageError("resume needs the run folder: give it as out")
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
        self.generator, self.objective = generator.to(device).train(), objective.to(device).train()
        parameter = next(generator.parameters())
        check_schedules(objective.teacher, levels)
        check_batch(training.batch, self.accelerator.num_processes, objective)
        check_denoiser(objective.teacher, generator.data_shape, parameter)
        if training.compile:
            for module in (generator, *objective.children()):
                module.compile()
        step = Step(generator, objective, training.precision)
        self.step_module = self.accelerator.prepare_model(step, device_placement=False)
        self.average = copy.deepcopy(generator).eval().requires_grad_(False) if training.ema else generator
        self.optimizers = {"generator": _adam(generator.parameters(), training)}
        self.peaks = {"generator": training.lr, "objective": training.posterior_lr}
        if auxiliary := objective.auxiliary_parameters():
            self.optimizers["objective"] = _adam(auxiliary, training)
        self.rng = torch.Generator(device).manual_seed(training.seed)
        self.skipped, self.skipped_before = torch.zeros((), device=device), 0.0
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
        self.clock.start()
        with self._graceful_interrupt(), self._trackers(), self._progress_bar() as bar:
            progress = self.clock.progress(self.step)
            while progress < 1:
                self.advance(progress)
                progress = self.clock.progress(self.step)
                self._keep_books(progress, bar)
                bar.update()
        return self._finish()

    def advance(self, progress: float) -> None:
        """One step of training, at this progress ∈ [0, 1] of the run."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * learning_rate(self.config, progress)
        for _ in range(self.objective.critic_steps):
            self._update(progress, critic=True)
        self._update(progress, critic=False)
        if self.average is not self.generator:
            self._update_average()
        self.step += 1

    def _update(self, progress: float, critic: bool) -> None:
        loss = self.step_module(self._draw(progress), critic)
        self.accelerator.backward(loss)
        stepping = {name: o for name, o in self.optimizers.items() if name == "objective" or not critic}
        norms = {name: _clip(optimizer, self.config.clip) for name, optimizer in stepping.items()}
        not_finite = self._not_finite(loss.detach(), *norms.values())
        for optimizer in stepping.values():
            optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # 1: the fused kernels leave all alone
            optimizer.step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.skipped += not_finite
        if not critic:
            self.figures = {"loss": loss.detach(), **{f"grad_norm_{name}": norm for name, norm in norms.items()}}

    def _not_finite(self, *values: Tensor) -> Tensor:
        """1 where one of the scalars is NaN or infinite on any process, else 0."""
        bad = (~torch.stack([v.to(self.skipped) for v in values]).isfinite()).any().float()
        if self.accelerator.num_processes > 1:
            bad = (self.accelerator.reduce(bad, "sum") > 0).float()
        return bad

    def _draw(self, progress: float) -> Drawn:
        """This process's share of the step's latents, noise and further latents; all are drawn everywhere."""
        batch, generator = self.config.batch, self.generator
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes

        def share(n: int) -> slice:
            return slice(rank * n // processes, (rank + 1) * n // processes)

        z = generator.latents(batch, self.rng)
        noise = self.levels.draw(generator.data_shape, batch, progress, self.rng, self.dtype)
        eta = pool = None
        if k := self.objective.fresh_latents:
            shape = (k, self.levels.draws, batch, *generator.latent_shape)
            eta = torch.randn(shape, generator=self.rng, device=self.rng.device, dtype=self.dtype)
            eta = eta[:, :, share(batch)].flatten(1, 2)
        if m := self.objective.pool_latents:
            pool = generator.latents(m, self.rng)[share(m)]
        return Drawn(z[share(batch)], noise.shard(rank, processes), eta, pool)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        pairs = list(zip(self.average.parameters(), self.generator.parameters(), strict=True))
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)
        for a, b in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            a.copy_(b)

    def _keep_books(self, progress: float, bar: tqdm[None]) -> None:
        """Log, evaluate and save where this step is due, and stop where that was asked for."""
        last = progress >= 1
        if last or self.step % self.config.log_every == 0:
            self._log(progress, bar)
        if last or (self.config.eval_every and self.step % self.config.eval_every == 0):
            self._evaluate(bar)
        stopping = not last and self._stopping()
        if last or stopping or self.step % self.config.checkpoint_every == 0:
            self._save()
        if stopping:
            raise Interrupted(f"stopped at step {self.step}")

    def _stopping(self) -> bool:
        """Whether a stop was asked for; several processes agree on it where they log, and so wait, anyway."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        if self.step % self.config.log_every:
            return False
        wishes = torch.tensor(float(self.stop_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wishes, "sum") > 0)

    def _log(self, progress: float, bar: tqdm[None]) -> None:
        values = self._values(progress) | {"lr": self.config.lr * learning_rate(self.config, progress)}
        self._record("train", values | {"skipped": float(self.skipped)}, bar)
        skipped = float(self.skipped) - self.skipped_before
        if skipped > self.config.max_skipped:
            self._save()
            raise Diverged(
                f"{skipped:.0f} updates up to step {self.step} had gradients that are not finite (limit "
                f"{self.config.max_skipped}); the last good state is kept: try a smaller lr or clip, or a larger "
                "smallest noise level"
            )

    @torch.no_grad()
    def _values(self, progress: float) -> dict[str, float]:
        """The last update's figures, the objective's diagnostics and the levels' quantiles, meaned over processes."""
        with _evaluation_mode(self.generator, self.objective):
            draw = self._diagnostic_draw(progress)
            tensors = self.figures | self.objective.diagnostics(draw)
        ratio = draw.noise.sigma / draw.noise.alpha
        tensors |= {f"ratio_{percent:02d}": ratio.quantile(percent / 100) for percent in (5, 50, 95)}
        stacked = torch.stack([v.to(ratio) for v in tensors.values()])
        return dict(zip(tensors, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _diagnostic_draw(self, progress: float) -> Draw:
        """A draw of its own random numbers, so that logging does not change the run."""
        rng, self.rng = self.rng, torch.Generator(self.rng.device).manual_seed(self.step)
        try:
            drawn = self._draw(progress)
        finally:
            self.rng = rng
        return drawn.complete(self.generator(drawn.z), self.generator)

    def _evaluate(self, bar: tqdm[None]) -> None:
        if self.evaluate is not None and self.accelerator.is_main_process:
            with alone(), _evaluation_mode(self.generator):
                values = {name: float(v) for name, v in self.evaluate(self.average).items()}
            self._record("eval", values, bar)

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

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by section; all but the random state are the run's own tensors, not copies."""
        tensors = {
            "generator": dict(self.generator.state_dict()),
            "objective": self.objective.auxiliary_state(),
            "counters": {"skipped": self.skipped},
            "random": {"training": self.rng.get_state()},
        }
        if self.average is not self.generator:
            tensors["average"] = dict(self.average.state_dict())
        return tensors | {f"optimizer.{name}": _adam_state(o) for name, o in self.optimizers.items()}

    def _save(self) -> None:
        """Keep a checkpoint; it is complete when any process goes on."""
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            state = checkpoints.State(self.step, self.clock.elapsed(), self._tensors())
            checkpoints.save(self.folder.checkpoints, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _restore(self) -> None:
        assert self.folder is not None
        state, own = checkpoints.load(checkpoints.latest(self.folder.checkpoints), self.rng.device), self._tensors()
        for section in own.keys() | state.tensors.keys():
            checkpoints.match(section, state.tensors.get(section, {}), own.get(section, {}))
        try:
            self.rng.set_state(state.tensors["random"]["training"].cpu())
        except RuntimeError as error:
            raise UsageError(f"the checkpoint's random state is damaged: {error}") from error
        for section, tensors in own.items():
            for name, v in tensors.items():
                v.copy_(state.tensors[section][name])
        self.step, self.clock.spent, self.skipped_before = state.step, state.seconds, float(self.skipped)
        if self.accelerator.is_main_process:
            self.folder.rewind(self.step)
            self.history = self.folder.history()

    def _finish(self) -> Run:
        generator = self.average.eval()
        if self.folder is not None and self.accelerator.is_main_process:
            save_generator(generator, self.folder.generator)
        self.accelerator.wait_for_everyone()
        return Run(generator, self.objective.eval(), self.history, self.folder.path if self.folder else None)

    @contextmanager
    def _trackers(self) -> Iterator[None]:
        """Start the trackers, and write out what they hold however the run ends."""
        if self.folder is not None:
            self.accelerator.init_trackers("logs")
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _progress_bar(self) -> tqdm[None]:
        """Steps and live figures; few lines where they end in a file."""
        hidden = not self.accelerator.is_local_main_process
        interval = 0.5 if sys.stderr.isatty() else 30.0
        return tqdm(total=self.config.steps, initial=self.step, unit="step", disable=hidden, mininterval=interval)

    @contextmanager
    def _graceful_interrupt(self) -> Iterator[None]:
        """Finish the step under way on the first SIGINT or SIGTERM.

        A second one stops a run of one process at once; launchers of several pass the first one on twice.
        """

        def request(number: int, frame: FrameType | None) -> None:
            if self.stop_requested and self.accelerator.num_processes == 1:
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


def save_generator(generator: Generator, path: Path) -> None:
    """The weights as safetensors, with the configuration that loads them where the generator is a hub mixin."""
    if isinstance(generator, PyTorchModelHubMixin):
        generator.save_pretrained(path)
    else:
        path.mkdir(exist_ok=True)
        save_model(generator, str(path / "model.safetensors"))


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


def check_schedules(teacher: Denoiser, levels: NoiseLevels) -> None:
    """Raise UsageError unless the noise levels follow the teacher's schedule."""
    if teacher.schedule != levels.schedule:
        raise UsageError(
            f"the teacher's schedule is {teacher.schedule}, but the noise levels' is {levels.schedule}: "
            "give both the same, or wrap the teacher in vardistill.denoisers.reschedule"
        )


def check_batch(batch: int, processes: int, objective: Objective) -> None:
    """Raise UsageError unless the batch splits evenly and, where candidates come from it, offers some."""
    for name, latents in (("batch", batch), ("pool", objective.pool_latents)):
        if latents % processes:
            raise UsageError(f"{name} must be divisible by the {processes} processes, but is {latents}")
    if getattr(objective, "candidates", 0) == "batch" and batch < 2:
        raise UsageError(f"candidates shared across the batch need a batch of at least 2, but batch={batch}")


@contextmanager
def _evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def _accelerator(training: TrainingConfig, objective: Objective, folder: RunFolder | None) -> Accelerator:
    tracker = None if folder is None or training.tracker == "none" else training.tracker
    ddp = DistributedDataParallelKwargs(find_unused_parameters=objective.critic_steps > 0)
    return Accelerator(
        cpu=several_on_cpu(training.device),
        mixed_precision="no",
        log_with=tracker,
        project_dir=None if folder is None else str(folder.path),
        kwargs_handlers=[ddp],
    )


def _adam(parameters: Iterable[nn.Parameter], training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with its state there from the start, so that a checkpoint always has all of it."""
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(list(parameters), betas=betas, weight_decay=training.weight_decay, fused=True)
    for p in _parameters(optimizer):
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def _adam_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = enumerate(_parameters(optimizer))
    return {f"{i}/{key}": v for i, p in parameters for key, v in optimizer.state[p].items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _clip(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Scale the gradients to a norm of at most `largest` and return the norm before."""
    return nn.utils.clip_grad_norm_(_parameters(optimizer), largest)
