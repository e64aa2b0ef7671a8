"""Run folders: what a run leaves behind.

.lock               held by the process that is at work
config.yaml         the resolved configuration (runs started by the command line)
identity.json       what the run is, which a resumed one is compared with: see `training.identity`
metrics.jsonl       one JSON object a line: kind "train" or "eval", step, seconds and values
checkpoints/        complete states, for resuming
generator/          the finished generator: safetensors and config.json
environment.json    versions, hardware, threads
teacher/            the teacher's own run, where it was fitted on the way
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import yaml

from vardistill.errors import UsageError, first_line
from vardistill.files import locked, reason, typed, write_whole
from vardistill.launch import is_first

UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RecursionError, BadZipFile, yaml.YAMLError,
)  # fmt: skip
"""What truncated and foreign files raise."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def identity(self) -> Path:
        """What the run is."""
        return self.path / "identity.json"

    @property
    def metrics(self) -> Path:
        """The log of values."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def generator(self) -> Path:
        """The folder of the finished generator."""
        return self.path / "generator"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def teacher(self) -> Path:
        """The folder of a teacher fitted on the way."""
        return self.path / "teacher"

    @property
    def tracker_id(self) -> Path:
        """What a tracker knows the run by."""
        return self.path / "tracker_id.txt"

    @property
    def lock(self) -> Path:
        """What the run holds while it is at work."""
        return self.path / ".lock"

    @property
    def kept(self) -> bool:
        """Whether there is anything that a new run would lose; a start that failed leaves nothing of it."""
        found = set(self.path.iterdir())
        if self.lock not in found or any(self.checkpoints.glob("step-*")):
            return bool(found)
        traces = {self.lock, self.config, self.identity, self.environment, self.metrics, self.tracker_id}
        return bool(found - traces - {self.checkpoints, self.path / "logs"})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no other run work in the folder; of several processes the first one holds it for all.

        Raises:
            UsageError: where another run is at work in it.
        """
        if not (is_first() and self.path.is_dir()):
            yield
            return
        with locked(self.lock, f"another process is at work in {self.path}: wait for it, or end it"):
            yield

    def log(self, kind: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append a line to the metrics; numbers that are not finite, which JSON lacks, become null.

        Raises:
            UsageError: where it cannot be written.
        """
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, "seconds": seconds, **finite}) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {self.metrics}: {reason(error)}") from error

    def history(self) -> list[dict[str, Any]]:
        """The lines of the metrics; a last line cut short by a kill is left out.

        Raises:
            UsageError: where they cannot be read.
        """
        if not self.metrics.exists():
            return []
        lines = []
        try:
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        except UNREADABLE as error:
            raise UsageError(f"cannot read {self.metrics}: {first_line(error)}") from error
        return lines

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run will write again.

        Raises:
            UsageError: for metrics that cannot be read, or have other lines.
        """
        lines = self.history()
        for number, line in enumerate(lines, 1):
            if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
                raise UsageError(f"line {number} of {self.metrics} is none of a run, as it has no step: remove it")
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
        write_whole(self.metrics, "".join(kept))


def create(path: Path) -> RunFolder:
    """A new run folder; of several processes the first one makes it for all.

    Args:
        path: does not exist, is an empty folder, or what a start left that failed.

    Raises:
        UsageError: where the folder is not empty or cannot be written.
    """
    folder = RunFolder(path)
    if not is_first():
        return folder
    try:
        path.mkdir(parents=True, exist_ok=True)
        if folder.kept:
            raise UsageError(
                f"the run folder {path} is not empty: choose another with --out, or go on with --resume {typed(path)}"
            )
        probe = path / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write the run folder {path}: {reason(error)}") from error
    return folder


def open_run(path: Path) -> RunFolder:
    """An existing run folder; raises UsageError where `path` is none."""
    run = RunFolder(path)
    if not path.is_dir():
        there = "it is a file" if path.exists() else "there is no such folder"
        raise UsageError(f"{path} is not a run folder: {there}")
    if not (run.config.is_file() or run.identity.is_file()):
        raise UsageError(f"{path} is not a run folder: it has no {run.config.name}")
    return run


def environment() -> dict[str, Any]:
    """Versions, hardware and threads, for figures that can be traced."""
    import torch

    packages = ("vardistill", "torch", "accelerate", "zuko", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
