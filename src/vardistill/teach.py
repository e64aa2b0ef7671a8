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
from vardistill.noise_levels import Noise, NoiseLevels, named_weight
from vardistill.problems import Problem
from vardistill.runs import create, open_run

WEIGHTS = "denoiser.safetensors"


def teach(config: TeachConfig, out: Path) -> Preconditioned:
    """Fit a network denoiser to `config.samples` points of the problem and keep it in the run folder `out`.

    Each step takes a batch of the data, noises it and lowers the EDM-weighted denoising error; the result is the moving
    average of the weights. `evaluation.json` holds its error against the exact score, see `score_errors`.

    Raises:
        UsageError: for a folder that cannot be used or a device that is not there.
    """
    folder = create(out)
    configs.write(config, folder.config)
    problem = build_problem(config.problem, config.schedule)
    device = find_device(config.device) or torch.device("cpu")
    rng = torch.Generator(device).manual_seed(config.seed)
    data = problem.sample(config.samples, torch.Generator().manual_seed(config.seed)).to(device)
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
        torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
        if (step + 1) % 100 == 0:
            folder.log("train", step + 1, time.monotonic() - started, {"loss": float(loss.detach())})
    save_file(average.state_dict(), folder.path / f"{WEIGHTS}.partial")
    (folder.path / f"{WEIGHTS}.partial").replace(folder.path / WEIGHTS)
    problem.denoiser.to(device)
    errors = score_errors(average, problem)
    (folder.path / "evaluation.json").write_text(json.dumps(errors, indent=2))
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
def score_errors(denoiser: Denoiser, problem: Problem, samples: int = 4096) -> dict[str, list[float]]:
    """The relative score error √(E‖s − s*‖² / E‖s*‖²) over noisy data, at seven ratios from 0.1 to 40."""
    device = problem.denoiser.means.device
    rng = torch.Generator(device).manual_seed(0)
    ratios = torch.logspace(math.log10(0.1), math.log10(40), 7, device=device)
    errors = []
    for ratio in ratios:
        x = problem.sample(samples, rng)
        t = denoiser.schedule.time(ratio.expand(samples))
        alpha, sigma = denoiser.schedule(t)
        noise = Noise(t, alpha, sigma, torch.ones_like(t), torch.randn(x.shape, generator=rng, device=device), samples)
        x_t = noise.x_t(x)
        exact: Tensor = score(problem.denoiser, x_t, t)
        errors.append(float(((score(denoiser, x_t, t) - exact).pow(2).mean() / exact.pow(2).mean()).sqrt()))
    return {"ratios": ratios.tolist(), "relative_score_error": errors}


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
