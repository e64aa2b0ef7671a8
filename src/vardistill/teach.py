"""Fitting a teacher: denoising score matching on a sample of a problem (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from vardistill import config as configs
from vardistill.build import build_network_denoiser, build_problem
from vardistill.checkpoints import match
from vardistill.config import TeachConfig
from vardistill.denoisers import Denoiser, Preconditioned, dsm_loss, score
from vardistill.devices import find_device
from vardistill.errors import UsageError
from vardistill.metrics.bound import noise_level
from vardistill.noise_levels import NoiseLevels, named_weight
from vardistill.problems import Problem
from vardistill.runs import create, environment, open_run, write_whole

WEIGHTS = "denoiser.safetensors"

ERROR_SAMPLES = 4096
"""Noisy points per ratio for a teacher's error."""


def teach(config: TeachConfig, out: Path) -> Preconditioned:
    """Fit a network denoiser to the problem and keep it in the run folder `out`.

    The data are all that the problem has or, where it is a distribution, `config.samples` points of it.

    Each step takes a batch of the data, noises it and lowers the EDM-weighted denoising error; the result is the moving
    average of the weights. `evaluation.json` holds its errors, see `teacher_errors`.

    Raises:
        UsageError: for a folder that cannot be used or a device that is not there.
    """
    folder = create(out, resumable=False)
    write_whole(folder.environment, json.dumps(environment(), indent=2))
    configs.write(config, folder.config)
    problem = build_problem(config.problem, config.schedule)
    device = find_device(config.device)
    rng = torch.Generator(device).manual_seed(config.seed)
    data = problem.data
    if data is None:
        data = problem.sample(config.samples, torch.Generator().manual_seed(config.seed))
    data = data.to(device)
    denoiser = build_network_denoiser(config, problem).to(device)
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    levels = NoiseLevels(denoiser.schedule, config.distribution, named_weight("edm", problem.data_std))
    started = time.monotonic()
    for step, progress in _progress(config, started):
        optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        x = data[torch.randint(len(data), (config.batch,), generator=rng, device=device)]
        loss = dsm_loss(denoiser, x, levels.draw(x.shape[1:], len(x), progress, rng)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
        if (step + 1) % 100 == 0:
            folder.log("train", step + 1, time.monotonic() - started, {"loss": float(loss.detach())})
    save_file(average.state_dict(), folder.path / f"{WEIGHTS}.partial")
    (folder.path / f"{WEIGHTS}.partial").replace(folder.path / WEIGHTS)
    errors = teacher_errors(average, problem, device)
    write_whole(folder.path / "evaluation.json", json.dumps(errors, indent=2))
    return average


def load_teacher(path: Path) -> Preconditioned:
    """The denoiser of a run of `teach`; raises UsageError where the folder is none or its weights do not fit."""
    folder = open_run(path)
    config: TeachConfig = configs.read(TeachConfig, folder.config)
    denoiser = build_network_denoiser(config, build_problem(config.problem, config.schedule))
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


def _progress(config: TeachConfig, started: float) -> Iterator[tuple[int, float]]:
    """Steps and the run's progress, until the steps or the budget are spent."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    for step in tqdm(range(config.steps), desc="teacher", unit="step", mininterval=interval):
        progress = step / config.steps
        if config.max_minutes is not None:
            progress = max(progress, (time.monotonic() - started) / (60 * config.max_minutes))
        if progress >= 1:
            return
        yield step, progress
