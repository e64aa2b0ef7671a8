"""What text to image provides to a run: a pipeline's network under prompts, which are encoded once.

Beside what a run on pictures keeps, its folder has `prompts.txt` and their conditions, `conditions.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardistill.denoisers import from_diffusers
from vardistill.denoisers.adapters import Adapted
from vardistill.denoisers.prompted import Conditions, PromptedDenoiser, prompted
from vardistill.diffusion import Denoiser, sample
from vardistill.diffusion.schedules import Rectified
from vardistill.domains.base import Finished
from vardistill.domains.pictures.evaluate import even_labels
from vardistill.domains.pictures.parts import BLOCK, Pictures, Teacher, costs, draw, teachers_pictures
from vardistill.domains.text.config import TextConfig
from vardistill.domains.text.families import cut, decoded, encoded, family_of, load_pipeline
from vardistill.domains.text.prompts import Prompts, read_prompts
from vardistill.errors import UsageError, first_line
from vardistill.files import whole, write_whole
from vardistill.networks import initial_weights
from vardistill.objectives import Objective
from vardistill.progress import say
from vardistill.students import NetworkStudent, Student, load_student
from vardistill.students.denoising import default_times
from vardistill.students.network import ADAPTERS
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Samples, StoredSamples
from vardistill.training.folder import RunFolder

SHOWN, TIMED = 16, 4
"""Pictures beside the teacher's, and pictures that are timed together: networks are large."""

LATENT_STD = 1.0
"""Standard deviation of latents, to which pipelines scale them."""


class Text(Pictures):
    """The parts of a run on text to image; see `domains.base.Domain`. Labels stand for prompts.

    Args:
        config: of the domain.
        training: of the run.
        takes_teacher: as for pictures.

    Attributes:
        prompts: that the student is trained on.
    """

    config: TextConfig
    prompts: Prompts
    data_std = LATENT_STD

    def __init__(self, config: TextConfig, training: TrainingConfig, takes_teacher: bool = True) -> None:
        for name, what in (("teacher", "a pipeline's folder or hub id"), ("prompts", "a text file with one a line")):
            if not getattr(config, name):
                raise UsageError(f"no {name}: give --{name}, {what}")
        super().__init__(config, training, takes_teacher)

    def _load_source(self, folder: RunFolder | None) -> None:
        family_of(self.config.teacher)
        kept = None if folder is None else folder.path / "prompts.txt"
        self.prompts = read_prompts(kept if kept is not None and kept.is_file() else Path(self.config.prompts))
        network = from_diffusers(self.config.teacher, self.config.variant)
        rows = self._stand_in() if folder is None else self._conditions(folder)
        self.source, self.data = Teacher(prompted(network, Conditions(rows))), None
        self.classes = self.source.denoiser.classes

    def _stand_in(self) -> dict[str, Tensor]:
        """Conditions of the right shapes for a run that is checked: the first prompt's, for all of them."""
        rows = encoded(load_pipeline(self.config.teacher, self.config.variant), self.prompts.texts[:1])
        return {name: v[:1].expand(len(self.prompts.texts) + 1, *v.shape[1:]) for name, v in rows.items()}

    def _digest(self) -> str:
        """What conditions are of: teacher and prompts."""
        said = json.dumps([self.config.teacher, self.config.variant, self.prompts.texts])
        return hashlib.sha256(said.encode()).hexdigest()

    def _conditions(self, folder: RunFolder) -> dict[str, Tensor]:
        path = folder.path / "conditions.safetensors"
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("digest") == self._digest():
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot read the prompts' conditions, {path}: delete the run and train anew") from error
        raise UsageError(f"{path} is of other prompts, or of another teacher: delete the run and train anew")

    def check(self) -> None:
        """Nothing that is not checked by loading."""

    def prepare(self, folder: RunFolder) -> None:
        """Say what was read, and encode the prompts, once."""
        path, texts = folder.path / "conditions.safetensors", self.prompts.texts
        if path.is_file():
            return
        pipeline = load_pipeline(self.config.teacher, self.config.variant)
        long = cut(pipeline, texts)
        say(f"read     {self.prompts.told}" + (f"; {len(long)} are too long and cut: {long[0]!r}, ..." if long else ""))
        write_whole(folder.path / "prompts.txt", "\n".join(texts) + "\n")
        rows = encoded(pipeline.to(self.device), texts)
        with whole(path) as partial:
            save_file(rows, partial, metadata={"digest": self._digest()})

    def _features(self, folder: RunFolder | None) -> None:
        """None: pictures are not measured."""
        return None

    def _build_student(self) -> NetworkStudent:
        s, denoiser = self.config.student, self.source.denoiser
        assert isinstance(denoiser, PromptedDenoiser)
        times = default_times(denoiser.schedule, s.steps_per_sample, self.data_std, s.ratio)
        if isinstance(denoiser.schedule, Rectified) and s.ratio is None:
            times = (1.0, *times[1:])  # where pipelines of flow matching start, from noise alone
        with initial_weights(self.seed):
            student = NetworkStudent.from_teacher(denoiser, None, 0, self.data_std, times=times, rank=s.lora_rank)
        return under_prompts(student, denoiser.conditions)

    def critic(self, start: str, **sizes: Any) -> Denoiser:
        """The teacher without its guidance: with adapters, or a copy of it."""
        if start != "teacher":
            raise UsageError(f"critics of text to image start as the teacher, not {start}: --critic-start teacher")
        return super().critic(start, **sizes)

    def space(self, name: str) -> None:
        """Latents themselves; raises UsageError for others."""
        if name != "data":
            raise UsageError(f"text to image compares in the space 'data', of latents, and not yet in '{name}'")

    def posterior(self, family: str, **sizes: Any) -> list[Any]:
        """None; raises UsageError."""
        raise UsageError("text to image has no posteriors of many latents: take diff-instruct, varflow or their sum")

    def real(self, source: Literal["teacher", "data"], n: int, steps: int) -> Samples:
        """The teacher's own latents, of each prompt as many."""
        if source == "data":
            raise UsageError("text to image has no real pictures yet: --real teacher takes the teacher's own")
        denoiser, count = self.source.denoiser, max(n, self.classes)
        device = next(denoiser.parameters()).device
        rng = torch.Generator(device).manual_seed(self.seed + 2)
        labels = torch.arange(count, device=device) % self.classes
        parts = [
            sample(
                self.guided, torch.randn(len(y), *denoiser.data_shape, generator=rng, device=device), steps, labels=y
            )
            for y in labels.split(BLOCK)
        ]
        return StoredSamples(torch.cat(parts), labels)

    def finish(self, student: Student, objective: Objective) -> Finished:
        """Pictures beside the teacher's from the same noise and prompts, and costs."""
        seed = self.seed + 1
        own = draw(student, SHOWN, seed, even_labels(SHOWN, student.classes))
        found = {"samples": own, "teacher": teachers_pictures(student, self.guided, SHOWN, seed)}
        return Finished({name: self.pictures(v) for name, v in found.items()}, costs(student, self.guided, TIMED))

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Costs."""
        return costs(student, self.guided, TIMED)

    def beside(self) -> dict[str, dict[str, float]]:
        """Nothing."""
        return {}

    def load_student(self, path: Path) -> Student:
        """A saved student, under the run's prompts; one of adapters on the teacher's weights."""
        conditions = Conditions(self._kept_conditions(path.parent))
        student = load_student(path, NetworkStudent)
        if not (path / ADAPTERS).is_file():
            return under_prompts(student, conditions)
        teacher = prompted(from_diffusers(self.config.teacher, self.config.variant), conditions)
        rank, times = self.config.student.lora_rank, student.times
        adapted = NetworkStudent.from_teacher(teacher, None, 0, self.data_std, times=times, rank=rank)
        try:
            adapted.denoiser.load_state_dict(load_file(path / ADAPTERS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UsageError(f"{path / ADAPTERS} is damaged, or of another teacher: {first_line(error)}") from error
        return under_prompts(adapted, conditions).eval()

    def asked(self, student: NetworkStudent, prompts: Sequence[str]) -> NetworkStudent:
        """The student under other prompts, in the place of the run's."""
        rows = encoded(load_pipeline(self.config.teacher, self.config.variant), prompts)
        return under_prompts(student, Conditions(rows))

    def pictures(self, latents: Tensor) -> Tensor:
        """(n, 3, H, W) in [−1, 1] of latents (n, C, h, w), on the CPU."""
        return decoded(load_pipeline(self.config.teacher, self.config.variant).vae, latents)

    def _kept_conditions(self, run: Path) -> dict[str, Tensor]:
        self.prompts = read_prompts(run / "prompts.txt")
        return self._conditions(RunFolder(run))


def under_prompts(student: NetworkStudent, conditions: Conditions) -> NetworkStudent:
    """The student with prompts as its labels; what it saves is the network alone."""
    if isinstance(student.denoiser, Adapted):
        assert isinstance(within := student.denoiser.within, PromptedDenoiser)
        within.tell(conditions)
    else:
        student.denoiser = prompted(student.denoiser, conditions)
    student.classes = len(conditions)
    return student
