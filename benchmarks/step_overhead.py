"""What the trainer costs over a bare loop, and where a step's time goes: `python benchmarks/step_overhead.py`.

The bare loop draws, runs the same networks on the same batch with the same optimiser and keeps the same moving average,
in plain PyTorch with nothing of the trainer: no clock, log, progress bar, check for NaN. Both run in turns in one
process, and the ratio is over pairs of turns. The choices behind the step are timed against what they replaced.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from measured import write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vardistill.denoisers.mixture import mixture_of_points
from vardistill.diffusion.noise import Draw
from vardistill.objectives import Objective
from vardistill.runs.config import Config
from vardistill.runs.experiment import build_domain
from vardistill.runs.presets import find_preset
from vardistill.training.loop import Trainer


@dataclass(frozen=True)
class Arguments:
    """Trainer against bare loop, and the bare loop's phases."""

    preset: str = "mog40-vardiu"
    turns: int = 6
    steps: int = 200
    threads: int = 1


class BareLoop:
    """The step of a preset without the trainer, timed in phases."""

    def __init__(self, config: Config) -> None:
        self.config, domain = config, build_domain(config)
        domain.load(None)
        self.generator = domain.student
        self.objective: Objective = config.objective.build(domain)
        self.pool = self.objective.needs.pool
        self.average = copy.deepcopy(self.generator)
        self.levels = config.levels.build(domain.schedule, domain.data_std)
        self.rng = torch.Generator().manual_seed(config.training.seed)
        betas = (config.training.beta1, config.training.beta2)
        self.optimizer = torch.optim.AdamW(
            self.generator.parameters(), lr=1e-4, betas=betas, weight_decay=0, fused=True
        )
        self.phases: dict[str, float] = {}

    def generate(self, z: Tensor) -> Tensor:
        """g(z) in the preset's precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.training.precision == "bf16"):
            x: Tensor = self.generator(z)
        return x

    def step(self, progress: float) -> None:
        """One update."""
        mark = time.perf_counter()

        def phase(name: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            self.phases[name] = self.phases.get(name, 0.0) + now - mark
            mark = now

        training = self.config.training
        z = self.generator.latents(training.batch, self.rng)
        noise = self.levels.draw(self.generator.data_shape, training.batch, progress, self.rng)
        pool = self.generator.latents(self.pool, self.rng) if self.pool else None
        phase("draws")
        x = self.generate(z)
        phase("generator, forward")
        draw = Draw(noise.rows(z), noise.rows(x), noise, self.generate, pool=pool)
        loss = self.objective.generator_loss(draw).mean()
        phase("objective: teacher's score, pool and candidates")
        loss.backward()
        phase("generator, backward")
        nn.utils.clip_grad_norm_(self.generator.parameters(), training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        phase("clipping and optimiser")
        with torch.no_grad():
            averages, parameters = list(self.average.parameters()), list(self.generator.parameters())
            torch._foreach_lerp_(averages, parameters, 1 - training.ema)
        phase("moving average")


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def choices(bare: BareLoop) -> dict[str, dict[str, float]]:
    """Milliseconds of what the step does and of what it replaced."""
    rng, n = torch.Generator().manual_seed(0), bare.config.training.batch
    z = bare.generator.latents(n, rng)
    points = bare.generator(bare.generator.latents(n + bare.pool, rng)).detach()
    noise = bare.levels.draw((2,), n, 0.5, rng)
    x_t = noise.x_t(points[:n])
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in bare.generator.parameters()]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=rng) * 1e-3

    def plain_candidates() -> Tensor:
        log_w = -(torch.cdist(x_t, points) ** 2) / (2 * noise.sigma[:, None] ** 2)
        return torch.logsumexp(log_w, 1).sum() - math.log(n) + (torch.softmax(log_w, 1) @ points).sum()

    fused, looped = torch.optim.AdamW(parameters, fused=True), torch.optim.AdamW(parameters, foreach=False)
    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "generator forward and backward: single precision → bfloat16 hidden layers": (
            lambda: bare.generator(z).sum().backward(),
            lambda: bare.generate(z).sum().backward(),
        ),
        "candidates: logsumexp and softmax of the whole matrix → clamped blocks": (
            plain_candidates,
            lambda: mixture_of_points(x_t, points, noise.alpha, noise.sigma),
        ),
        "AdamW: one parameter at a time → fused": (looped.step, fused.step),
    }
    return {name: {"before, ms": timed(before), "after, ms": timed(after)} for name, (before, after) in parts.items()}


def timed(call: Callable[[], object], repeats: int = 40) -> float:
    """Median milliseconds of a call."""
    for _ in range(3):
        call()
    return statistics.median(seconds(call) for _ in range(repeats)) * 1e3


def main(arguments: Arguments) -> None:
    """Run, print, and write results/step_overhead.json."""
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    config = find_preset(arguments.preset)
    bare = BareLoop(config)

    def bare_turn() -> None:
        for i in range(arguments.steps):
            bare.step(i / arguments.steps)

    bare_turn()
    bare.phases.clear()
    pairs = [(seconds(bare_turn), seconds(_trainer(config, arguments.steps).run)) for _ in range(arguments.turns)]
    ratios = sorted(t / b for b, t in pairs)
    step = statistics.median(b for b, _ in pairs) / arguments.steps * 1e3
    total = sum(bare.phases.values())
    shares = {name: spent / total for name, spent in bare.phases.items()}
    title = f"{arguments.preset}: bare step {step:.2f} ms, {arguments.threads} thread(s)"
    table = Table("phase", "ms a step", "share", title=title)
    for name, share in shares.items():
        table.add_row(name, f"{share * step:.2f}", f"{share:.0%}")
    Console().print(table)
    median = statistics.median(ratios)
    print(
        f"trainer / bare loop: median {median:.3f}, "
        f"pairs from {ratios[0]:.3f} to {ratios[-1]:.3f} ({len(ratios)} pairs)"
    )
    replaced = choices(bare)
    for name, times in replaced.items():
        print(f"{name}: {times['before, ms']:.2f} → {times['after, ms']:.2f} ms")
    rows = {"ratio": {"median": median, "pairs": ratios}, "bare step, ms": step, "shares": shares, "choices": replaced}
    write_results("step_overhead", rows, arguments.threads, 1, preset=arguments.preset)


def _trainer(config: Config, steps: int) -> Trainer:
    """A run of `steps` steps that logs as the preset does and evaluates nothing."""
    training = dataclasses.replace(config.training, steps=steps)
    domain = build_domain(config)
    domain.load(None)
    levels = config.levels.build(domain.schedule, domain.data_std)
    return Trainer(domain.student, config.objective.build(domain), levels, training)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
