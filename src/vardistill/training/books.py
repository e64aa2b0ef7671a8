"""The books of a run: its lines of metrics, warning signs and progress bar; and the wish to stop it."""

from __future__ import annotations

import json
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from vardistill.files import remove, write_whole
from vardistill.progress import bar, clock, fitting, say
from vardistill.training.folder import RunFolder, environment
from vardistill.training.warning_signs import Watch

LIVE_FIGURES = ("fd", "log_mmd", "modes_found", "loss", "bound", "log_density")
"""Scalars in the progress bar, as many of them as have a place there."""


class Books:
    """What a run tells of itself; the main process keeps it.

    Args:
        folder: of the run; None keeps nothing on disk.
        accelerator: knows the processes and the trackers.

    Attributes:
        history: the lines of metrics.
        watch: over the warning signs in them.
        bar: steps and live figures.
        live: these figures, by name.
    """

    def __init__(self, folder: RunFolder | None, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.history: list[dict[str, Any]] = []
        self.watch = Watch()
        self.bar: Any = None
        self.live: dict[str, str] = {}

    def begin(self) -> None:
        """Note what the run is made with; lines that a start left that failed go."""
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.rewind(-1)
            remove(self.folder.tracker_id)
            facts = environment() | {"processes": self.accelerator.num_processes}
            write_whole(self.folder.environment, json.dumps(facts, indent=2))

    def resume(self, step: int) -> None:
        """Go on from the lines up to this step; those after it are dropped."""
        if self.folder is not None and self.accelerator.is_main_process:
            self.folder.rewind(step)
            self.history = self.folder.history()
            self.watch = Watch(self.history)

    @contextmanager
    def opened(self, step: int, steps: int | None) -> Iterator[None]:
        """Show the progress bar and start the trackers, and write out what they hold however the run ends.

        Where the bar ends in a file it has few lines.

        Args:
            step: finished steps.
            steps: of the whole run; None where a budget ends it, until `advance` tells.
        """
        if self.folder is not None and self.accelerator.log_with:
            self._start_tracker(self.folder, step)
        try:
            with bar(total=steps, initial=step, unit="steps") as self.bar:
                yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def advance(self, step: int, progress: float, left: float) -> None:
        """Move the progress bar to `step`; its total is the steps that the run will have at this pace.

        Args:
            step: finished steps.
            progress: of the run, in [0, 1]: steps done or time spent.
            left: seconds to its end.
        """
        if progress > 0:
            self.bar.total = max(round(step / progress), step)
        self.bar.set_postfix_str(fitting([f"{clock(left)} left", *self.figures()]), refresh=False)
        self.bar.update(step - self.bar.n)

    def measuring(self) -> None:
        """Say that the bar stands still because the student is measured."""
        if sys.stderr.isatty():
            self.bar.set_postfix_str("measuring")

    def figures(self) -> list[str]:
        """Signs that are there, then what was last measured."""
        signs = [f"sign {sign.name}" for sign in self.watch.signs]
        return signs + [f"{name} {self.live[name]}" for name in LIVE_FIGURES if name in self.live]

    def _start_tracker(self, folder: RunFolder, step: int) -> None:
        """Start the run's tracker, where a resumed run goes on with the curves that it had.

        TensorBoard's points after the step are dropped, as its event files only grow. wandb knows the run by an id that
        is kept in the folder, trackio by its name.
        """
        name = str(self.accelerator.log_with[0])
        if name == "tensorboard":
            self.accelerator.init_trackers("logs", init_kwargs={name: {"purge_step": step + 1}})
            return
        options: dict[str, str] = {}
        if self.accelerator.is_main_process:
            run, known = folder.path.resolve().name, tracker_id(folder)
            own = {"name": run, "id": known} if name == "wandb" else {"name": f"{run}-{known}"}
            options = own | {"resume": "allow"}
        self.accelerator.init_trackers("vardistill", init_kwargs={name: options})

    def record(self, kind: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Add a line of metrics, "train" or "eval"."""
        if not self.accelerator.is_main_process:
            return
        self.history.append({"kind": kind, "step": step, "seconds": seconds, **values})
        if self.folder is not None:
            self.folder.log(kind, step, seconds, values)
            self.accelerator.log({f"{kind}/{name}": v for name, v in values.items()}, step=step)
        self.live |= {name: f"{values[name]:.4g}" for name in LIVE_FIGURES if name in values}

    def warn(self, step: int, values: Mapping[str, Any]) -> None:
        """Tell of signs that are new, and name those that are there in the progress bar."""
        for sign in self.watch.observe({"step": step, **values}):
            if self.accelerator.is_main_process:
                say(f"warning: {sign}")


def tracker_id(folder: RunFolder) -> str:
    """What a tracker knows the run by: drawn once, and kept in the folder."""
    if not folder.tracker_id.exists():
        write_whole(folder.tracker_id, secrets.token_hex(4))
    return folder.tracker_id.read_text(encoding="utf-8").strip()


class StopRequest:
    """The wish to stop a run after the step under way: SIGINT (Ctrl-C), SIGTERM, or SIGHUP (the terminal is gone).

    Args:
        accelerator: knows the run's processes; None for one process.

    Attributes:
        made: whether this process was asked.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator, self.made = accelerator, False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take the first signal as a wish.

        A second one stops a run of one process at once; launchers of several pass the first one on twice.
        """

        def request(number: int, frame: FrameType | None) -> None:
            if self.made and (self.accelerator is None or self.accelerator.num_processes == 1):
                raise KeyboardInterrupt
            self.made = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, "SIGHUP", None)  # which Windows lacks, and nohup has ignored
        if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
            numbers.append(hang_up)
        previous = {number: signal.signal(number, request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked; all have to call this together."""
        if self.accelerator is None:
            return self.made
        wishes = torch.tensor(float(self.made), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wishes, "sum") > 0)
