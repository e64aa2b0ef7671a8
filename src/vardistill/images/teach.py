"""Fitting a teacher to pictures: a U-Net by denoising score matching (Karras et al. 2022, arXiv 2206.00364).

The run folder holds, beside `config.yaml`, `metrics.jsonl` and `checkpoints/`:

pipeline/       the teacher as a diffusers pipeline
classifier/     a classifier of the labelled pictures, whose features measure the teacher and its students
evaluation.json the teacher's samples by `STEPS` steps of Heun's method against the pictures
samples.png     some of them
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vardistill import checkpoints
from vardistill import config as configs
from vardistill.bookkeeping import StopRequest
from vardistill.config import TrainingConfig
from vardistill.denoisers import dsm_loss
from vardistill.denoisers.from_diffusers import DiffusersDenoiser
from vardistill.devices import find_device
from vardistill.errors import UsageError
from vardistill.images.classifier import fit_classifier
from vardistill.images.config import ImagesTeachConfig
from vardistill.images.data import ImageData, load_images
from vardistill.images.evaluate import NEIGHBOURS, build_reference, measured
from vardistill.images.features import load_features
from vardistill.images.figures import save_grids
from vardistill.images.unets import build_unet, edm_denoiser
from vardistill.noise_levels import NoiseLevels, named_weight
from vardistill.optimisers import adam, adam_state
from vardistill.pipelines import save_pipeline
from vardistill.runs import RunFolder, create, open_run, write_whole
from vardistill.samplers import sample
from vardistill.training import Interrupted

STEPS = (18, 40)
"""Of Heun's method, for the teacher's own samples: EDM's for small pictures, and enough."""

BLOCK = 64
"""Pictures that the sampler draws at once."""


def teach_images(config: ImagesTeachConfig, out: Path, resume: bool = False) -> RunFolder:
    """Fit a U-Net denoiser to pictures and keep it in the run folder `out` as a diffusers pipeline.

    Each step takes pictures with replacement, drops the labels of some of them (for guidance), noises them and lowers
    EDM's weighted denoising error; the result is the moving average of the weights.

    Raises:
        UsageError: for data or a folder that cannot be used, or a device that is not there.
        Interrupted: after Ctrl-C, with a checkpoint kept.
    """
    data = load_images(config.data)
    if has_classes(data):
        check_measurable(data, config.eval_samples)
    fit = Fit(config, data)
    folder = open_run(out) if resume else create(out)
    if resume:
        if any(folder.checkpoints.glob("step-*")):  # else killed before its first checkpoint: it starts anew
            fit.restore(checkpoints.latest(folder.checkpoints))
        folder.rewind(fit.step)
    else:
        configs.write(config, folder.config)
    stop = StopRequest()
    with stop.heeded():
        for progress in fit.progress():
            loss = fit.advance(progress)
            if fit.step % 100 == 0:
                folder.log("train", fit.step, fit.elapsed(), {"loss": float(loss)})
            if fit.step % config.checkpoint_every == 0 or stop.made:
                checkpoints.save(folder.checkpoints, fit.state(), keep=2)
            if stop.made:
                raise Interrupted(f"stopped at step {fit.step}")
    checkpoints.save(folder.checkpoints, fit.state(), keep=2)  # by the clock, too, the fit ends here for good
    pipeline = folder.path / "pipeline"
    if not pipeline.exists():
        save_pipeline(fit.average, pipeline, classes=fit.classes)
    evaluate_teacher(fit, folder)
    return folder


def evaluate_teacher(fit: Fit, folder: RunFolder) -> None:
    """Sample the teacher, show some pictures and, where there are labels for a classifier, measure them all."""
    n, data = fit.config.eval_samples, fit.data
    labels = torch.arange(n) % fit.classes if fit.classes else None
    reference = None
    if has_classes(data):
        kept_classifier(data, folder.path / "classifier", fit.config.seed)
        reference = build_reference(data, load_features(folder.path / "classifier"))
    table, shown = {}, {}
    for steps in STEPS:
        pictures, spent = drawn(fit.average, n, labels, steps, fit.config.seed + 1)
        shown[f"Teacher, {steps} steps"] = pictures[:100]
        own = {} if reference is None else measured(pictures, reference, labels)
        table[f"{steps} steps"] = own | {"evaluations": 2 * steps - 1, "seconds_per_image": spent / n, "samples": n}
    if reference is not None:
        own = measured(data.held_out.take(torch.arange(min(n, len(data.held_out)))), reference, copies=False)
        table["held-out data"] = {name: own[name] for name in ("fd", "kd")}  # the others would compare it with itself
    save_grids(shown, folder.path / "samples.png")
    write_whole(folder.path / "evaluation.json", json.dumps(table, indent=2))


def drawn(denoiser: DiffusersDenoiser, n: int, labels: Tensor | None, steps: int, seed: int) -> tuple[Tensor, float]:
    """n pictures by Heun's method on the CPU, and the seconds that they took."""
    device = next(denoiser.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    started, blocks = time.perf_counter(), []
    for index in tqdm(torch.arange(n).split(BLOCK), desc=f"teacher, {steps} steps", unit="batch"):
        noise = torch.randn(len(index), *denoiser.data_shape, generator=rng, device=device)
        condition: dict[str, Any] = {} if labels is None else {"labels": labels[index].to(device)}
        blocks.append(sample(denoiser, noise, steps, **condition).cpu())
    return torch.cat(blocks), time.perf_counter() - started


def kept_classifier(data: ImageData, path: Path, seed: int) -> None:
    """A classifier of these pictures in the folder `path`, fitted where there is none yet."""
    if not (path / "config.json").is_file():
        rng = torch.Generator().manual_seed(seed)
        fit_classifier(data.train, data.held_out, rng).save_pretrained(path)


def has_classes(data: ImageData) -> bool:
    """Whether a classifier can be fitted to these pictures."""
    return data.classes > 1


def check_measurable(data: ImageData, n: int) -> None:
    """Raise UsageError where the metrics would, at the end, for n samples against these pictures."""
    fewest = NEIGHBOURS + 1
    if min(n, len(data.held_out)) < fewest:
        raise UsageError(
            f"metrics need at least {fewest} samples and held-out pictures, but there are eval_samples={n} and "
            f"{len(data.held_out)} held-out pictures"
        )


class Fit:
    """The state of the fit and its steps."""

    def __init__(self, config: ImagesTeachConfig, data: ImageData) -> None:
        self.config, self.data = config, data
        self.device = find_device(config.device) or torch.device("cpu")
        self.classes = data.classes if config.conditional else 0
        rows = self.classes + 1 if self.classes and config.label_dropout else self.classes
        network = build_unet(config.network, data.shape, rows, config.seed)
        self.denoiser = edm_denoiser(network, data.std, config.sigma_min, config.sigma_max).to(self.device).train()
        self.average = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.optimizer = adam(network.parameters(), TrainingConfig())
        self.levels = NoiseLevels(self.denoiser.schedule, config.distribution, named_weight("edm", data.std))
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.step, self.spent, self.started = 0, 0.0, self._now()

    def _now(self) -> float:
        return time.process_time() if self.config.clock == "cpu" else time.monotonic()

    def elapsed(self) -> float:
        """Seconds spent, by the configuration's clock."""
        return self.spent + self._now() - self.started

    def progress(self) -> Iterator[float]:
        """The run's progress before each step, until the steps or the budget are spent."""
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(total=self.config.steps, initial=self.step, desc="teacher", unit="step", mininterval=interval) as bar:
            while True:
                progress = self.step / self.config.steps
                if self.config.max_minutes is not None:
                    progress = max(progress, self.elapsed() / (60 * self.config.max_minutes))
                if progress >= 1:
                    return
                yield progress
                bar.update()

    def advance(self, progress: float) -> Tensor:
        """One update; returns its loss."""
        self.optimizer.param_groups[0]["lr"] = self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        x, condition = self._draw()
        noise = self.levels.draw(x.shape[1:], len(x), progress, self.rng)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = dsm_loss(self.denoiser, x, noise, **condition).mean() / x[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), 1 - decay)

    def _draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of pictures with their labels, where the network takes any."""
        n = self.config.batch
        index = torch.randint(len(self.data.train), (n,), generator=self.rng, device=self.device)
        x = self.data.train.take(index.cpu()).to(self.device)
        if not self.classes:
            return x, {}
        assert self.data.train.labels is not None
        labels = self.data.train.labels[index.cpu()].to(self.device)
        dropped = torch.rand(n, generator=self.rng, device=self.device) < self.config.label_dropout
        return x, {"labels": labels.where(~dropped, self.classes)}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "denoiser": dict(self.denoiser.state_dict()),
            "average": dict(self.average.state_dict()),
            "optimizer": adam_state(self.optimizer),
            "random": {"rng": self.rng.get_state()},
        }

    def state(self) -> checkpoints.State:
        """Everything that the fit needs to go on."""
        return checkpoints.State(self.step, self.elapsed(), self._tensors())

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; raises UsageError where it is damaged or of another fit."""
        state = checkpoints.load(path, self.device)
        own = self._tensors()
        for section in own:
            checkpoints.match(section, state.tensors.get(section, {}), own[section])
            for name, v in own[section].items():
                v.copy_(state.tensors[section][name])
        self.rng.set_state(state.tensors["random"]["rng"].cpu())
        self.step, self.spent, self.started = state.step, state.seconds, self._now()
