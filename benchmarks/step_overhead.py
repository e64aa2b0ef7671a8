"""What the trainer costs over a bare loop, and where a step's time goes: `python benchmarks/step_overhead.py`.

The bare loop draws, runs the same networks on the same batch with the same optimiser and keeps the same moving average,
in plain PyTorch with nothing of the trainer. Both run in turns in one process, and the ratio is over pairs of turns.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from cells import write_results
from rich.console import Console
from rich.table import Table
from torch import nn

from vardistill.build import build_generator, build_levels, build_objective, build_problem
from vardistill.config import Config
from vardistill.noise_levels import Draw
from vardistill.presets import PRESETS
from vardistill.training import Trainer


@dataclass(frozen=True)
class Arguments:
    """Trainer against bare loop, and the bare loop's phases."""

    preset: str = "mog40-vardiu"
    turns: int = 12
    steps: int = 100
    threads: int = 1


class BareLoop:
    """The step of a preset without the trainer, timed in phases."""

    def __init__(self, config: Config) -> None:
        self.config, problem = config, build_problem(config.problem, config.levels.schedule)
        self.generator = build_generator(config, problem)
        self.objective = build_objective(config, problem, problem.denoiser)
        self.average = copy.deepcopy(self.generator)
        self.levels = build_levels(config.levels, problem)
        self.rng = torch.Generator().manual_seed(config.training.seed)
        betas = (config.training.beta1, config.training.beta2)
        self.optimizer = torch.optim.AdamW(
            self.generator.parameters(), lr=1e-4, betas=betas, weight_decay=0, fused=True
        )
        self.phases: dict[str, float] = {}

    def step(self) -> None:
        """One update."""
        mark = time.perf_counter()

        def phase(name: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            self.phases[name] = self.phases.get(name, 0.0) + now - mark
            mark = now

        training = self.config.training
        z = self.generator.latents(training.batch, self.rng)
        noise = self.levels.draw(self.generator.data_shape, training.batch, 0.5, self.rng)
        phase("draws")
        with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
            x = self.generator(z)
        phase("generator, forward")
        draw = Draw(noise.rows(z), noise.rows(x), noise, self.generator)
        loss = self.objective.generator_loss(draw).mean()
        phase("objective: teacher's score and candidates")
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


def main(arguments: Arguments) -> None:
    """Run, print, and write results/step_overhead.json."""
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    config = PRESETS[arguments.preset].config
    training = dataclasses.replace(config.training, steps=10**9, log_every=100, eval_every=0, checkpoint_every=10**9)
    bare, trainer = BareLoop(config), _trainer(dataclasses.replace(config, training=training))

    def trainer_turn() -> None:
        for _ in range(arguments.steps):
            trainer.advance(0.5)

    def bare_turn() -> None:
        for _ in range(arguments.steps):
            bare.step()

    bare_turn(), trainer_turn()
    bare.phases.clear()
    pairs = [(seconds(bare_turn), seconds(trainer_turn)) for _ in range(arguments.turns)]
    ratios = sorted(t / b for b, t in pairs)
    step = statistics.median(b for b, _ in pairs) / arguments.steps * 1e3
    total = sum(bare.phases.values())
    shares = {name: spent / total for name, spent in bare.phases.items()}
    table = Table(
        "phase",
        "ms a step",
        "share",
        title=f"{arguments.preset}: bare step {step:.2f} ms, {arguments.threads} thread(s)",
    )
    for name, share in shares.items():
        table.add_row(name, f"{share * step:.2f}", f"{share:.0%}")
    Console().print(table)
    median = statistics.median(ratios)
    print(
        f"trainer / bare loop: median {median:.3f}, "
        f"pairs from {ratios[0]:.3f} to {ratios[-1]:.3f} ({len(ratios)} pairs)"
    )
    rows = {"ratio": {"median": median, "pairs": ratios}, "bare step, ms": step, "shares": shares}
    write_results("step_overhead", rows, arguments.threads, 1, preset=arguments.preset)


def _trainer(config: Config) -> Trainer:
    problem = build_problem(config.problem, config.levels.schedule)
    generator = build_generator(config, problem)
    objective = build_objective(config, problem, problem.denoiser)
    return Trainer(generator, objective, build_levels(config.levels, problem), config.training)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
