r"""How noisy a step's gradient is, and how far off in the mean, per noise level.

For the gradient g of one step's mean loss in the generator's parameters, at one fixed student and one ratio r,

    SNR = ‖E g‖² / tr Cov(g),

estimated from n independent steps as (‖ḡ‖² − s²/n)/s², with ḡ their mean and s² the unbiased trace of their covariance:
unbiased in the numerator, and the weight w(t) cancels. In a sum all parts are at this ratio, and their weights do not
cancel: they are those of training, λ as at its start, near which the student is.
At an SNR of 1 a step's noise is as long as the mean. Of an objective that follows the diffusive KL, with G the exact
gradient of w(t)/d DiKL_t (s_θ by quadrature) on the same draws,

    bias = ‖E (g − G)‖/‖E G‖,

both from U-statistics (`metrics.critic`), so that noise does not count as bias: 0 for a negative one.

The student is the same for every objective: one that the demo's preset has trained for `STEPS` steps; auxiliary
networks are then fitted to it, at all levels, for `CRITIC_STEPS` steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vardistill.bench.named import BIAS, BIASED, RATIOS, SNR
from vardistill.bench.page import line
from vardistill.bench.results import Results
from vardistill.diffusion.denoiser import score
from vardistill.diffusion.levels import LogNormal
from vardistill.diffusion.noise import NoiseLevels
from vardistill.metrics.bound import Quadrature
from vardistill.metrics.critic import squared_norm
from vardistill.objectives.base import STUDENT, Update
from vardistill.reports.figures import MUTED, bare, doublings, legend_beside, ticks
from vardistill.runs.config import Config
from vardistill.runs.distill import distill
from vardistill.runs.experiment import build_domain, real_samples
from vardistill.runs.presets.points import DEMO
from vardistill.students import Student
from vardistill.training.folder import RunFolder
from vardistill.training.loop import Trainer

STEPS, CRITIC_STEPS = 500, 3000
"""Of the student's training, and of the auxiliary networks' at that student."""

DRAWS = 48
"""n, steps per level."""

NODES = 192
"""Of the quadrature, per latent dimension."""


def gradient_noise(config: Config, folder: RunFolder) -> dict[str, float]:
    """The SNR of a step of `config` at every one of `RATIOS`, as `snr_RATIO`."""
    trainer = trainer_of(config, partly_trained(config))
    fit_auxiliary(trainer)
    return {name: signal_to_noise(trainer, ratio) for name, ratio in zip(SNR, RATIOS, strict=True)}


def trainer_of(config: Config, student: Student) -> Trainer:
    """The trainer of a run, with this student."""
    domain = build_domain(config)
    domain.load(None)
    training = replace(config.training, ema=0.0, tracker="none", log_every=10**9, eval_every=0)
    levels, objective = config.levels.build(domain.schedule, domain.data_std), config.objective.build(domain)
    return Trainer(student, objective, levels, training, data=real_samples(config, domain, objective))


def partly_trained(config: Config) -> Student:
    """The student that all objectives are measured at."""
    seed = config.training.seed
    training = replace(DEMO.training, seed=seed, steps=STEPS, eval_every=0, tracker="none", ema=0.0)
    domain = build_domain(replace(DEMO, training=training))
    domain.load(None)
    levels = DEMO.levels.build(domain.schedule, domain.data_std)
    return distill(domain.student, objective=DEMO.objective.build(domain), levels=levels, training=training).generator


def fit_auxiliary(trainer: Trainer) -> None:
    """Fit posterior or critic to the student as it is, by each update's loss as far as it trains them."""
    for step in range(CRITIC_STEPS):
        trainer.set_learning_rates(step / CRITIC_STEPS)
        for number, update in enumerate(trainer.objective.updates(step / CRITIC_STEPS)):
            if own := tuple(name for name in update.trains if name != STUDENT):
                trainer.update(replace(update, trains=own), step / CRITIC_STEPS, number)
        trainer.step += 1


def gradient_bias(config: Config, folder: RunFolder) -> dict[str, float]:
    """The bias of a step of `config` at every one of `BIASED`, as `bias_RATIO`, and a step's processor time."""
    trainer = trainer_of(config, partly_trained(config))
    fit_auxiliary(trainer)
    with torch.no_grad():
        exact = Quadrature(trainer.student, NODES, trainer.skipped.device)
    found, started = {}, time.process_time()
    for ratio in BIASED:
        update = at_ratio(trainer, ratio)
        for _ in range(DRAWS):
            gradient(trainer, update)
    found["step_ms"] = 1000 * (time.process_time() - started) / (len(BIASED) * DRAWS)
    for name, ratio in zip(BIAS, BIASED, strict=True):
        update = at_ratio(trainer, ratio)
        pairs = [beside_exact(trainer, update, exact) for _ in range(DRAWS)]
        own, wanted = (torch.stack(v).double() for v in zip(*pairs, strict=True))
        (off, of_kl), _ = squared_norm(torch.stack([v @ v.T for v in (own - wanted, wanted)]))
        found[name] = math.sqrt(max(0.0, float(off / of_kl)))
    return found


def beside_exact(trainer: Trainer, update: Update, exact: Quadrature) -> tuple[Tensor, Tensor]:
    """The student's gradient in one step, and that of w(t)/d DiKL_t on the same draw, both flat."""
    drawn = trainer.draw(update, 0.0, 0)
    g = gradient(trainer, update)  # which draws the same, and goes on to the next step
    draw = drawn.complete(trainer.student, drawn.z, trainer.generate(drawn.z, 1, {}), trainer.generate)
    noise, teacher = draw.noise, trainer.objective.teacher
    assert teacher is not None
    with torch.no_grad():
        s_theta = exact.score(draw.x_t, noise.alpha, noise.sigma).to(draw.x).view_as(draw.x)
        difference = noise.weight[:, None] * (s_theta - score(teacher, draw.x_t, noise.t)) / draw.x[0].numel()
    parameters = trainer.trainable[STUDENT]
    wanted = torch.autograd.grad((difference * draw.x_t).sum() / len(draw.x), parameters)
    return g, torch.cat([v.flatten() for v in wanted])


def at_ratio(trainer: Trainer, ratio: float) -> Update:
    """The student's update at one ratio, of the student alone."""
    *_, update = trainer.objective.updates(0.0)
    own = update.needs.levels or trainer.draws.levels
    others = tuple(at_level(levels, ratio) for levels in update.needs.other_levels)
    needs = replace(update.needs, levels=at_level(own, ratio), other_levels=others)
    return replace(update, trains=(STUDENT,), needs=needs)


def signal_to_noise(trainer: Trainer, ratio: float) -> float:
    """(‖ḡ‖² − s²/n)/s² over `DRAWS` steps at this ratio."""
    update = at_ratio(trainer, ratio)
    g = torch.stack([gradient(trainer, update) for _ in range(DRAWS)])
    variance = g.var(0).sum()
    return float((g.mean(0).square().sum() - variance / DRAWS) / variance)


def at_level(levels: NoiseLevels, ratio: float) -> NoiseLevels:
    """The levels with one ratio alone."""
    return replace(levels, distribution=LogNormal(base_start=ratio, base_end=ratio, spread=0.0))


def gradient(trainer: Trainer, update: Update) -> Tensor:
    """The student's gradient in one step, flat."""
    trainer.backward(update, trainer.draw(update, 0.0, 0))
    trainer.step += 1
    g = torch.cat([p.grad.flatten() for p in trainer.trainable[STUDENT] if p.grad is not None])
    trainer.optimizers[STUDENT].zero_grad(set_to_none=True)
    return g


def figures(results: Results) -> dict[str, Figure]:
    """The SNR against the ratio: each row's mean, and its seeds as dots; a logarithmic axis has no place below 0."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for i, (row, found) in enumerate(results.rows.items()):
        snr = torch.tensor([[result.values.get(name, math.nan) for name in SNR] for result in found])
        ax.plot(RATIOS, snr.nanmean(0).numpy(), **line(i), label=row.objective, linewidth=1.4, alpha=0.85)
        ax.plot(RATIOS, snr.T.numpy(), "o", color=line(i)["color"], ms=2.5, alpha=0.6)
    bare(ax)
    doublings(ax, RATIOS)
    ax.set_yscale("log", nonpositive="mask")
    ax.set_xlabel("noise-to-signal ratio σ/α", fontsize=9, color=MUTED)
    ticks(ax, "log")
    legend_beside(figure)
    return {"Signal-to-noise ratio of a gradient, by noise level": figure}
