"""Fitting a teacher to pictures: a U-Net by denoising score matching (Karras et al. 2022, arXiv 2206.00364).

The run folder holds, beside `config.yaml`, `metrics.jsonl` and `checkpoints/`:

pipeline/       the teacher as a diffusers pipeline
classifier/     a classifier of the labelled pictures, whose features measure the teacher and its students
evaluation.json the teacher's samples by `STEPS` steps of Heun's method against the pictures
samples.png     some pictures, their classes in turn

A step whose loss or gradient is not finite leaves weights and optimiser alone and is counted, as in `training`.
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
from vardistill.images.evaluate import NEIGHBOURS, build_reference, even_labels, labels_like, measured
from vardistill.images.features import load_features
from vardistill.images.figures import save_grids
from vardistill.images.unets import build_unet, edm_denoiser
from vardistill.noise_levels import NoiseLevels, named_weight
from vardistill.optimisers import adam, adam_state, clip_gradients
from vardistill.pipelines import save_pipeline
from vardistill.runs import RunFolder, create, environment, open_run, write_whole
from vardistill.samplers import sample
from vardistill.training import Diverged, Interrupted

STEPS = (18, 40)
"""Of Heun's method, for the teacher's own samples: EDM's for small pictures, and enough."""

BLOCK = 64
"""Pictures that the sampler draws at once."""

SHOWN = 100
"""Pictures that are shown, at most."""

LOG_EVERY = 100
"""Steps between lines of metrics."""


def teach_images(config: ImagesTeachConfig, out: Path, resume: bool = False) -> RunFolder:
    """Fit a U-Net denoiser to pictures and keep it in the run folder `out` as a diffusers pipeline.

    Each step takes pictures with replacement, drops the labels of some of them (for guidance), noises them and lowers
    EDM's weighted denoising error; the result is the moving average of the weights.

    Raises:
        UsageError: for data or a folder that cannot be used, or a device that is not there.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, with a checkpoint kept.
    """
    data = load_images(config.data)
    if has_classes(data):
        check_measurable(data, config.eval_samples)
    fit = Fit(config, data)
    folder = open_run(out) if resume else create(out)
    pipeline = folder.path / "pipeline"
    if resume:
        if pipeline.exists() or any(folder.checkpoints.glob("step-*")):  # else killed before: it starts anew
            fit.restore(checkpoints.latest(folder.checkpoints))
        folder.rewind(fit.step)
    else:
        write_whole(folder.environment, json.dumps(environment(), indent=2))
        configs.write(config, folder.config)
    if not pipeline.exists():  # its end: a clock's budget, read from a checkpoint, may say otherwise
        train(fit, folder)
        save_pipeline(fit.average, pipeline, classes=fit.classes)
    evaluate_teacher(fit, folder)
    return folder


def train(fit: Fit, folder: RunFolder) -> None:
    """Fit to the last step or to the end of the budget, with lines of metrics and checkpoints."""
    stop = StopRequest()
    with stop.heeded():
        for progress in fit.progress():
            loss = fit.advance(progress)
            if fit.step % LOG_EVERY == 0:
                values = {"loss": float(loss), "skipped": float(fit.skipped)}
                folder.log("train", fit.step, fit.elapsed(), values)
                check_skipped(fit, folder)
            if fit.step % fit.config.checkpoint_every == 0 or stop.made:
                keep(fit, folder)
            if stop.made:
                raise Interrupted(f"stopped at step {fit.step}")
    keep(fit, folder)
    check_skipped(fit, folder)


def keep(fit: Fit, folder: RunFolder) -> None:
    """Write a checkpoint."""
    checkpoints.save(folder.checkpoints, fit.state(), keep=2)


def check_skipped(fit: Fit, folder: RunFolder) -> None:
    """Raise Diverged, with a checkpoint kept, after too many skipped steps since the fit was started or resumed."""
    skipped = float(fit.skipped) - fit.skipped_before
    if skipped > fit.config.max_skipped:
        keep(fit, folder)
        raise Diverged(
            f"{skipped:.0f} updates up to step {fit.step} had gradients that are not finite (limit "
            f"{fit.config.max_skipped}); the last good state is kept: try a smaller lr"
        )


def evaluate_teacher(fit: Fit, folder: RunFolder) -> None:
    """Sample the teacher, show some pictures and, where there are labels for a classifier, measure others."""
    n, data, seed = fit.config.eval_samples, fit.data, fit.config.seed
    labels, in_turn = labels_like(data, n, fit.classes), even_labels(min(n, SHOWN), fit.classes)
    reference = None
    if has_classes(data):
        kept_classifier(data, folder.path / "classifier", seed)
        reference = build_reference(data, load_features(folder.path / "classifier"))
    table, shown = {}, {}
    for steps in STEPS:
        pictures, spent = drawn(fit.average, n, labels, steps, seed + 1)
        shown[f"Teacher, {steps} steps"], _ = drawn(fit.average, min(n, SHOWN), in_turn, steps, seed + 1)
        own = {} if reference is None else measured(pictures, reference, labels)
        table[f"{steps} steps"] = own | {"evaluations": 2 * steps - 1, "seconds_per_image": spent / n, "samples": n}
    if reference is not None:
        own = measured(data.held_out.take(reference.held_out[:n]), reference, copies=False)
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
        self.device = find_device(config.device)
        self.classes = data.classes if config.conditional else 0
        rows = self.classes + 1 if self.classes and config.label_dropout else self.classes
        network = build_unet(config.network, data.shape, rows, config.seed)
        self.denoiser = edm_denoiser(network, data.std, config.sigma_min, config.sigma_max).to(self.device).train()
        self.average = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        self.optimizer = adam(network.parameters(), TrainingConfig())
        self.levels = NoiseLevels(self.denoiser.schedule, config.distribution, named_weight("edm", data.std))
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.skipped, self.skipped_before = torch.zeros((), device=self.device), 0.0
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
        norm = clip_gradients(self.optimizer, 1.0)
        not_finite = (~(loss.isfinite() & norm.isfinite())).float()
        self.optimizer.found_inf = not_finite  # type: ignore[attr-defined]  # 1: the fused kernels leave all alone
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not_finite
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
            "counters": {"skipped": self.skipped},
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
        kept = {"counters": own["counters"]} | state.tensors  # older checkpoints count nothing
        for section in own.keys() | kept.keys():
            checkpoints.match(section, kept.get(section, {}), own.get(section, {}))
        try:
            self.rng.set_state(kept["random"]["rng"].cpu())
        except RuntimeError as error:
            raise UsageError(f"the checkpoint's random state is damaged: {error}") from error
        for section, tensors in own.items():
            for name, v in tensors.items():
                v.copy_(kept[section][name])
        self.skipped_before = float(self.skipped)
        self.step, self.spent, self.started = state.step, state.seconds, self._now()
