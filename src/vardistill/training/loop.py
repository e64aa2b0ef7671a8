r"""The loop that drives an objective.

Each step draws latents z, noise (t, ε) and further latents η for the whole batch from one generator of random numbers,
the same on every process, and each process keeps its share: the result does not depend on the number of processes.
Gradients are averaged by the data-parallel wrapper that Accelerate chooses. With `accumulate` a process's share goes
through the networks in as many parts, to save memory; the step is the same. An update whose loss or gradient is not
finite on any process leaves weights, batch statistics and optimisers alone (decided on the device, without a host sync)
and is counted. The moving average follows θ̄ ← d θ̄ + (1 − d) θ, d = min(ema, (1 + n)/(10 + n)) after n earlier
updates of the generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from vardistill.devices import find_device
from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import Draw, NoiseLevels
from vardistill.errors import UsageError
from vardistill.objectives import Objective
from vardistill.objectives.diagnostics import diversities, low_level_share
from vardistill.processes import alone, launched, several_on_cpu
from vardistill.runs.config import TrainingConfig
from vardistill.students.student import Student
from vardistill.training import checkpoints
from vardistill.training.books import Books, StopRequest
from vardistill.training.checks import (
    check_generator,
    check_networks,
    check_objective,
    check_settings,
    check_tracker,
    real_samples,
)
from vardistill.training.clock import Clock, phase
from vardistill.training.data import Conditions, Samples
from vardistill.training.defaults import default_objective, with_default_levels
from vardistill.training.folder import RunFolder, create
from vardistill.training.optimisers import (
    adam,
    adam_state,
    clip_gradients,
    has_gradient,
    learning_rate,
    step_unless,
    update_average,
)
from vardistill.training.step import Drawn, Step

Evaluate = Callable[[Student], Mapping[str, float]]
"""Metrics of a generator in evaluation mode."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C) and has kept a checkpoint."""


class Diverged(Exception):
    """Too many steps had gradients that were not finite; the last good state is kept."""

    @classmethod
    def after(cls, skipped: float, step: int, limit: int, remedy: str) -> Diverged:
        """What to say after so many skipped updates."""
        return cls(
            f"{skipped:.0f} updates up to step {step} had gradients that are not finite (limit {limit}); the last "
            f"good state is kept: try {remedy}"
        )


@dataclass
class Run:
    """A finished run.

    Attributes:
        generator: the moving average of the student (the student itself without one), in evaluation mode.
        objective: with its trained auxiliary networks.
        history: the lines of metrics.
        path: the run folder, or None.
    """

    generator: Student
    objective: Objective
    history: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None


def distill(
    generator: Student,
    *,
    teacher: Denoiser | None = None,
    objective: Objective | None = None,
    data: Samples | Tensor | None = None,
    conditions: Conditions | None = None,
    levels: NoiseLevels | None = None,
    training: TrainingConfig | None = None,
    evaluate: Evaluate | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Distil a diffusion model into a one-step generator.

    Args:
        generator: the student; its weights are trained in place, with dropout silent.
        teacher: the denoiser to distil with `default_objective`.
        objective: instead of `teacher`, an objective that knows its own, or needs none.
        data: real samples for objectives that compare with them: a tensor (n, *data), or a function of their number
            and a generator of random numbers (see `vardistill.training.data`).
        conditions: what a conditional generator and its teacher are told, `vardistill.data.Labels` for example.
        levels: noise levels; default `default_levels` for the generator's `data_std`; the parts of a sum that compare
            groups get shared ones of their own.
        training: optimisation settings.
        evaluate: metrics of the (averaged) generator, called at intervals.
        out: a new or empty folder for the run; None keeps nothing on disk. A generator that is no hub mixin leaves
            its weights there alone, without a configuration.
        resume: go on from the latest checkpoint in `out`.

    Raises:
        UsageError: for not exactly one of `teacher` and `objective`, a teacher that has no default objective for the
            generator, a generator that is none or gives no samples of its data shape, a teacher, posterior or critic
            that does not fit it, levels that the teacher's schedule does not reach, data beside a teacher alone, a
            run folder that cannot be used, or a checkpoint that is damaged or of another run.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    training = TrainingConfig() if training is None else training
    if (teacher is None) == (objective is None):
        raise UsageError("give either a teacher (for the default objective) or an objective, not both and not neither")
    if teacher is not None and data is not None:
        raise UsageError("no default objective compares with data: leave data out, or give objective=, e.g. VarFlow")
    check_generator(generator, conditions)
    if objective is None:
        assert teacher is not None
        objective = default_objective(teacher, generator)
    check_objective(objective)
    if levels is None:
        shares = training.batch // launched(), training.batch // 2  # of a process; of groups that are pairs
        objective, levels = with_default_levels(objective, generator, math.gcd(*shares, 8))
    if resume and out is None:
        raise UsageError("resume needs the run folder: give it as out")
    folder = None
    if out is not None:
        folder = RunFolder(Path(out)) if resume else create(Path(out))
    return Trainer(generator, objective, levels, training, evaluate, folder, data, conditions).run(resume)


class Trainer:
    """The state of a run and the loop over its steps; see `distill`."""

    def __init__(
        self,
        generator: Student,
        objective: Objective,
        levels: NoiseLevels,
        training: TrainingConfig,
        evaluate: Evaluate | None = None,
        folder: RunFolder | None = None,
        data: Samples | Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        check_settings(generator, objective, levels, training, conditions, launched())
        self.config, self.levels, self.evaluate, self.folder = training, levels, evaluate, folder
        self.accelerator = _accelerator(training, objective, folder)
        device = find_device(training.device, self.accelerator.device)
        self.generator, self.objective = generator.to(device).eval(), objective.to(device).eval()
        check_networks(generator, objective, conditions)
        parameter = next(generator.parameters())
        _training_mode(generator, objective)
        self.conditions = conditions
        self.data = real_samples(data, objective, generator, parameter, conditions)
        if training.compile:
            for module in (generator, *(child for part in objective.parts for child in part.children())):
                module.compile()
        step = Step(generator, objective, training.precision)
        self.step_module = self.accelerator.prepare_model(step, device_placement=False)
        self.average = average_of(generator) if training.ema else generator
        self.optimizers = {"generator": adam(generator.parameters(), training)}
        self.peaks = {"generator": training.lr, "objective": training.auxiliary_lr}
        if auxiliary := objective.auxiliary_parameters():
            self.optimizers["objective"] = adam(auxiliary, training)
        self.rng = torch.Generator(device).manual_seed(training.seed)
        self.skipped, self.skipped_before = torch.zeros((), device=device), 0.0
        self.updates, self.evaluations = 0, 0
        self.dtype = parameter.dtype
        self.step, self.clock = 0, Clock(training, self.accelerator)
        self.figures: dict[str, Tensor] = {}
        self.statistics = _running_statistics(generator, objective)
        self.books, self.stop = Books(folder, self.accelerator), StopRequest(self.accelerator)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics."""
        return self.books.history

    def run(self, resume: bool = False) -> Run:
        """Train to the last step or to the end of the budget, and return the result."""
        if resume:
            self._restore()
        else:
            self.books.begin()
        self.clock.start()
        with self.stop.heeded(), self.books.opened(self.step, self.config.steps):
            progress = self.clock.progress(self.step)
            while progress < 1:
                self.advance(*phase(self.config, progress))
                before, progress = progress, self.clock.progress(self.step)
                milestone = self._passed(before) < self._passed(progress)
                if milestone or self._due():
                    with self.clock.paused():
                        self._keep_books(progress, milestone)
                self.books.bar.update()
        return self._finish()

    def advance(self, progress: float, head_start: bool = False) -> None:
        """One step of training, at this progress ∈ [0, 1]; in a head start of the objective's networks alone."""
        self.set_learning_rates(progress)
        for _ in range(self.objective.critic_steps):
            self.update(progress, critic=True)
        if not head_start:
            self.update(progress, critic=False)
            if self.average is not self.generator:
                update_average(self.average, self.generator, self.config.ema, self.updates)
            self.updates += 1
        self.step += 1

    def set_learning_rates(self, progress: float) -> None:
        """Move every optimiser along its schedule."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[name] * learning_rate(self.config, progress)

    def update(self, progress: float, critic: bool) -> None:
        """One update on a fresh draw: of the generator and what is trained with it, or of the critic alone."""
        statistics = [b.clone() for b in self.statistics]
        loss = self._backward(self.draw(progress), critic)
        stepping = {
            name: o for name, o in self.optimizers.items() if has_gradient(o) and (name == "objective" or not critic)
        }
        norms = {name: clip_gradients(optimizer, self.config.clip) for name, optimizer in stepping.items()}
        not_finite = self._not_finite(loss, *norms.values())
        step_unless(not_finite, stepping.values())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for b, before in zip(self.statistics, statistics, strict=True):
                b.copy_(torch.where((not_finite > 0) | ~b.isfinite(), before, b))  # a variance can overflow alone
        self.skipped += not_finite
        batch = self.config.batch
        self.evaluations += batch + self.objective.evaluations(batch, self.levels.draws, critic)
        self.figures |= {"critic_loss" if critic else "loss": loss}
        self.figures |= {f"grad_norm_{name}": norm for name, norm in norms.items()}

    def _backward(self, drawn: Drawn, critic: bool) -> Tensor:
        """Add up the gradients of this process's share of the step, part by part, and return its mean loss."""
        parts, total = self.config.accumulate, torch.zeros_like(self.skipped)
        for i in range(parts):
            last = i == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.step_module):
                loss = self.step_module(drawn.shard(i, parts), critic) / parts
                self.accelerator.backward(loss)
            total = total + loss.detach()
        return total

    def _not_finite(self, *values: Tensor) -> Tensor:
        """1 where one of the scalars is NaN or infinite on any process, else 0."""
        bad = (~torch.stack([v.to(self.skipped) for v in values]).isfinite()).any().float()
        if self.accelerator.num_processes > 1:
            bad = (self.accelerator.reduce(bad, "sum") > 0).float()
        return bad

    def draw(self, progress: float) -> Drawn:
        """This process's share of the step's latents, noise and further latents; all are drawn everywhere."""
        batch, generator, objective = self.config.batch, self.generator, self.objective
        z = generator.latents(batch, self.rng)
        noise, *other_noise = [
            levels.draw(generator.data_shape, batch, progress, self.rng, self.dtype, real=objective.needs_real)
            for levels in (self.levels, *objective.other_levels)
        ]
        condition = {} if self.conditions is None else self.conditions(batch, self.rng)
        real = None if self.data is None else self.data(batch, self.rng, **condition)
        eta = pool = None
        if k := objective.fresh_latents:
            shape = (k, self.levels.draws, batch, *generator.latent_shape)
            eta = torch.randn(shape, generator=self.rng, device=self.rng.device, dtype=self.dtype)
        if m := objective.pool_latents:
            pool = generator.latents(m, self.rng)
        drawn = Drawn(z, noise, eta, pool, real, progress, tuple(other_noise), condition)
        return drawn.shard(self.accelerator.process_index, self.accelerator.num_processes)

    def _passed(self, progress: float) -> int:
        """How many milestones are behind; a step that ends on one has passed it, whatever the rounding."""
        return int(progress * self.config.milestones + 1e-9)

    def _due(self) -> bool:
        every = (self.config.log_every, self.config.eval_every, self.config.checkpoint_every)
        return self.stop.made or any(n and self.step % n == 0 for n in every)

    def _keep_books(self, progress: float, milestone: bool) -> None:
        """Log, evaluate and save where this step is due, and stop where that was asked for."""
        if milestone or self.step % self.config.log_every == 0:
            self._log(progress)
        if milestone or (self.config.eval_every and self.step % self.config.eval_every == 0):
            self._evaluate()
        stopping = progress < 1 and self._stopping()
        if milestone or stopping or self.step % self.config.checkpoint_every == 0:
            self._save()
        if stopping:
            raise Interrupted(f"stopped at step {self.step}")

    def _stopping(self) -> bool:
        """Whether a stop was asked for; several processes agree on it where they log, and so wait, anyway."""
        together = self.accelerator.num_processes == 1 or self.step % self.config.log_every == 0
        return together and self.stop.agreed()

    def _log(self, progress: float) -> None:
        within, head_start = phase(self.config, progress)
        lr = 0.0 if head_start else self.config.lr * learning_rate(self.config, within)
        values = self._values(within) | {"lr": lr, "progress": 0.0 if head_start else within}
        values |= {"skipped": float(self.skipped)}
        self.books.warn(self.step, values)
        self._record("train", values)
        skipped = float(self.skipped) - self.skipped_before
        if skipped > self.config.max_skipped:
            self._save()
            remedy = "a smaller lr or clip, or a larger smallest noise level"
            raise Diverged.after(skipped, self.step, self.config.max_skipped, remedy)

    @torch.no_grad()
    def _values(self, progress: float) -> dict[str, float]:
        """The last updates' figures, the objective's diagnostics and the levels' quantiles, meaned over processes."""
        with _evaluation_mode(self.generator, self.objective):
            draw = self._diagnostic_draw(progress)
            tensors = self.figures | self.objective.diagnostics(draw) | self._diagnostics(draw)
        ratio = draw.noise.sigma / draw.noise.alpha
        tensors |= {f"ratio_{percent:02d}": ratio.quantile(percent / 100) for percent in (5, 50, 95)}
        stacked = torch.stack([v.to(ratio) for v in tensors.values()])
        return dict(zip(tensors, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """What is worth watching under every objective."""
        rng = torch.Generator(self.rng.device).manual_seed(self.step)
        return diversities(draw, self.objective.teacher, self.generator.data_std, rng) | {
            f"{prefix}low_level_share": low_level_share(part.generator_loss, own)
            for prefix, part, own in self.objective.draws(draw)
        }

    def _diagnostic_draw(self, progress: float) -> Draw:
        """A draw of its own random numbers, so that logging does not change the run."""
        rng, self.rng = self.rng, torch.Generator(self.rng.device).manual_seed(self.step)
        try:
            drawn = self.draw(progress)
        finally:
            self.rng = rng
        return drawn.complete(self.generator)

    def _evaluate(self) -> None:
        if self.evaluate is not None and self.accelerator.is_main_process:
            with alone(), _evaluation_mode(self.generator):
                values = {name: float(v) for name, v in self.evaluate(self.average).items()}
            self._record("eval", values)

    def _record(self, kind: str, values: dict[str, float]) -> None:
        costs = {"cpu_seconds": self.clock.cpu_elapsed(), "network_evaluations": float(self.evaluations)}
        self.books.record(kind, self.step, self.clock.elapsed(), costs | values)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by section; all but the random state are the run's own tensors, not copies."""
        tensors = {
            "generator": dict(self.generator.state_dict()),
            "objective": self.objective.auxiliary_state(),
            "counters": {
                "skipped": self.skipped,
                "updates": torch.tensor(self.updates),
                "network_evaluations": torch.tensor(self.evaluations),
                "cpu_seconds": torch.tensor(self.clock.cpu_elapsed()),
            },
            "random": {"training": self.rng.get_state()},
        }
        if self.average is not self.generator:
            tensors["average"] = dict(self.average.state_dict())
        return tensors | {f"optimizer.{name}": adam_state(o) for name, o in self.optimizers.items()}

    def _save(self) -> None:
        """Keep a checkpoint; it is complete when any process goes on."""
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            state = checkpoints.State(self.step, self.clock.elapsed(), self._tensors())
            checkpoints.save(self.folder.checkpoints, state, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        assert self.folder is not None
        state = checkpoints.load(checkpoints.latest(self.folder.checkpoints), self.rng.device)
        checkpoints.restore(state, self._tensors(), self.rng)
        self.step, self.skipped_before = state.step, float(self.skipped)
        counters = state.tensors["counters"]
        self.clock.spent, self.clock.cpu_spent = state.seconds, float(counters["cpu_seconds"])
        self.updates, self.evaluations = int(counters["updates"]), int(counters["network_evaluations"])
        self.books.resume(self.step)

    def _finish(self) -> Run:
        generator = self.average.eval()
        if self.folder is not None and self.accelerator.is_main_process:
            save_generator(generator, self.folder.generator)
        self.accelerator.wait_for_everyone()
        return Run(generator, self.objective.eval(), self.history, self.folder.path if self.folder else None)


def average_of(generator: Student) -> Student:
    """A copy to hold the moving average; it shares the parameters that are not trained."""
    frozen = {id(p): p for p in generator.parameters() if not p.requires_grad}
    return copy.deepcopy(generator, frozen).eval().requires_grad_(False)


def save_generator(generator: Student, path: Path) -> None:
    """The weights as safetensors, with the configuration that loads them where the generator is a hub mixin."""
    if isinstance(generator, PyTorchModelHubMixin):
        generator.save_pretrained(path)
    else:
        path.mkdir(exist_ok=True)
        save_model(generator, str(path / "model.safetensors"))


def _training_mode(*modules: nn.Module) -> None:
    """Training mode but for dropout: its numbers would come from neither the run's seed nor its checkpoints."""
    for module in modules:
        module.train()
        for child in module.modules():
            if isinstance(child, _DropoutNd):
                child.eval()


def _running_statistics(*modules: nn.Module) -> list[Tensor]:
    """What a forward pass changes in training mode: the statistics of batch normalisation."""
    norms = [child for module in modules for child in module.modules() if isinstance(child, _NormBase)]
    return [b for norm in norms if norm.training for b in norm.buffers()]


@contextmanager
def _evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        _training_mode(*modules)


def _accelerator(training: TrainingConfig, objective: Objective, folder: RunFolder | None) -> Accelerator:
    tracker = None if folder is None or training.tracker == "none" else training.tracker
    if tracker is not None:
        check_tracker(training)
    ddp = DistributedDataParallelKwargs(find_unused_parameters=objective.critic_steps > 0)
    return Accelerator(
        cpu=several_on_cpu(training.device),
        mixed_precision="no",
        log_with=tracker,
        project_dir=None if folder is None else str(folder.path),
        kwargs_handlers=[ddp],
    )
