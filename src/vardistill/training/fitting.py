"""The loop that fits a teacher, of points or of pictures.

A step whose loss or gradient is not finite leaves weights and optimiser alone and is counted, as in `training`. The
moving average is also that of `training`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vardistill.files import write_whole
from vardistill.progress import bar, clock
from vardistill.training import checkpoints, config_files
from vardistill.training.books import StopRequest
from vardistill.training.clock import time_left
from vardistill.training.config import TrainingConfig
from vardistill.training.draws import stream
from vardistill.training.folder import RunFolder, create, environment, open_run
from vardistill.training.loop import Diverged, Interrupted
from vardistill.training.optimisers import adam, adam_state, clip_gradients, learning_rate, step_unless, update_average

D = TypeVar("D", bound=nn.Module)


def begin(config: object, out: Path, resume: bool) -> RunFolder:
    """The folder of a fit with what it keeps as its configuration, or the one to resume.

    Raises:
        UsageError: for a folder that cannot be used.
    """
    if resume:
        return open_run(out)
    folder = create(out)
    with folder.held():
        write_whole(folder.environment, json.dumps(environment(), indent=2))
        config_files.write(config, folder.config)
    return folder


class Fit(Generic[D]):
    """The state of a fit and its steps.

    Args:
        denoiser: to fit, in place.
        loss: of a denoiser, at the progress ∈ [0, 1], on a batch drawn with a generator of random numbers; a scalar.
        training: steps, budget, learning rate, clip, moving average, seed, and what the run keeps.

    Attributes:
        denoiser: as given.
        average: the moving average of its weights, in evaluation mode: the result.
        optimizer: of its weights.
        device: of its weights.
        step: finished steps.
        skipped: how many of them were skipped.
    """

    def __init__(
        self, denoiser: D, loss: Callable[[D, float, torch.Generator], Tensor], training: TrainingConfig
    ) -> None:
        self.denoiser, self.loss, self.config = denoiser, loss, training
        self.average = copy.deepcopy(denoiser).eval().requires_grad_(False)
        self.optimizer = adam(denoiser.parameters(), training)
        self.device = next(denoiser.parameters()).device
        self.skipped, self.skipped_before = torch.zeros((), device=self.device), 0.0
        self.step, self.spent, self.started = 0, 0.0, self._now()

    def run(self, config: object, out: Path, resume: bool, name: str, save: Callable[[D, Path], None]) -> RunFolder:
        """Fit in the run folder `out`.

        Args:
            config: what the folder keeps as its configuration.
            out: a new or empty folder, or the one to resume.
            resume: go on from the latest checkpoint.
            name: of the file or folder of the finished denoiser.
            save: writes it, whole or not at all.

        Raises:
            UsageError: for a folder that cannot be used, or a checkpoint that is damaged or of another fit.
            Interrupted: after Ctrl-C, with a checkpoint kept.
            Diverged: after too many skipped steps, with a checkpoint kept, or for a denoiser that is not finite.
        """
        folder = begin(config, out, resume)
        finished = folder.path / name
        with folder.held():
            if finished.exists() or any(folder.checkpoints.glob("step-*")):  # else killed before: it starts anew
                checkpoints.set_aside_damaged(folder.checkpoints)
                self.restore(checkpoints.latest(folder.checkpoints))
            folder.rewind(self.step)
            if not finished.exists():  # its end: a clock's budget, read from a checkpoint, may say otherwise
                self._train(folder)
                save(self.average, finished)
        return folder

    def _train(self, folder: RunFolder) -> None:
        """Fit to the last step or to the end of the budget, with lines of metrics and checkpoints."""
        stop = StopRequest()
        with stop.heeded():
            for progress in self._progress():
                loss = self.advance(progress)
                if self.step % self.config.log_every == 0:
                    values = {"loss": float(loss), "skipped": float(self.skipped)}
                    folder.log("train", self.step, self._elapsed(), values)
                    self._check_skipped(folder)
                if self.step % self.config.checkpoint_every == 0 or stop.made:
                    self._keep(folder)
                if stop.made:
                    raise Interrupted(f"stopped at step {self.step}")
        self._keep(folder)
        self._check_skipped(folder)
        self._check_finite()

    def _progress(self) -> Iterator[float]:
        """The run's progress before each step, until the steps or the budget are spent."""
        total = self.config.steps if self.config.max_minutes is None else None
        started, first = time.monotonic(), self._shares()
        with bar(total=total, initial=self.step, unit="steps", name="teacher") as shown:
            while (progress := max(shares := self._shares())) < 1:
                shown.set_postfix_str(f"{clock(time_left(time.monotonic() - started, first, shares))} left", False)
                yield progress
                if total is None and progress > 0:
                    shown.total = max(round(self.step / progress), self.step)
                shown.update()

    def _shares(self) -> list[float]:
        """Of the steps and, with one, of the budget: how much is spent."""
        by_steps, minutes = self.step / self.config.steps, self.config.max_minutes
        return [by_steps] if minutes is None else [by_steps, self._elapsed() / (60 * minutes)]

    def advance(self, progress: float) -> Tensor:
        """One update; returns its loss."""
        self.optimizer.param_groups[0]["lr"] = self.config.lr * learning_rate(self.config, progress)
        rng = stream(self.config.seed, self.step, 0, 0, self.device)  # of this step alone: no state to keep
        loss = self.loss(self.denoiser, progress, rng)
        loss.backward()
        norm = clip_gradients(self.optimizer, self.config.clip)
        not_finite = (~(loss.isfinite() & norm.isfinite())).float()
        step_unless(not_finite, [self.optimizer])
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not_finite
        update_average(self.average, self.denoiser, self.config.ema, self.step)
        self.step += 1
        return loss.detach()

    def _check_skipped(self, folder: RunFolder) -> None:
        """Raise Diverged, with a checkpoint kept, after too many skipped steps since the fit was started or resumed."""
        skipped = float(self.skipped) - self.skipped_before
        if skipped > self.config.max_skipped:
            self._keep(folder)
            raise Diverged.after(skipped, self.step, self.config.max_skipped, "a smaller lr")

    @torch.no_grad()
    def _check_finite(self) -> None:
        """Raise Diverged where the average or a loss of it is not finite: a short fit has few steps to skip."""
        rng = torch.Generator(self.device).manual_seed(self.config.seed)
        loss = self.loss(self.average, 1.0, rng)
        if not all(bool(v.isfinite().all()) for v in (loss, *self.average.parameters())):
            raise Diverged(f"the teacher is not finite after step {self.step}: try a smaller lr")

    def _now(self) -> float:
        return time.process_time() if self.config.clock == "cpu" else time.monotonic()

    def _elapsed(self) -> float:
        """Seconds spent, by the configuration's clock."""
        return self.spent + self._now() - self.started

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "denoiser": dict(self.denoiser.state_dict()),
            "average": dict(self.average.state_dict()),
            "optimizer": adam_state(self.optimizer),
            "counters": {"skipped": self.skipped},
        }

    def state(self) -> checkpoints.State:
        """Everything that the fit needs to go on."""
        return checkpoints.State(self.step, self._elapsed(), self._tensors())

    def _keep(self, folder: RunFolder) -> None:
        """Write a checkpoint."""
        checkpoints.save(folder.checkpoints, self.state(), self.config.keep_checkpoints)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; raises UsageError where it is damaged or of another fit."""
        state, own = checkpoints.load(path, self.device), self._tensors()
        checkpoints.restore(state, own)
        self.skipped_before = float(self.skipped)
        self.step, self.spent, self.started = state.step, state.seconds, self._now()
