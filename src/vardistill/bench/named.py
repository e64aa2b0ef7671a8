"""The benches that `vardistill bench` knows. Importing this module does not import torch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from vardistill.bench.cells import Bench, Budget, Cell, grid
from vardistill.diffusion.levels import LogNormal
from vardistill.domains.points.presets import (
    DEMO,
    MOG40,
    VARDIU_VARFLOW,
    VARFLOW,
    PosteriorName,
    adapted,
    diff_instruct,
    learned_posterior,
    learned_posterior_varflow,
)
from vardistill.runs.config import Config, DiffInstructConfig, ProblemName, TeacherConfig, VarDiUConfig

QUALITY = ("log_density_gap", "log_mmd", "mmd_p_value", "modes_found", "mode_tv", "off_mode", "dikl")


def tiny(config: Config) -> Config:
    """The configuration with small networks and few samples."""
    training = replace(config.training, batch=64, eval_samples=500, log_every=5, checkpoint_every=5)
    return replace(config, generator=replace(config.generator, width=16, depth=1), training=training)


def with_objective(config: Config, **changes: Any) -> Config:
    """The configuration with changes to its objective."""
    return replace(config, objective=replace(config.objective, **changes))


def with_levels(config: Config, **changes: Any) -> Config:
    """The configuration with changes to its levels."""
    return replace(config, levels=replace(config.levels, **changes))


def with_batch(config: Config, batch: int) -> Config:
    """The configuration with so many latents per step."""
    return replace(config, training=replace(config.training, batch=batch))


def with_rates(config: Config, student: float = 1.0, auxiliary: float = 1.0) -> Config:
    """The configuration with so many times its learning rates."""
    t = config.training
    return replace(config, training=replace(t, lr=student * t.lr, auxiliary_lr=auxiliary * t.auxiliary_lr))


def with_noise(config: Config, factor: float) -> Config:
    """The configuration with so many times its annealed noise levels."""
    levels = config.levels.distribution
    assert isinstance(levels, LogNormal)
    return with_levels(
        config,
        distribution=replace(levels, base_start=factor * levels.base_start, base_end=factor * levels.base_end),
    )


SMOKE = {
    "batch candidates": tiny(DEMO),
    "diagonal": replace(
        tiny(learned_posterior("diagonal")),
        objective=VarDiUConfig(posterior="diagonal", posterior_width=16, posterior_depth=1),
    ),
    "VarFlow": tiny(VARFLOW),
    "Diff-Instruct": replace(tiny(diff_instruct(2)), objective=DiffInstructConfig(2, critic_depth=1, critic_width=16)),
}

OBJECTIVES = {
    "VarDiU, batch candidates": DEMO,
    "VarDiU, diagonal": learned_posterior("diagonal"),
    "VarDiU, full": learned_posterior("full"),
    "VarDiU, mixture": learned_posterior("mixture"),
    "VarDiU, NSF": learned_posterior("nsf"),
    "VarDiU, full, 4 candidates": learned_posterior("full", candidates=4),
    "VarFlow": VARFLOW,
    "VarDiU + VarFlow": VARDIU_VARFLOW,
    "Diff-Instruct 1": diff_instruct(1),
    "Diff-Instruct 5": diff_instruct(5),
    "Diff-Instruct 10": diff_instruct(10),
}
"""What MoG-40 is distilled with."""

TEACHERS = {
    "true": TeacherConfig("true"),
    "empirical": TeacherConfig("empirical"),
    "learned": TeacherConfig("learned"),
}

MAIN = ("VarDiU, batch candidates", "VarDiU, full", "VarFlow", "VarDiU + VarFlow", "Diff-Instruct 5")

STARTED = (*MAIN, "Diff-Instruct 1")

STARTS = {
    f"{name}, {start} start": replace(
        OBJECTIVES[name], generator=replace(OBJECTIVES[name].generator, linear=start == "linear")
    )
    for name, start in itertools.product(STARTED, ("linear", "random"))
}
"""What the student's first map is worth."""

TUNED: dict[str, dict[str, Config]] = {
    "VarDiU, batch candidates": {f"pool {pool}": with_objective(DEMO, pool=pool) for pool in (1024, 2048)},
    "VarDiU, full": {
        f"posterior's rate × {factor:g}": with_rates(learned_posterior("full"), auxiliary=factor) for factor in (0.5, 2)
    },
    "VarFlow": {f"β = {beta:g}": with_objective(VARFLOW, beta=beta) for beta in (0.25, 1.0)},
    "VarDiU + VarFlow": {
        f"λ × {factor:g}": with_objective(VARDIU_VARFLOW, varflow_weight=0.3 * factor, varflow_weight_end=0.03 * factor)
        for factor in (0.3, 3)
    },
    "Diff-Instruct 5": {
        f"critic's rate × {factor:g}": with_rates(diff_instruct(5), auxiliary=factor) for factor in (0.5, 2)
    },
}
"""The choice that is each objective's own, moved either way."""


def neighbours(name: str) -> dict[str, Config]:
    """A preset, and eight that differ from it in one thing: rates, noise levels, batch, and the objective's own."""
    preset = OBJECTIVES[name]
    factors = (0.5, 2)
    moved = (
        {f"rates × {f:g}": with_rates(preset, f, f) for f in factors}
        | {f"noise × {f:g}": with_noise(preset, f) for f in factors}
        | {f"batch × {f:g}": with_batch(preset, int(f * preset.training.batch)) for f in factors}
        | TUNED[name]
    )
    return {name: preset} | {f"{name}, {choice}": config for choice, config in moved.items()}


FITTED = {f"learned, {n // 1000}k": TeacherConfig("learned", teacher_samples=n) for n in (1_000, 5_000, 10_000)}

FAMILIES: tuple[PosteriorName, ...] = ("diagonal", "full", "mixture", "nsf")

CAPACITY = {
    f"{posterior}, width {width}": with_objective(learned_posterior(posterior), posterior_width=width)
    for posterior, width in itertools.product(FAMILIES, (32, 128, 512))
} | {"batch candidates": DEMO, "batch candidates + VarFlow": VARDIU_VARFLOW}

ABLATION = (
    {f"β = {beta:g}": with_objective(VARFLOW, beta=beta) for beta in (0.5, 1.0, 1.5, 1.9)}
    | {f"weight {weight}": with_levels(VARFLOW, weight=weight) for weight in ("sigma2", "inverse_sigma", "snr")}
    | {
        f"K = {k}": with_levels(VARFLOW, shared=VARFLOW.training.batch // k)
        for k in (4, 8, 16, 32, 128, 256, 512, 1024)
    }
    | {"paired": with_objective(VARFLOW, cross="paired")}
)
"""VarFlow's choices one at a time, beside its preset: β = 0.5, weight 1, groups of K = 64, all pairs. The rows of a
step are always 1024: they make 1024/K groups."""

HIGH = {
    "VarDiU, batch candidates": DEMO,
    "VarDiU, diagonal": learned_posterior("diagonal"),
    "VarDiU, full": learned_posterior("full"),
    "VarDiU, mixture": learned_posterior("mixture"),
    "VarDiU, NSF": learned_posterior("nsf"),
    "VarFlow": VARFLOW,
    "VarDiU, full + VarFlow": learned_posterior_varflow("full"),
    "Diff-Instruct 5": diff_instruct(5),
}
"""What is compared over dimensions."""

RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""r = σ_t/α_t, at which gradients are measured."""

SNR = tuple(f"snr_{ratio:g}" for ratio in RATIOS)

DIAGONAL_1024, FULL_1024 = (
    with_levels(with_batch(learned_posterior(posterior), 1024), draws=1, antithetic=False) for posterior in FAMILIES[:2]
)

VARIANCE = {
    "VarDiU, batch candidates": DEMO,
    "VarDiU, diagonal": DIAGONAL_1024,
    "VarDiU, full": FULL_1024,
    "VarDiU, full, antithetic": learned_posterior("full"),
    "VarDiU, full, c = 0": with_objective(FULL_1024, control_variate="zero"),
    "VarFlow": VARFLOW,
    "VarFlow, paired": with_objective(VARFLOW, cross="paired"),
    "VarDiU + VarFlow": VARDIU_VARFLOW,
    "Diff-Instruct 5": with_batch(diff_instruct(5), 1024),
}
"""Steps of 1024 rows each: an antithetic pair is two. Diff-Instruct has one row, as its critic is fitted to a student
that stays as it is: steps of the critic per update make no difference."""


def over_dimensions(seeds: int) -> list[Cell]:
    """The mixtures with their exact teachers, and digits with an empirical and a learned one; first seeds first."""
    mixtures: tuple[ProblemName, ...] = ("mixture2", "mixture8", "mixture32", "mixture128")
    digits = {"empirical": TeacherConfig("empirical", bandwidth=0.15), "learned": TeacherConfig("learned")}
    cells = []
    for problem in (*mixtures, "digits"):
        objectives = {label: adapted(config, problem) for label, config in HIGH.items()}
        cells += grid(objectives, digits if problem == "digits" else {"true": TEACHERS["true"]}, seeds=seeds)
    return sorted(cells, key=lambda cell: cell.seed)


_ALL = (
    Bench(
        "smoke",
        "that benches work: four objectives, 20 steps each",
        lambda seeds: grid(SMOKE, seeds=seeds),
        metrics=QUALITY,
        curves=("log_mmd",),
        seeds=2,
        budget=Budget("steps", 20),
    ),
    Bench(
        "quality",
        "how close to MoG-40 the default and the demo come, each with its own number of steps",
        lambda seeds: grid({"mog40-vardiu": MOG40, "mog40-vardiu-demo": DEMO}, seeds=seeds),
        metrics=QUALITY,
        curves=("log_mmd", "mode_tv"),
    ),
    Bench(
        "mog40",
        "objectives on MoG-40 with its true, an empirical and a learned teacher",
        lambda seeds: grid(OBJECTIVES, TEACHERS, seeds=seeds),
        metrics=("log_density", *QUALITY, "gap", "critic_error", "gradient_bias"),
        curves=("log_mmd", "dikl"),
        budget=Budget("cpu", 3),
    ),
    Bench(
        "tuning",
        "five objectives' presets and their neighbours: as many for each, one thing moved at a time",
        lambda seeds: grid({label: c for name in TUNED for label, c in neighbours(name).items()}, seeds=seeds),
        metrics=("log_density", *QUALITY),
        curves=("log_mmd",),
        seeds=1,
        budget=Budget("cpu", 1),
    ),
    Bench(
        "start",
        "students that start as a linear map against random weights",
        lambda seeds: grid(STARTS, seeds=seeds),
        metrics=("log_density", *QUALITY, "gap"),
        curves=("log_mmd", "modes_found"),
        budget=Budget("cpu", 1),
    ),
    Bench(
        "posterior-capacity",
        "the gap DiU − DiKL over training, by posterior family and width",
        lambda seeds: grid(CAPACITY, seeds=seeds),
        metrics=("gap", "diu", "dikl", "log_density_gap", "log_mmd", "modes_found"),
        curves=("gap", "dikl"),
        budget=Budget("cpu", 2),
    ),
    Bench(
        "teacher-quality",
        "objectives with teachers fitted to 1,000, 5,000 and 10,000 samples",
        lambda seeds: grid({name: OBJECTIVES[name] for name in MAIN}, FITTED, seeds=seeds),
        metrics=("teacher_error", *QUALITY),
        curves=("log_mmd",),
        budget=Budget("cpu", 2),
        better={"teacher_error": "lower"},
    ),
    Bench(
        "varflow-ablation",
        "VarFlow's power, weight, group size and cross term, one at a time",
        lambda seeds: grid(ABLATION, seeds=seeds),
        metrics=QUALITY,
        curves=("log_mmd", "log_density_gap"),
        budget=Budget("cpu", 1),
    ),
    Bench(
        "dimension",
        "objectives in 2 to 128 dimensions: mixtures with exact teachers, and digits",
        over_dimensions,
        metrics=(*QUALITY, "energy_distance", "energy_distance_held_out", "precision", "recall"),
        curves=("log_mmd", "modes_found", "recall"),
        figures="vardistill.bench.dimension:figures",
        budget=Budget("cpu", 2),
    ),
    Bench(
        "variance",
        "signal-to-noise ratio of a step's gradient, by objective and noise level",
        lambda seeds: grid(VARIANCE, seeds=seeds),
        metrics=SNR,
        measure="vardistill.bench.variance:gradient_noise",
        figures="vardistill.bench.variance:figures",
        better=dict.fromkeys(SNR, "higher"),
    ),
)

BENCHES = {bench.name: bench for bench in _ALL}
"""Every bench, by name."""
