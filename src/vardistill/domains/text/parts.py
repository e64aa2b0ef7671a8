"""What text to image provides to a run: a pipeline's network under prompts, which are encoded once.

Beside what a run on pictures keeps, its folder has `prompts.txt` and their conditions, `conditions.safetensors`.
Pictures are measured by the judge that comes with a teacher of shapes, else by models that are named; see
`domains.text.evaluate`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardistill.denoisers import Guided, from_diffusers
from vardistill.denoisers.adapters import Adapted
from vardistill.denoisers.prompted import Conditions, PromptedDenoiser, prompted
from vardistill.diffusion import Denoiser, sample
from vardistill.diffusion.schedules import Rectified
from vardistill.domains.base import Finished
from vardistill.domains.pictures.evaluate import blocks, even_labels
from vardistill.domains.pictures.features import Features, load_features
from vardistill.domains.pictures.parts import (
    BLOCK,
    Pictures,
    Teacher,
    costs,
    draw,
    teachers_columns,
    teachers_pictures,
)
from vardistill.domains.text.captioned import CaptionedImages, read_captions
from vardistill.domains.text.clip import ClipScore
from vardistill.domains.text.config import SHAPES, TextConfig
from vardistill.domains.text.evaluate import ByModels, Measured, twice
from vardistill.domains.text.families import cut, decoded, encoded, family_of, in_latents, load_pipeline
from vardistill.domains.text.prompts import HOW, Prompts, read_prompts
from vardistill.domains.text.shapes.config import ShapesTeachConfig
from vardistill.domains.text.shapes.evaluate import Truth, asked_twice
from vardistill.domains.text.shapes.judge import Judge, load_judge
from vardistill.domains.text.spaces import DecodedSpace
from vardistill.errors import UsageError, first_line
from vardistill.files import whole, write_whole
from vardistill.networks import initial_weights
from vardistill.objectives import Objective
from vardistill.progress import bar, say
from vardistill.students import NetworkStudent, Student, load_student
from vardistill.students.denoising import default_times
from vardistill.students.network import ADAPTERS
from vardistill.training import config_files
from vardistill.training.config import TrainingConfig
from vardistill.training.data import Samples, StoredSamples
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Evaluate

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
        if not config.teacher:
            fit = "; `vardistill teach shapes` fits one" if config.data == SHAPES else ""
            raise UsageError(f"no teacher: give --teacher, a pipeline's folder or hub id{fit}")
        super().__init__(config, training, takes_teacher)
        self.sources = sources_of(config)
        if not config.prompts and self.sources.pictures is None:
            raise UsageError(f"no prompts: give --prompts, {HOW}; or --data with captions")
        self._measures: dict[tuple[int, int], tuple[Measured, Conditions, Tensor]] = {}

    def _load_source(self, folder: RunFolder | None) -> None:
        family_of(self.sources.pipeline)
        self.prompts = self._read_prompts(folder)
        network = from_diffusers(self.sources.pipeline, self.config.variant)
        rows = self._stand_in() if folder is None else self._conditions(folder)
        self.source, self.data = Teacher(prompted(network, Conditions(rows))), None
        self.classes = self.source.denoiser.classes

    def _read_prompts(self, folder: RunFolder | None) -> Prompts:
        kept = None if folder is None else folder.path / "prompts.txt"
        if kept is not None and kept.is_file():
            return read_prompts(kept)
        if self.config.prompts:
            return read_prompts(self.config.prompts)
        assert self.sources.pictures is not None
        return Prompts(tuple(dict.fromkeys(text for _, text in read_captions(self.sources.pictures))))

    def _pipeline(self) -> Any:
        return load_pipeline(self.sources.pipeline, self.config.variant)

    @cached_property
    def _vae(self) -> Any:
        return self._pipeline().vae

    def _stand_in(self) -> dict[str, Tensor]:
        """Conditions of the right shapes for a run that is checked: the first prompt's, for all of them."""
        rows = encoded(self._pipeline(), self.prompts.texts[:1])
        return {name: v[:1].expand(len(self.prompts.texts) + 1, *v.shape[1:]) for name, v in rows.items()}

    def _digest(self) -> str:
        """What conditions are of: teacher and prompts."""
        said = json.dumps([self.sources.pipeline, self.config.variant, self.prompts.texts])
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
        """Raise the UsageError that metrics would end with."""
        if self.config.clip_model or self.config.features:
            self._measure(2, self.seed)

    def prepare(self, folder: RunFolder) -> None:
        """Say what was read, and encode the prompts, once."""
        path, texts = folder.path / "conditions.safetensors", self.prompts.texts
        if path.is_file():
            return
        pipeline = self._pipeline()
        long = cut(pipeline, texts)
        say(f"read     {self.prompts.told}" + (f"; {len(long)} are too long and cut: {long[0]!r}, ..." if long else ""))
        write_whole(folder.path / "prompts.txt", "\n".join(texts) + "\n")
        rows = encoded(pipeline.to(self.device), texts)
        with whole(path) as partial:
            save_file(rows, partial, metadata={"digest": self._digest()})

    def _features(self, folder: RunFolder | None) -> Features | None:
        """Of a model that is named."""
        return load_features(self.config.features) if self.config.features else None

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

    def space(self, name: str) -> Callable[[Tensor, Tensor], Any] | None:
        """Latents themselves, features of the teacher under the empty prompt, or of the judge at decoded latents."""
        if name != "classifier":
            return super().space(name)
        if self._judge is None:
            raise UsageError(
                "the classifier's space needs a judge, which teachers of shapes have: take another --space"
            )
        return DecodedSpace(self._judge.classifier, self._vae)

    def posterior(self, family: str, **sizes: Any) -> list[Any]:
        """None; raises UsageError."""
        raise UsageError("text to image has no posteriors of many latents: take diff-instruct, varflow or their sum")

    def real(self, source: Literal["teacher", "data"], n: int, steps: int) -> Samples:
        """Latents of captioned pictures, or the teacher's own, of each prompt as many."""
        if source == "data":
            return self._captioned_latents()
        denoiser, count = self.source.denoiser, max(n, self.classes)
        device = next(denoiser.parameters()).device
        rng = torch.Generator(device).manual_seed(self.seed + 2)
        labels = torch.arange(count, device=device) % self.classes
        parts = [
            sample(
                self.guided, torch.randn(len(y), *denoiser.data_shape, generator=rng, device=device), steps, labels=y
            )
            for y in bar(labels.split(BLOCK), name="the teacher's own", unit="batches")
        ]
        return StoredSamples(torch.cat(parts), labels)

    def _captioned_latents(self) -> StoredSamples:
        images = self._images
        if images is None or images.labels is None:
            raise UsageError("real samples are captioned pictures: give --data, or --real teacher for its own")
        number = {text: i for i, text in enumerate(self.prompts.texts)}
        labels = torch.tensor([number.get(images.class_names[c], -1) for c in images.labels.tolist()])
        without = len(number) - len(set(labels.tolist()) - {-1})
        if without:
            raise UsageError(f"{without} of the prompts have no picture: leave out --prompts, or take --real teacher")
        (rows,) = (labels >= 0).nonzero(as_tuple=True)
        rng = torch.Generator().manual_seed(self.seed + 2)
        return StoredSamples(in_latents(self._vae, blocks(images, rows), rng), labels[rows])

    @cached_property
    def _images(self) -> CaptionedImages | None:
        if self.sources.pictures is None:
            return None
        shrunk = 2 ** (len(self._vae.config.block_out_channels) - 1)
        height, width = (side * shrunk for side in self.source.denoiser.data_shape[1:])
        return CaptionedImages(self.sources.pictures, (height, width))

    @cached_property
    def _judge(self) -> Judge | None:
        return None if self.sources.judge is None else load_judge(self.sources.judge)

    def _measure(self, n: int, seed: int) -> tuple[Measured, Conditions, Tensor] | None:
        """What n pictures are measured with, their prompts' conditions and the number of each one's prompt."""
        config, key = self.config, (n, seed)
        if self._judge is None and not config.clip_model and not config.features:
            return None
        if key not in self._measures:
            if self._judge is not None:
                measured: Measured = Truth(self._judge, asked_twice(n, seed), seed + 1)
            else:
                clip = ClipScore(config.clip_model) if config.clip_model else None
                measured = ByModels(twice(self.prompts.texts, n), clip, self.features, self._images)
            number = {text: i for i, text in enumerate(dict.fromkeys(measured.prompts))}
            rows = Conditions(encoded(self._pipeline(), list(number)))
            self._measures[key] = measured, rows, torch.tensor([number[text] for text in measured.prompts])
        return self._measures[key]

    def _measured(self, student: Student, n: int, seed: int, copies: bool = True) -> dict[str, float]:
        found = self._measure(n, seed)
        if found is None:
            return {}
        assert isinstance(student, NetworkStudent)
        measured, conditions, labels = found
        with asking(student, conditions):
            latents = draw(student, n, seed, labels)
        return measured.table(self.pictures(latents))

    def metrics(self, objective: Objective) -> Evaluate | None:
        """Pictures of the averaged student by judge or models; None where there are none."""
        if self._judge is None and not self.config.clip_model and not self.config.features:
            return None
        return lambda average: self._measured(average, self.training.eval_samples, self.seed + 1)

    def finish(self, student: Student, objective: Objective) -> Finished:
        """Pictures beside the teacher's from the same noise and prompts, metrics and costs."""
        n, seed = self.training.eval_samples, self.seed + 1
        own = draw(student, SHOWN, seed, even_labels(SHOWN, student.classes))
        found = {"samples": own, "teacher": teachers_pictures(student, self.guided, SHOWN, seed)}
        measured = self._measured(student, n, seed)
        table = measured | costs(student, self.guided, TIMED) | ({"samples": n} if measured else {})
        return Finished({name: self.pictures(v) for name, v in found.items()}, table)

    def evaluate(self, student: Student, n: int, seed: int) -> dict[str, Any]:
        """Metrics of n pictures, and costs."""
        measured = self._measured(student, n, seed)
        return measured | costs(student, self.guided, TIMED) | ({"samples": n} if measured else {})

    def beside(self) -> dict[str, dict[str, float]]:
        """The metrics of a teacher of shapes by the steps of its sampler."""
        judge = self.sources.judge
        return {} if judge is None else teachers_columns(judge.parent / "evaluation.json")

    def load_student(self, path: Path) -> Student:
        """A saved student, under the run's prompts; one of adapters on the teacher's weights."""
        conditions = Conditions(self._kept_conditions(path.parent))
        student = load_student(path, NetworkStudent)
        if not (path / ADAPTERS).is_file():
            return under_prompts(student, conditions)
        teacher = prompted(from_diffusers(self.sources.pipeline, self.config.variant), conditions)
        rank, times = self.config.student.lora_rank, student.times
        adapted = NetworkStudent.from_teacher(teacher, None, 0, self.data_std, times=times, rank=rank)
        try:
            adapted.denoiser.load_state_dict(load_file(path / ADAPTERS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UsageError(f"{path / ADAPTERS} is damaged, or of another teacher: {first_line(error)}") from error
        return under_prompts(adapted, conditions).eval()

    def asked(self, student: NetworkStudent, prompts: Sequence[str]) -> NetworkStudent:
        """The student under other prompts, in the place of the run's."""
        rows = encoded(self._pipeline(), prompts)
        return under_prompts(student, Conditions(rows))

    def under(self, student: NetworkStudent, prompt: str, guidance: float) -> Denoiser:
        """The teacher with this guidance and one prompt, its label 0; from then on it is the student's, too."""
        conditions = Conditions(encoded(self._kept_pipeline, [prompt]))
        under_prompts(student, conditions)
        teacher = prompted(self.source.denoiser, conditions)
        return teacher if guidance == 1 else Guided(teacher, guidance, {"labels": 1})

    @cached_property
    def _kept_pipeline(self) -> Any:
        return self._pipeline()

    def pictures(self, latents: Tensor) -> Tensor:
        """(n, 3, H, W) in [−1, 1] of latents (n, C, h, w), on the CPU."""
        return decoded(self._vae, latents)

    def _kept_conditions(self, run: Path) -> dict[str, Tensor]:
        self.prompts = read_prompts(run / "prompts.txt")
        return self._conditions(RunFolder(run))


@dataclass(frozen=True)
class Sources:
    """Where a teacher is, and what comes with it.

    Attributes:
        pipeline: a folder or hub id.
        pictures: a folder of captioned pictures, or None.
        judge: a folder, of shapes; else None.
    """

    pipeline: str
    pictures: Path | None = None
    judge: Path | None = None


def sources_of(config: TextConfig) -> Sources:
    """The sources of a run.

    Raises:
        UsageError: for a teacher's run that is unfinished or of another kind.
    """
    own = Path(config.data) if config.data and config.data != SHAPES else None
    run = RunFolder(Path(config.teacher))
    if not run.config.is_file():
        if config.data == SHAPES:
            raise UsageError(f"{config.teacher} is no run of `vardistill teach shapes`: give one as --teacher")
        return Sources(config.teacher, own)
    config_files.read(ShapesTeachConfig, run.config)
    if not (run.path / "evaluation.json").is_file():
        raise UsageError(f"{run.path} has no finished teacher yet: go on with `vardistill teach --resume {run.path}`")
    return Sources(str(run.path / "pipeline"), own or run.path / "pictures", run.path / "judge")


def under_prompts(student: NetworkStudent, conditions: Conditions) -> NetworkStudent:
    """The student with prompts as its labels; what it saves is the network alone."""
    denoiser = student.denoiser.within if isinstance(student.denoiser, Adapted) else student.denoiser
    if isinstance(denoiser, PromptedDenoiser):
        denoiser.tell(conditions)
    else:
        student.denoiser = prompted(denoiser, conditions)
    student.classes = len(conditions)
    return student


@contextmanager
def asking(student: NetworkStudent, conditions: Conditions) -> Iterator[None]:
    """With other prompts in the place of the student's own."""
    denoiser: Any = student.denoiser.within if isinstance(student.denoiser, Adapted) else student.denoiser
    own = denoiser.conditions
    try:
        under_prompts(student, conditions)
        yield
    finally:
        under_prompts(student, own)
