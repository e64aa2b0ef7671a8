"""Complete, atomic checkpoints without pickle.

A checkpoint is a folder `step-00001000` with `state.safetensors` (weights, optimisers, average) and
`state.json` (counters, and the former's digest). It is written under another name, flushed to disk and renamed: it
exists whole or not at all, and what a disk did to it later is found by the digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardistill.errors import UsageError, first_line
from vardistill.files import PARTIAL, remove, whole
from vardistill.progress import say

FORMAT = "vardistill-checkpoint-3"
BLOCK = 1 << 20
"""Bytes that are read at a time for a digest."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class State:
    """Everything that a run needs to go on as if it had not stopped.

    Attributes:
        step: finished steps.
        seconds: wall-clock time spent so far.
        tensors: sections (`network.*`, `optimizer.*`, `average`, `counters`) of named tensors.
    """

    step: int
    seconds: float
    tensors: dict[str, dict[str, Tensor]]


def save(folder: Path, state: State, keep: int) -> Path:
    """Write `state` below `folder`, remove all but the `keep` latest checkpoints, and return the new one's path.

    A checkpoint of the same step is left as it is: a run has one state at a step.

    Raises:
        UsageError: where it cannot be written, the disk being full for example; those before it stay.
    """
    target = folder / f"step-{state.step:08d}"
    if target.exists():
        return target
    for remnant in folder.glob(f"{PARTIAL}*"):  # of a process that was killed
        remove(remnant)
    flat = {f"{section}/{name}": _copy(v) for section, part in state.tensors.items() for name, v in part.items()}
    with whole(target, folder=True) as partial:
        save_file(flat, partial / "state.safetensors", metadata={"format": FORMAT})
        counters = {"format": FORMAT, "step": state.step, "seconds": state.seconds, "sha256": _digest(partial)}
        (partial / "state.json").write_text(json.dumps(counters))
    for old in _all(folder)[:-keep]:
        remove(old)
    return target


def latest(folder: Path) -> Path:
    """The checkpoint with the most steps; raises UsageError where there is none."""
    found = _all(folder)
    if not found:
        raise UsageError(f"nothing to resume: no checkpoint in {folder}")
    return found[-1]


def set_aside_damaged(folder: Path) -> None:
    """Rename the latest checkpoints, and say so, as long as they are damaged and one before them is whole."""
    found = _all(folder)
    last = next((i for i, path in reversed(list(enumerate(found))) if _is_whole(path)), len(found))
    for path in found[last + 1 :]:
        aside = path.with_name(f"damaged-{path.name}")
        remove(aside)
        path.rename(aside)
        say(f"vardistill: the checkpoint {path} is damaged, and now {aside.name}: going back to {found[last].name}")


def _is_whole(checkpoint: Path) -> bool:
    """Whether its counters can be read, and its tensors are those that were written."""
    try:
        counters = json.loads((checkpoint / "state.json").read_text())
        with safe_open(checkpoint / "state.safetensors", "pt"):
            return bool(counters.get("sha256", digest := _digest(checkpoint)) == digest)
    except (OSError, SafetensorError, ValueError, AttributeError):
        return False


def _digest(checkpoint: Path) -> str:
    """SHA-256 of the tensors' file."""
    found = hashlib.sha256()
    with (checkpoint / "state.safetensors").open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def load(checkpoint: Path, device: torch.device | str = "cpu") -> State:
    """Read a checkpoint.

    Raises:
        UsageError: where it is truncated, not one of ours, or a link that leaves its run.
    """
    for path in (checkpoint, checkpoint / "state.json", checkpoint / "state.safetensors"):
        if not path.resolve().is_relative_to(checkpoint.parent.resolve()):
            raise UsageError(f"{path} leads out of its run folder: refused")
    try:
        counters = json.loads((checkpoint / "state.json").read_text())
        flat = load_file(checkpoint / "state.safetensors", device=str(device))
        step, seconds, form = int(counters["step"]), float(counters["seconds"]), counters["format"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise UsageError(f"the checkpoint {checkpoint} is truncated or not one of vardistill's: {reason}") from error
    if form == FORMAT and counters.get("sha256", digest := _digest(checkpoint)) != digest:
        raise UsageError(
            f"the checkpoint {checkpoint} is damaged: its tensors are not those that were written; delete it to go on "
            "from the one before"
        )
    if form != FORMAT:
        raise UsageError(
            f"the checkpoint {checkpoint} has format {form!r}, but this version reads {FORMAT!r}: start the run anew, "
            "or go on with the version that wrote it"
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, v in flat.items():
        section, _, key = name.partition("/")
        tensors.setdefault(section, {})[key] = v
    return State(step, seconds, tensors)


@torch.no_grad()
def restore(state: State, own: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy a checkpoint's tensors into a run's own.

    Raises:
        UsageError: where the checkpoint is of another run; nothing is changed then.
    """
    for section in own.keys() | state.tensors.keys():
        match(section, state.tensors.get(section, {}), own.get(section, {}))
    for section, tensors in own.items():
        for name, v in tensors.items():
            v.copy_(state.tensors[section][name])


def match(section: str, loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise UsageError unless `loaded` has the names, shapes and dtypes of `own`."""
    if loaded.keys() != own.keys():
        name = min(loaded.keys() ^ own.keys())
        owner = "the checkpoint lacks" if name in own else "only the checkpoint has"
        raise UsageError(f"the checkpoint is of another model: {owner} {section} '{name}'")
    for name, v in own.items():
        if (loaded[name].shape, loaded[name].dtype) != (v.shape, v.dtype):
            raise UsageError(
                f"the checkpoint is of another model: {section} '{name}' is {tuple(loaded[name].shape)} of "
                f"{loaded[name].dtype} there and {tuple(v.shape)} of {v.dtype} here"
            )


def _all(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in the order of their steps."""
    found = {int(name[1]): path for path in folder.glob("step-*") if (name := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _copy(v: Tensor) -> Tensor:
    """The tensor on the host, of its own storage, as the file format asks for (tied weights share theirs).

    It is copied straight there: an accelerator has no room for a second state.
    """
    return torch.empty(v.shape, dtype=v.dtype).copy_(v.detach())
