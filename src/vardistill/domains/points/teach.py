"""Fitting a teacher: denoising score matching on a sample of a problem (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vardistill.denoisers import Preconditioned, dsm_loss
from vardistill.devices import find_device
from vardistill.diffusion.denoiser import Denoiser, score
from vardistill.diffusion.noise import NoiseLevels
from vardistill.diffusion.schedules import SCHEDULES
from vardistill.diffusion.weights import named_weight
from vardistill.domains.points.config import PointsTeachConfig
from vardistill.domains.points.problems import PROBLEMS, Problem
from vardistill.errors import UsageError
from vardistill.files import whole, write_whole
from vardistill.metrics.bound import noise_level
from vardistill.networks import LevelMLP, initial_weights
from vardistill.training import config_files
from vardistill.training.checkpoints import match
from vardistill.training.config import TrainingConfig
from vardistill.training.fitting import Fit
from vardistill.training.folder import open_run
from vardistill.training.loop import Diverged

WEIGHTS = "denoiser.safetensors"

ERROR_SAMPLES = 4096
"""Noisy points per ratio for a teacher's error."""


def teach(config: PointsTeachConfig, out: Path, resume: bool = False) -> Preconditioned:
    """Fit a network denoiser to the problem and keep it in the run folder `out`, or go on with a fit that was stopped.

    The data are all that the problem has or, where it is a distribution, `config.samples` points of it.

    Each step takes a batch of the data, noises it and lowers the EDM-weighted denoising error; the result is the moving
    average of the weights. `evaluation.json` holds its errors, see `teacher_errors`.

    Raises:
        UsageError: for a folder that cannot be used or a device that is not there.
        Interrupted: after Ctrl-C, with a checkpoint kept.
        Diverged: after too many skipped steps, or for a result that is not finite, with a checkpoint kept.
    """
    problem = PROBLEMS[config.problem](SCHEDULES[config.schedule]())
    device = find_device(config.device)
    points = problem.data
    if points is None:
        points = problem.sample(config.samples, torch.Generator().manual_seed(config.seed))
    data = points.to(device)
    denoiser = build_network_denoiser(config, problem).to(device)
    levels = NoiseLevels(denoiser.schedule, config.distribution, named_weight("edm", problem.data_std))

    def loss(denoiser: Preconditioned, progress: float, rng: torch.Generator) -> Tensor:
        x = data[torch.randint(len(data), (config.batch,), generator=rng, device=device)]
        return dsm_loss(denoiser, x, levels.draw(x.shape[1:], len(x), progress, rng)).mean()

    training = TrainingConfig(
        steps=config.steps,
        max_minutes=config.max_minutes,
        lr=config.lr,
        warmup=0.0,
        ema=config.ema,
        seed=config.seed,
    )
    fit = Fit(denoiser, loss, training)
    folder = fit.run(config, out, resume, WEIGHTS, save_weights)
    errors = teacher_errors(fit.average, problem, device)
    if not all(math.isfinite(error) for values in errors.values() for error in values):
        raise Diverged("the teacher's errors are not finite: try a smaller lr")
    write_whole(folder.path / "evaluation.json", json.dumps(errors, indent=2))
    return fit.average


def build_network_denoiser(config: PointsTeachConfig, problem: Problem, mixed: bool = False) -> Preconditioned:
    """An untrained network denoiser for the problem; `mixed`: its hidden layers in bfloat16."""
    (data,) = problem.data_shape
    with initial_weights(config.seed):
        network = LevelMLP(data, data, config.depth, config.width, mixed=mixed)
    return Preconditioned(network, problem.data_std, SCHEDULES[config.schedule]())


def save_weights(denoiser: Preconditioned, path: Path) -> None:
    """The weights as safetensors, whole or not at all."""
    with whole(path) as partial:
        save_file(denoiser.state_dict(), partial)


def load_teacher(path: Path) -> Preconditioned:
    """The denoiser of a run of `teach`; raises UsageError where the folder is none or its weights do not fit."""
    folder = open_run(path)
    config: PointsTeachConfig = config_files.read(PointsTeachConfig, folder.config)
    denoiser = build_network_denoiser(config, PROBLEMS[config.problem](SCHEDULES[config.schedule]()))
    try:
        weights = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the teacher {path / WEIGHTS} is missing, truncated or not safetensors: {error}") from error
    match("denoiser", weights, denoiser.state_dict())
    denoiser.load_state_dict(weights)
    return denoiser.eval()


@torch.no_grad()
def teacher_errors(denoiser: Denoiser, problem: Problem, device: torch.device) -> dict[str, list[float]]:
    """How wrong a denoiser is at seven ratios from 1/230 to 1.7 standard deviations of the data.

    With an exact denoiser, `relative_score_error`: √(E‖s − s*‖² / E‖s*‖²) over noisy data. Without, but with
    held-out data, `held_out_error`: E‖D − x‖² per dimension over them.
    """
    rng = torch.Generator(device).manual_seed(0)
    ratios = problem.data_std * torch.logspace(math.log10(1 / 230), math.log10(1.7), 7, device=device)
    exact = None if problem.denoiser is None else problem.denoiser.to(device)
    errors = []
    for ratio in ratios.tolist():
        x = problem.sample(ERROR_SAMPLES, rng) if exact is not None else _held_out(problem).to(device)
        noise = noise_level(denoiser.schedule, ratio, x, rng)
        x_t = noise.x_t(x)
        if exact is None:
            errors.append(float((denoiser(x_t, noise.t) - x).pow(2).mean()))
        else:
            s: Tensor = score(exact, x_t, noise.t)
            errors.append(float(((score(denoiser, x_t, noise.t) - s).pow(2).mean() / s.pow(2).mean()).sqrt()))
    return {"ratios": ratios.tolist(), "held_out_error" if exact is None else "relative_score_error": errors}


def _held_out(problem: Problem) -> Tensor:
    if problem.held_out is None:
        raise UsageError(f"{problem.name} has neither an exact denoiser nor held-out data to measure a teacher with")
    return problem.held_out
