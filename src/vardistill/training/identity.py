"""What a run is, as plain data that it keeps and that a resumed run is compared with.

Objects are described by their class and those arguments of its constructor that they keep under the same names. What no
name tells of a function is said by values: a teacher's E[x | x_t] at fixed points, a weight at fixed levels. Weights
of frozen networks and stored sets have a digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.diffusion import Denoiser, NoiseLevels
from vardistill.errors import UsageError, first_line
from vardistill.files import write_whole
from vardistill.objectives import Objective, WeightedSum
from vardistill.students.student import Student
from vardistill.training.checks import two_conditions
from vardistill.training.config import TrainingConfig
from vardistill.training.config_files import from_dict, plain, to_dict
from vardistill.training.data import Conditions, Samples, StoredSamples
from vardistill.training.folder import UNREADABLE, RunFolder
from vardistill.training.optimisers import learning_rate

DEPTH = 4
"""Of objects in objects that are described."""

LISTED = 32
"""Numbers that are listed one by one, at most; longer lists have a digest."""

ALIKE = 0.02
"""How far values may be apart, as a share of the largest: those of other hardware and precisions are."""

MENDABLE = {
    "steps", "max_minutes", "clock", "lr", "auxiliary_lr", "networks", "beta1", "beta2", "weight_decay", "lr_schedule",
    "lr_final", "warmup", "clip", "ema", "precision",
}  # fmt: skip
"""Settings that a run may go on with others of: its numbers change, and it says so."""

BOOKS = {
    "accumulate", "log_every", "eval_every", "checkpoint_every", "milestones", "keep_checkpoints", "eval_samples",
    "max_skipped", "device", "compile", "tracker",
}  # fmt: skip
"""Settings that leave its numbers alone. With all others (seed, batch, head start) it is another run."""


def identity(
    student: Student,
    objective: Objective,
    levels: NoiseLevels,
    data: Samples | None,
    conditions: Conditions | None,
    training: TrainingConfig,
) -> dict[str, Any]:
    """What a run is, as JSON has it."""
    teacher = objective.teacher
    said = {
        "student": kind_of(student)
        | arguments(student, DEPTH - 1)
        | {name: getattr(student, name) for name in ("latent_shape", "data_shape", "data_std", "classes", "steps")}
        | {"parameters": sum(p.numel() for p in student.parameters())},
        "teacher": None if teacher is None else teacher_of(teacher, student, conditions),
        "objective": objective_of(objective),
        "levels": levels_of(levels),
        "data": None if data is None else described(data),
        "conditions": None if conditions is None else described(conditions),
        "training": to_dict(training),
    }
    return dict(json.loads(json.dumps(plain(said))))


def objective_of(objective: Objective) -> dict[str, Any]:
    """An objective with its networks and, of a sum, its parts."""
    if isinstance(objective, WeightedSum):
        parts = [
            {
                "objective": objective_of(part.objective),
                "weight": [part.weight_at(progress) for progress in (0.0, 0.5, 1.0)],
                "levels": None if part.levels is None else levels_of(part.levels),
            }
            for part in objective.summands
        ]
        return kind_of(objective) | {"parts": parts}
    said = kind_of(objective) | arguments(objective, DEPTH - 1)
    for name in ("teacher", *objective.networks):
        said.pop(name, None)
    networks = {name: described(network) for name, network in objective.networks.items()}
    frozen = [digest(module.state_dict()) for module in objective.frozen]
    return said | ({"networks": networks} if networks else {}) | ({"frozen": frozen} if frozen else {})


def levels_of(levels: NoiseLevels) -> dict[str, Any]:
    """Noise levels, with their weight at the ratios 0.1, 1 and 10 times σ = 1."""
    ratio = torch.tensor([0.1, 1.0, 10.0])
    return kind_of(levels) | arguments(levels, DEPTH - 1) | {"weight": levels.weight(torch.ones(3), ratio).tolist()}


@torch.no_grad()
def teacher_of(teacher: Denoiser, student: Student, conditions: Conditions | None) -> dict[str, Any]:
    """A teacher, the digest of its weights and its E[x | x_t] at two points and three times: mean and deviation."""
    like = next(student.parameters())
    x = torch.linspace(-1, 1, 2 * math.prod(student.data_shape), dtype=like.dtype, device=like.device)
    x_t = student.data_std * x.view(2, *student.data_shape)
    condition, answers = two_conditions(student, conditions), []
    for t in (0.1, 0.4, 0.7):
        out = teacher(x_t, torch.full((2,), t, dtype=like.dtype, device=like.device), **condition).double()
        answers += [float(out.mean()), float(out.std())]
    weights = teacher.state_dict() if isinstance(teacher, nn.Module) else {}
    said = kind_of(teacher) | arguments(teacher, DEPTH - 1)
    return said | ({"digest": digest(weights)} if weights else {}) | {"answers": answers}


def described(value: Any, depth: int = DEPTH) -> Any:
    """A value as plain data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return shown(value)
    if isinstance(value, StoredSamples):
        labels = {} if value.labels is None else {"labels": digest({"labels": value.labels})}
        return {
            "kind": "StoredSamples",
            "shape": list(value.data.shape),
            "digest": digest({"data": value.data}),
        } | labels
    if isinstance(value, Mapping):
        return {str(name): described(v, depth - 1) for name, v in value.items()}
    if isinstance(value, Sequence):
        if len(value) > LISTED:
            return f"{len(value)} values {hashlib.sha256(repr(tuple(value)).encode()).hexdigest()[:12]}"
        return [described(v, depth - 1) for v in value]
    if inspect.ismethod(value):
        return f"{type(value.__self__).__name__}.{value.__name__}"
    if inspect.isroutine(value):
        return value.__qualname__
    return kind_of(value) | (arguments(value, depth - 1) if depth else {})


def kind_of(value: object) -> dict[str, Any]:
    """An object's class."""
    return {"kind": type(value).__name__}


def arguments(value: Any, depth: int) -> dict[str, Any]:
    """The arguments of an object's constructor that it keeps; of a network that is not this library's its size."""
    ours = type(value).__module__.startswith("vardistill.") or isinstance(value, Objective)
    said: dict[str, Any] = {}
    if ours or dataclasses.is_dataclass(value):
        names = [name for name in inspect.signature(type(value)).parameters if hasattr(value, name)]
        said = {name: described(getattr(value, name), depth) for name in names}
    if isinstance(value, nn.Module) and not said:
        said = {"parameters": sum(p.numel() for p in value.parameters())}
    return said


def shown(v: Tensor) -> Any:
    """A tensor's numbers where they are few, else its shape."""
    return v.tolist() if v.numel() <= LISTED else f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of SHA-256 over names, types, shapes and values."""
    found = hashlib.sha256()
    for name, v in sorted(tensors.items()):
        found.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        found.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def differences(kept: Any, own: Any, where: str = "") -> dict[str, str]:
    """Where two identities differ, and how, in words."""
    if not (isinstance(kept, dict) and isinstance(own, dict)):
        same = kept == own or (where == "teacher.answers" and alike(kept, own))
        return {} if same else {where: f"was {brief(kept)} and is {brief(own)}"}
    if kept.get("kind") != own.get("kind"):
        return {where: f"was {brief(kept)} and is {brief(own)}"}
    found: dict[str, str] = {}
    for name in kept | own:
        found |= differences(kept.get(name), own.get(name), f"{where}.{name}" if where else name)
    return found


def alike(kept: Any, own: Any) -> bool:
    """Whether two lists of numbers are the same but for rounding."""
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (kept, own))
    return a.shape == b.shape and bool((a - b).abs().max() <= ALIKE * b.abs().max())


def brief(value: Any) -> str:
    """A value for an error's line."""
    if isinstance(value, dict):
        return str(value.get("kind", "another"))
    return "none" if value is None else str(value) if len(str(value)) < 60 else f"{str(value)[:57]}..."


def moved_schedules(
    before: TrainingConfig, after: TrainingConfig, step: int, objective: Objective, levels: NoiseLevels
) -> list[str]:
    """What `step` steps had otherwise under the settings `before` than they would have had under `after`."""
    marks = sorted({step * i // 16 for i in range(16)})
    at = [(min(s / before.steps, 1.0), min(s / after.steps, 1.0)) for s in marks]
    parts = objective.summands if isinstance(objective, WeightedSum) else ()
    runs = [levels, *(part.levels for part in parts if part.levels is not None)]

    def times(some: NoiseLevels, progress: float) -> Tensor:
        return some.times(16 * max(some.shared, 1), progress, torch.Generator().manual_seed(0))

    moved = {
        "the clock": before.max_minutes is not None or after.max_minutes is not None,
        "the head start": bool(before.head_start),
        "the learning rate": any(learning_rate(before, p) != learning_rate(after, q) for p, q in at),
        "the noise levels": any(not torch.equal(times(some, p), times(some, q)) for some in runs for p, q in at),
        "the weights of the sum": any(part.weight_at(p) != part.weight_at(q) for part in parts for p, q in at),
    }
    return [name for name, moves in moved.items() if moves]


def write(folder: RunFolder, own: Mapping[str, Any]) -> None:
    """Keep what a run is."""
    write_whole(folder.identity, json.dumps(own, indent=2))


def read(folder: RunFolder) -> dict[str, Any]:
    """What a run is; {} for one of an earlier version, which kept nothing.

    Raises:
        UsageError: where that cannot be read.
    """
    if not folder.identity.is_file():
        return {}
    try:
        kept = json.loads(folder.identity.read_text(encoding="utf-8"))
        return {**kept, "training": {**kept["training"]}, "student": {**kept["student"]}}
    except UNREADABLE as error:
        raise UsageError(f"cannot read {folder.identity}: {first_line(error)}") from error


def changes(
    folder: RunFolder, own: Mapping[str, Any], step: int, objective: Objective, levels: NoiseLevels
) -> list[str]:
    """What a resumed run changes, in lines.

    Args:
        folder: of the run.
        own: what it would go on as.
        step: the last finished one.
        objective: its own.
        levels: its own.

    Raises:
        UsageError: where it is another run than the one that began, or has as many steps already.
    """
    kept = read(folder)
    found = differences(kept, own) if kept else {}
    other = {name: how for name, how in found.items() if name.removeprefix("training.") not in MENDABLE | BOOKS}
    if other:
        few = "; ".join(f"{name} {how}" for name, how in [*other.items()][:3])
        more = f"; and {len(other) - 3} more" if len(other) > 3 else ""
        raise UsageError(
            f"the run in {folder.path} is another one: {few}{more}: give what it began with, or another folder"
        )
    told = {name: found[f"training.{name}"] for name in MENDABLE if f"training.{name}" in found}
    lines = [f"the run goes on otherwise than it began: {name} {how}" for name, how in sorted(told.items())]
    if {"steps", "max_minutes"} & told.keys():
        before, after = (from_dict(TrainingConfig, some["training"], "training") for some in (kept, own))
        if "steps" in told and after.steps <= step:
            raise UsageError(f"the run has {step:,} steps already: give more, not {after.steps:,}")
        moved = moved_schedules(before, after, step, objective, levels)
        if moved:
            lines.append(
                f"the first {step:,} steps had another course of {' and '.join(moved)}: the numbers are not those of a "
                "run that was as long from the start"
            )
    return lines
