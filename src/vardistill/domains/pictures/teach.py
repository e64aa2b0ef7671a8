"""Fitting a teacher to pictures: a U-Net by denoising score matching (Karras et al. 2022, arXiv 2206.00364).

The run folder holds, beside `config.yaml`, `metrics.jsonl` and `checkpoints/`:

pipeline/       the teacher as a diffusers pipeline
classifier/     a classifier of the labelled pictures, whose features measure the teacher and its students
evaluation.json the teacher's samples by `STEPS` steps of Heun's method against the pictures
samples.png     some pictures, their classes in turn
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vardistill.denoisers import dsm_loss
from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.devices import find_device
from vardistill.diffusion.noise import NoiseLevels
from vardistill.diffusion.samplers import sample
from vardistill.diffusion.weights import named_weight
from vardistill.domains.pictures.classifier import fit_classifier
from vardistill.domains.pictures.config import PicturesTeachConfig
from vardistill.domains.pictures.data import ImageData
from vardistill.domains.pictures.evaluate import NEIGHBOURS, build_reference, even_labels, labels_like, measured
from vardistill.domains.pictures.features import load_features
from vardistill.domains.pictures.figures import save_grids
from vardistill.domains.pictures.sources import load_images
from vardistill.domains.pictures.unets import build_unet, edm_denoiser
from vardistill.errors import require
from vardistill.export.pipelines import save_pipeline
from vardistill.files import whole, write_whole
from vardistill.progress import bar, phase, say
from vardistill.training.config import TrainingConfig
from vardistill.training.fitting import Fit
from vardistill.training.folder import RunFolder

STEPS = (18, 40)
"""Of Heun's method, for the teacher's own samples: EDM's for small pictures, and enough."""

BLOCK = 64
"""Pictures that the sampler draws at once."""

SHOWN = 100
"""Pictures that are shown, at most."""


def teach_images(config: PicturesTeachConfig, out: Path, resume: bool = False) -> RunFolder:
    """Fit a U-Net denoiser to pictures, or go on, and keep it in the run folder `out` as a diffusers pipeline.

    Each step takes pictures with replacement, drops the labels of some of them (for guidance), noises them and lowers
    EDM's weighted denoising error; the result is the moving average of the weights.

    Raises:
        UsageError: for data or a folder that cannot be used, or a device that is not there.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, or for a result that is not finite, with a checkpoint kept.
    """
    size = None if config.size is None else (config.size, config.size)
    with phase("reading the pictures", kept=False):
        data = load_images(config.data, size=size, mirrored=config.mirrored)
    if unmeasured(data) is None:
        check_samples(config.eval_samples)
    say(described(data, unmeasured(data)))
    fit = build_fit(config, data)
    folder = fit.run(config, out, resume, "pipeline", partial(save_pipeline, classes=_classes(config, data)))
    evaluate_teacher(fit.average, config, data, folder)
    return folder


def evaluate_teacher(
    teacher: DiffusersDenoiser, config: PicturesTeachConfig, data: ImageData, folder: RunFolder
) -> None:
    """Sample the teacher, show some pictures and, where there is what they can be measured with, measure others."""
    n, seed, classes = config.eval_samples, config.seed, _classes(config, data)
    labels, in_turn = labels_like(data, n, classes), even_labels(min(n, SHOWN), classes)
    reference = None
    if unmeasured(data) is None:
        kept_classifier(data, folder.path / "classifier", seed)
        features = load_features(folder.path / "classifier").to(next(teacher.parameters()).device)
        reference = build_reference(data, features)
    table, shown = {}, {}
    for steps in STEPS:
        pictures, spent = drawn(teacher, n, labels, steps, seed + 1)
        shown[f"Teacher, {steps} steps"], _ = drawn(teacher, min(n, SHOWN), in_turn, steps, seed + 1)
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
    for index in bar(torch.arange(n).split(BLOCK), name=f"teacher's samples, {steps} steps", unit="batches"):
        noise = torch.randn(len(index), *denoiser.data_shape, generator=rng, device=device)
        condition: dict[str, Any] = {} if labels is None else {"labels": labels[index].to(device)}
        blocks.append(sample(denoiser, noise, steps, **condition).cpu())
    return torch.cat(blocks), time.perf_counter() - started


def kept_classifier(data: ImageData, path: Path, seed: int) -> None:
    """A classifier of these pictures in the folder `path`, fitted where there is none yet."""
    if not (path / "config.json").is_file():
        rng = torch.Generator().manual_seed(seed)
        classifier = fit_classifier(data.train, data.held_out, rng)
        with whole(path, folder=True) as partial:
            classifier.save_pretrained(partial)


def unmeasured(data: ImageData) -> str | None:
    """Why samples cannot be measured against these pictures with a classifier of them; None where they can."""
    return few(data) or ("without labels of two classes there is no classifier" if data.classes < 2 else None)


def described(data: ImageData, reason: str | None) -> str:
    """The line that says what was read and, where there is a reason, why nothing is measured."""
    return data.describe() + ("" if reason is None else f"; nothing is measured: {reason}")


def few(data: ImageData) -> str | None:
    """Why there are no metrics at all against these pictures; None where there are."""
    n = len(data.held_out)
    return f"metrics need at least {NEIGHBOURS + 1} held-out pictures, and there are {n}" if n <= NEIGHBOURS else None


def check_samples(n: int) -> None:
    """Raise UsageError where the metrics would, at the end, for n samples."""
    require("eval_samples", n, n > NEIGHBOURS, f"at least {NEIGHBOURS + 1}, for metrics need as many")


def untrained(config: PicturesTeachConfig, data: ImageData) -> DiffusersDenoiser:
    """The denoiser that a fit begins with."""
    classes = _classes(config, data)
    rows = classes + 1 if classes and config.label_dropout else classes
    network = build_unet(config.network, data.shape, rows, config.seed)
    return edm_denoiser(network, data.std, config.sigma_min, config.sigma_max)


def build_fit(config: PicturesTeachConfig, data: ImageData) -> Fit[DiffusersDenoiser]:
    """An untrained U-Net for the pictures, and what fits it."""
    denoiser = untrained(config, data).to(find_device(config.device))
    levels = NoiseLevels(denoiser.schedule, config.distribution, named_weight("edm", data.std))

    def loss(denoiser: DiffusersDenoiser, progress: float, rng: torch.Generator) -> Tensor:
        x, condition = _batch(config, data, rng)
        noise = levels.draw(x.shape[1:], len(x), progress, rng)
        with torch.autocast(rng.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return dsm_loss(denoiser, x, noise, **condition).mean()

    training = TrainingConfig(
        steps=config.steps,
        max_minutes=config.max_minutes,
        clock=config.clock,
        lr=config.lr,
        warmup=0.0,
        clip=1.0,
        ema=config.ema,
        seed=config.seed,
        checkpoint_every=config.checkpoint_every,
        max_skipped=config.max_skipped,
    )
    return Fit(denoiser, loss, training)


def _classes(config: PicturesTeachConfig, data: ImageData) -> int:
    """How many classes the network is told; 0 for none."""
    return data.classes if config.conditional else 0


def _batch(config: PicturesTeachConfig, data: ImageData, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures with their labels, where the network takes any, on the device of `rng`."""
    n, device, classes = config.batch, rng.device, _classes(config, data)
    index = torch.randint(len(data.train), (n,), generator=rng, device=device)
    x = data.train.take(index.cpu()).to(device)
    if not classes:
        return x, {}
    assert data.train.labels is not None
    labels = data.train.labels[index.cpu()].to(device)
    dropped = torch.rand(n, generator=rng, device=device) < config.label_dropout
    return x, {"labels": labels.where(~dropped, classes)}
