r"""The loop that drives an objective.

A step runs the objective's updates in their order, each on a fresh draw (`draws`). An update opens the parameters of
the networks that it trains and freezes all others: a gradient may pass through these, and moves none of them. Gradients
are averaged over the processes, network by network, of what is trained alone. Of a student of n steps one, k, is drawn
and trained: the path to it has no gradient.

With `accumulate` a process's share goes through the networks in as many parts, to save memory; the step is the same. A
loss that couples rows is then cut at x: the samples are made in parts without gradient, the loss's gradient with
respect to them is taken over all rows at once, and a second pass in parts takes it on to the parameters.

An update whose loss or gradient is not finite on any process leaves weights, batch statistics and optimisers alone
(decided on the device, without a host sync) and is counted. The moving average follows θ̄ ← d θ̄ + (1 − d) θ,
d = min(ema, (1 + n)/(10 + n)), after n earlier updates of the student.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vardistill.denoisers import unguided
from vardistill.devices import computes_in_bf16, find_device
from vardistill.diffusion import Draw, NoiseLevels
from vardistill.errors import UsageError
from vardistill.files import whole
from vardistill.objectives import Objective, Update
from vardistill.objectives.base import STUDENT
from vardistill.objectives.diagnostics import diversities, low_level_share, spread
from vardistill.processes import launched, on_main, several_on_cpu, shielded, synchronise
from vardistill.progress import say
from vardistill.students.student import Student
from vardistill.training import checkpoints, identity
from vardistill.training.books import Books, StopRequest
from vardistill.training.checks import (
    check_networks,
    check_settings,
    check_tracker,
    doubts,
    numbers,
    real_samples,
    trained_networks,
)
from vardistill.training.clock import Clock, phase
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Conditions, Samples
from vardistill.training.draws import DIAGNOSTICS, Drawn, Draws
from vardistill.training.folder import RunFolder
from vardistill.training.optimisers import (
    adam,
    adam_state,
    clip_gradients,
    learning_rate,
    step_unless,
    update_average,
)

Evaluate = Callable[[Student], Mapping[str, float]]
"""Metrics of a student in evaluation mode."""


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
        objective: with its trained networks.
        history: the lines of metrics.
        path: the run folder, or None.
    """

    generator: Student
    objective: Objective
    history: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None


class Trainer:
    """The state of a run and the loop over its steps; see `runs.distill`.

    Attributes:
        networks: the student and the objective's networks, by name; so are `trainable`, their parameters that are not
            frozen, and `optimizers`.
    """

    def __init__(
        self,
        student: Student,
        objective: Objective,
        levels: NoiseLevels,
        training: TrainingConfig,
        evaluate: Evaluate | None = None,
        folder: RunFolder | None = None,
        data: Samples | Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        check_settings(student, objective, levels, training, conditions, launched())
        self.config, self.evaluate, self.folder = training, evaluate, folder
        self.accelerator = _accelerator(training, folder)
        device = find_device(training.device, self.accelerator.device)
        self.mixed = computes_in_bf16(training.precision, device)
        self.student, self.objective = student.to(device), objective.to(device)
        self.networks: dict[str, nn.Module] = {STUDENT: student, **objective.networks}
        with evaluation_mode(*self.networks.values()):  # a check has no part in a batch's statistics
            check_networks(student, objective, conditions)
        parameter = next(student.parameters())
        self.dtype = parameter.dtype
        self.draws = Draws(
            student,
            levels,
            real_samples(data, objective, student, parameter, conditions),
            conditions,
            training.batch,
            training.seed,
            device,
            self.dtype,
        )
        with evaluation_mode(student):
            lines = doubts(objective.teacher and unguided(objective.teacher), student, self.draws.data, conditions)
        for line in lines if self.accelerator.is_main_process else ():
            say(f"warning: {line}")
        self.trainable = {
            name: [p for p in network.parameters() if p.requires_grad] for name, network in self.networks.items()
        }
        if training.compile:
            for network in (*self.networks.values(), objective.teacher, *objective.frozen):
                if isinstance(network, nn.Module):
                    network.compile()
        if self.accelerator.num_processes > 1:
            synchronise([v for n in self.networks.values() for v in (*n.parameters(), *n.buffers())], "first")
        self.average = average_of(student) if training.ema else student
        self.settings = {name: training.settings_of(name) for name in self.networks}
        self.optimizers = {
            name: adam(parameters, self.settings[name])
            for name, parameters in self.trainable.items()
            if name in trained_networks(objective) and (parameters or name == STUDENT)
        }
        self.skipped, self.skipped_before = torch.zeros((), device=device), 0.0
        self.updates, self.evaluations = 0, 0
        self.step, self.clock = 0, Clock(training, self.accelerator)
        self.restored = False
        self.figures: dict[str, Tensor] = {}
        self.statistics = {name: running_statistics(network) for name, network in self.networks.items()}
        self.books, self.stop = Books(folder, self.accelerator), StopRequest(self.accelerator)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics."""
        return self.books.history

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is; see `training.identity`."""
        draws = self.draws
        return identity.identity(self.student, self.objective, draws.levels, draws.data, draws.conditions, self.config)

    def run(self, resume: bool = False) -> Run:
        """Train to the last step or to the end of the budget, and return the result."""
        if resume:
            self.restore()
        elif not self.restored:
            self.books.begin()
            if (folder := self.folder) is not None:
                on_main(lambda: identity.write(folder, self.identity))
        self.clock.start(self.step)
        with self.stop.heeded(), self.books.opened(self.step, self.clock.planned):
            progress = self.clock.progress(self.step)
            while progress < 1:
                self.advance(*phase(self.config, progress))
                before, progress = progress, self.clock.progress(self.step)
                milestone = self._passed(before) < self._passed(progress)
                if milestone or self._due():
                    with self.clock.paused():
                        self._keep_books(progress, milestone)
                self.books.advance(self.step, progress, self.clock.left(self.step))
        return self._finish()

    def advance(self, progress: float, head_start: bool = False) -> None:
        """One step of training, at this progress ∈ [0, 1]; in a head start of the objective's networks alone."""
        self.set_learning_rates(progress)
        number = 0
        for update in self.objective.updates(progress):
            for _ in range(update.repeats):
                frozen = not any(name in self.optimizers for name in update.trains)
                if not (frozen or head_start and update.trains_student):
                    self.update(update, progress, number)
                number += 1
        if not head_start:
            if self.average is not self.student:
                update_average(self.average, self.student, self.config.ema, self.updates)
            self.updates += 1
        self.objective.after_step(progress)
        self.step += 1

    def set_learning_rates(self, progress: float) -> None:
        """Move every optimiser along its schedule."""
        share = learning_rate(self.config, progress)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.settings[name].lr * share

    def update(self, update: Update, progress: float, number: int) -> None:
        """One update on a fresh draw; `number` is its place in the step."""
        statistics = {name: [b.clone() for b in buffers] for name, buffers in self.statistics.items()}
        drawn = self.draw(update, progress, number)
        loss = self.backward(update, drawn)
        trained = {name: self.optimizers[name] for name in update.trains if name in self.optimizers}
        if self.accelerator.num_processes > 1:
            for name in trained:
                synchronise([p.grad for p in self.trainable[name] if p.grad is not None], "mean")
        norms = {name: clip_gradients(optimizer, self.settings[name].clip) for name, optimizer in trained.items()}
        not_finite = self._not_finite(loss, *norms.values())
        step_unless(not_finite, trained.values())
        for optimizer in trained.values():
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffers in self.statistics.items():
                for b, before in zip(buffers, statistics[name], strict=True):  # a variance can overflow alone
                    kept = torch.where((not_finite > 0) | ~b.isfinite(), before, b) if name in update.trains else before
                    b.copy_(kept)
        self.skipped += not_finite
        batch, levels = self.config.batch, update.needs.levels or self.draws.levels
        path = batch * drawn.step + update.needs.pool * (drawn.step - 1)
        self.evaluations += path + update.evaluations(batch, levels.draws)
        self.figures |= {"loss" if update.name == STUDENT else f"{update.name}_loss": loss}
        self.figures |= {f"grad_norm_{name}": norm for name, norm in norms.items()}

    def draw(self, update: Update, progress: float, number: int, student_step: int | None = None) -> Drawn:
        """This process's rows of an update's draw."""
        place = self.accelerator.process_index, self.accelerator.num_processes
        return self.draws(update.needs, progress, self.step, number, *place, student_step)

    def backward(self, update: Update, drawn: Drawn) -> Tensor:
        """Add up the gradients of what the update trains over the draw, part by part, and return the mean loss."""
        self._open(update.trains)
        drawn, parts = self._entered(drawn), self.config.accumulate
        if parts > 1 and update.couples_rows:
            return self._backward_cut(update, drawn, parts)
        total = torch.zeros_like(self.skipped)
        for i in range(parts):
            part = drawn.shard(i, parts) if parts > 1 else drawn
            u = self._latents(part)
            draw = part.complete(self.student, u, self.generate(u, part.step, part.condition), self.generate)
            loss = _mean_loss(update, draw) / parts
            loss.backward()
            total = total + loss.detach()
        return total

    def _backward_cut(self, update: Update, drawn: Drawn, parts: int) -> Tensor:
        """The same for a loss that couples rows, cut at x."""
        shards = [drawn.shard(i, parts) for i in range(parts)]
        with torch.no_grad():
            latents = [self._latents(part) for part in shards]
            samples = [self.generate(u, part.step, part.condition) for u, part in zip(latents, shards, strict=True)]
        x = torch.cat(samples).requires_grad_(update.trains_student)
        loss = _mean_loss(update, drawn.complete(self.student, torch.cat(latents), x, self.generate))
        loss.backward()
        if x.grad is not None:
            for u, part, gradient in zip(latents, shards, x.grad.split([len(u) for u in latents]), strict=True):
                self.generate(u, part.step, part.condition).backward(gradient)
        return loss.detach()

    def _open(self, names: tuple[str, ...]) -> None:
        """Let gradients into the parameters of these networks alone."""
        for name, parameters in self.trainable.items():
            for p in parameters:
                p.requires_grad_(name in names)

    def _latents(self, drawn: Drawn) -> Tensor:
        with torch.no_grad(), self._mixed():
            return drawn.latents(self.student).to(drawn.z.dtype)

    def _entered(self, drawn: Drawn) -> Drawn:
        with torch.no_grad(), self._mixed():
            return drawn.entered(self.student)

    def generate(self, u: Tensor, step: int, condition: Mapping[str, Tensor]) -> Tensor:
        """A step of the student from its latents, in the run's precision; (B, *data) in that of the latents."""
        which = {} if step == 1 else {"step": step}
        with self._mixed():
            x: Tensor = self.student(u, **which, **condition)
        return x.to(u.dtype)

    def _mixed(self) -> torch.autocast:
        return torch.autocast(self.skipped.device.type, torch.bfloat16, enabled=self.mixed)

    def _not_finite(self, *values: Tensor) -> Tensor:
        """1 where one of the scalars is NaN or infinite on any process, else 0."""
        bad = (~torch.stack([v.to(self.skipped) for v in values]).isfinite()).any().float()
        if self.accelerator.num_processes > 1:
            bad = (self.accelerator.reduce(bad, "sum") > 0).float()
        return bad

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
        lr = 0.0 if head_start else self.settings[STUDENT].lr * learning_rate(self.config, within)
        values = self._values(within) | {"lr": lr, "progress": 0.0 if head_start else within}
        values |= {"skipped": float(self.skipped)}
        self.books.warn(self.step, values)
        self._record("train", values)
        skipped = float(self.skipped) - self.skipped_before
        if skipped > self.config.max_skipped:
            self._save()
            remedy = "a smaller lr or clip, or a larger smallest noise level"
            raise Diverged.after(skipped, self.step, self.config.max_skipped, remedy)

    def _values(self, progress: float) -> dict[str, float]:
        """The last updates' figures, the objective's diagnostics and the levels' quantiles, meaned over processes."""
        with evaluation_mode(*self.networks.values()):
            draw = self.diagnostic_draw(progress)
            tensors = self.figures | self.objective.measure(draw) | self._diagnostics(draw)
        ratio = draw.noise.sigma / draw.noise.alpha
        tensors |= {f"ratio_{percent:02d}": ratio.quantile(percent / 100) for percent in (5, 50, 95)}
        stacked = torch.stack([v.to(ratio) for v in tensors.values()])
        return dict(zip(tensors, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _diagnostics(self, draw: Draw) -> dict[str, Tensor]:
        """What is worth watching under every objective."""
        rng = torch.Generator(self.skipped.device).manual_seed(self.step)
        target = self.objective.teacher and unguided(self.objective.teacher)
        own = {"spread": spread(draw, self.student.data_std)}
        return (
            own
            | diversities(draw, target, self.student.data_std, rng)
            | {
                f"{term.prefix}low_level_share": low_level_share(term.objective.generator_loss, term.draw)
                for term in self.objective.terms(draw)
            }
        )

    @torch.no_grad()
    def diagnostic_draw(self, progress: float) -> Draw:
        """A draw of the student's last step from a stream of its own, so that logging does not change the run."""
        *_, update = self.objective.updates(progress)
        drawn = self._entered(self.draw(update, progress, DIAGNOSTICS, self.student.steps))
        u = self._latents(drawn)
        return drawn.complete(self.student, u, self.generate(u, drawn.step, drawn.condition), self.generate)

    def _evaluate(self) -> None:
        measure = self.evaluate
        if measure is None:
            return
        self.books.measuring()
        with evaluation_mode(self.student):
            values = on_main(lambda: numbers(measure(self.average)))
        if values is not None:
            self._record("eval", values)
            self.books.warn(self.step, {"kind": "eval", **values})

    def _record(self, kind: str, values: dict[str, float]) -> None:
        costs = {"cpu_seconds": self.clock.cpu_elapsed(), "network_evaluations": float(self.evaluations)}
        self.books.record(kind, self.step, self.clock.elapsed(), costs | values)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by section; the run's own tensors, not copies."""
        tensors = {f"network.{name}": dict(network.state_dict()) for name, network in self.networks.items()}
        tensors |= {f"optimizer.{name}": adam_state(o) for name, o in self.optimizers.items()}
        tensors["counters"] = {
            "skipped": self.skipped,
            "updates": torch.tensor(self.updates),
            "network_evaluations": torch.tensor(self.evaluations),
            "cpu_seconds": torch.tensor(self.clock.cpu_elapsed()),
        }
        if self.average is not self.student:
            tensors["average"] = dict(self.average.state_dict())
        return tensors

    def _save(self) -> None:
        """Keep a checkpoint; it is complete when any process goes on."""
        if self.folder is None:
            return
        folder, state = self.folder, checkpoints.State(self.step, self.clock.elapsed(), self._tensors())
        on_main(lambda: checkpoints.save(folder.checkpoints, state, self.config.keep_checkpoints))

    def restore(self) -> None:
        """Go on from the folder's latest checkpoint.

        Raises:
            UsageError: for a checkpoint that is damaged or of another run, or a run that has so many steps already.
        """
        folder = self.folder
        assert folder is not None
        on_main(lambda: checkpoints.set_aside_damaged(folder.checkpoints))
        state = checkpoints.load(checkpoints.latest(folder.checkpoints), self.skipped.device)
        levels = self.draws.levels
        told = on_main(lambda: identity.changes(folder, self.identity, state.step, self.objective, levels))
        checkpoints.restore(state, self._tensors())
        on_main(lambda: identity.write(folder, self.identity))
        for line in told or ():
            print(f"vardistill: {line}", file=sys.stderr)
        self.step, self.skipped_before = state.step, float(self.skipped)
        counters = state.tensors["counters"]
        self.clock.spent, self.clock.cpu_spent = state.seconds, float(counters["cpu_seconds"])
        self.updates, self.evaluations = int(counters["updates"]), int(counters["network_evaluations"])
        self.books.resume(self.step)
        self.restored = True

    def _finish(self) -> Run:
        self._open(tuple(self.networks))
        student, folder = self.average.eval(), self.folder
        for network in self.networks.values():
            network.eval()
        if folder is not None:
            on_main(lambda: save_student(student, folder.generator))
        return Run(student, self.objective, self.history, folder.path if folder else None)


def _mean_loss(update: Update, draw: Draw) -> Tensor:
    """The mean loss over a draw's rows; raises UsageError for a loss that has not one value per row."""
    loss = update.loss(draw)
    if loss.shape != draw.noise.t.shape:
        raise UsageError(f"an objective returns one value per row, ({len(draw.z)},), but got {tuple(loss.shape)}")
    return loss.mean()


def average_of(student: Student) -> Student:
    """A copy to hold the moving average; it shares the parameters that are not trained."""
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    return copy.deepcopy(student, frozen).eval().requires_grad_(False)


def save_student(student: Student, path: Path) -> None:
    """The weights as safetensors, with the configuration that loads them where the student is a hub mixin."""
    with whole(path, folder=True) as partial:
        if isinstance(student, PyTorchModelHubMixin):
            student.save_pretrained(partial)
        else:
            save_model(student, str(partial / "model.safetensors"))


def silence(*modules: nn.Module) -> None:
    """Evaluation mode but for batch normalisation, whose statistics are learned.

    Whatever else is random in training mode (dropout also of attention and recurrent layers, dropped paths) would draw
    numbers that come from neither the run's seed nor its checkpoints.
    """
    for module in modules:
        module.eval()
        for child in module.modules():
            if isinstance(child, _BatchNorm):
                child.train()


def running_statistics(*modules: nn.Module) -> list[Tensor]:
    """What a forward pass changes in training mode: the statistics of batch normalisation."""
    norms = [child for module in modules for child in module.modules() if isinstance(child, _BatchNorm)]
    return [b for norm in norms if norm.training for b in norm.buffers()]


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode within, also of batch normalisation."""
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        silence(*modules)


def _accelerator(training: TrainingConfig, folder: RunFolder | None) -> Accelerator:
    tracker = None if folder is None or training.tracker == "none" else training.tracker
    if tracker is not None:
        check_tracker(training)
    with shielded():
        return Accelerator(
            cpu=several_on_cpu(training.device),
            mixed_precision="no",
            log_with=tracker,
            project_dir=None if folder is None else str(folder.path),
        )
