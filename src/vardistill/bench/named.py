"""The benches that `vardistill bench` knows. Importing this module does not import torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vardistill.bench.cells import Bench, Budget, Cell, Changes, grid
from vardistill.diffusion.config import LevelsConfig
from vardistill.diffusion.levels import LogNormal
from vardistill.domains.points.config import ProblemName, TeacherConfig
from vardistill.objectives.diff_instruct import DiffInstructConfig
from vardistill.objectives.registry import PartConfig, SumConfig
from vardistill.objectives.vardiu import VarDiUConfig
from vardistill.runs.config import Config
from vardistill.runs.presets import pictures, text
from vardistill.runs.presets.pictures import of_data, with_varflow
from vardistill.runs.presets.points import (
    DEMO,
    MOG40,
    POINTS,
    VARDIU_VARFLOW,
    VARFLOW,
    LearnedPosterior,
    adapted,
    diff_instruct,
    learned_posterior,
    learned_posterior_varflow,
)

QUALITY = ("log_density_gap", "log_mmd", "mmd_p_value", "modes_found", "mode_tv", "off_mode", "dikl")

TEXT_QUALITY = ("prompt_accuracy", "fd", "diversity", "evaluations", "seconds_per_image")

PICTURE_QUALITY = ("fd", "kd", "precision", "recall", "density", "coverage", "label_accuracy", "speedup")


def tiny(config: Config) -> Config:
    """The configuration with small networks and few samples."""
    training = replace(config.training, batch=64, eval_samples=256, log_every=5, checkpoint_every=5)
    return with_student(replace(config, training=training), width=16, depth=1)


def with_student(config: Config, **changes: Any) -> Config:
    """The configuration with changes to its student."""
    student: Any = config.domain.student
    return replace(config, domain=replace(config.domain, student=replace(student, **changes)))


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
    """The configuration with so many times its annealed noise levels, those of a sum's parts among them."""

    def moved(levels: LevelsConfig) -> LevelsConfig:
        d = levels.distribution
        assert isinstance(d, LogNormal)
        return replace(levels, distribution=replace(d, base_start=factor * d.base_start, base_end=factor * d.base_end))

    config = replace(config, levels=moved(config.levels))
    return with_parts(config, lambda part: part if part.levels is None else replace(part, levels=moved(part.levels)))


def with_weight(config: Config, factor: float) -> Config:
    """The sum with so many times the weight λ of its parts but the first."""
    first = config.objective.parts[0] if isinstance(config.objective, SumConfig) else None

    def weighed(part: PartConfig) -> PartConfig:
        end = None if part.weight_end is None else factor * part.weight_end
        return part if part is first else replace(part, weight=factor * part.weight, weight_end=end)

    return with_parts(config, weighed)


def with_parts(config: Config, change: Callable[[PartConfig], PartConfig]) -> Config:
    """The configuration with changes to every part, where its objective is a sum."""
    if not isinstance(config.objective, SumConfig):
        return config
    return replace(config, objective=SumConfig(tuple(change(part) for part in config.objective.parts)))


SMOKE = {
    "batch candidates": tiny(DEMO),
    "diagonal": replace(
        tiny(learned_posterior("diagonal")),
        objective=VarDiUConfig(posterior="diagonal", posterior_width=16, posterior_depth=1),
    ),
    "VarFlow": tiny(VARFLOW),
    "Diff-Instruct": replace(tiny(diff_instruct(2)), objective=DiffInstructConfig(2, critic_depth=1, critic_width=16)),
}

ZOO = {
    "DMD": "dmd",
    "DMD2": "dmd2",
    "f-distill": "f-distill",
    "SMD": "smd",
    "SMT": "smt",
    "SiD": "sid",
    "SiDA": "sida",
    "SiM": "sim",
    "Moment matching": "moment-matching",
    "EMD": "emd",
    "SDS": "sds",
}
"""Further objectives, and the name of their recipe."""

OF_FEATURES = {"LADD": "ladd", "ADD": "add", "ADM": "adm"}
"""Those whose discriminator sees a learned teacher's features."""

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
    **{name: POINTS[key].config for name, key in ZOO.items()},
}
"""What MoG-40 is distilled with."""

ADVERSARIAL = {name: POINTS[key].config for name, key in OF_FEATURES.items()}
"""What MoG-40 is distilled with where the teacher is a network."""

TEACHERS: dict[str, Changes] = {kind: {"teacher": TeacherConfig(kind)} for kind in ("true", "empirical", "learned")}


def on_mog40(seeds: int) -> list[Cell]:
    """Every objective with every teacher that it can have."""
    return [*grid(OBJECTIVES, TEACHERS, seeds=seeds), *grid(ADVERSARIAL, seeds=seeds)]


MAIN = ("VarDiU, batch candidates", "VarDiU, full", "VarFlow", "VarDiU + VarFlow", "Diff-Instruct 5")

STARTED = (*MAIN, "Diff-Instruct 1")

STARTS = {
    f"{name}, {start} start": with_student(OBJECTIVES[name], linear=start == "linear")
    for name, start in itertools.product(STARTED, ("linear", "random"))
}
"""What the student's first map is worth."""

TUNED: dict[str, dict[str, Config]] = {
    "VarDiU, batch candidates": {f"pool {pool}": with_objective(DEMO, pool=pool) for pool in (1024, 2048)},
    "VarDiU, full": {
        f"posterior's rate × {factor:g}": with_rates(learned_posterior("full"), auxiliary=factor) for factor in (0.5, 2)
    },
    "VarFlow": {f"β = {beta:g}": with_objective(VARFLOW, beta=beta) for beta in (0.25, 1.0)},
    "VarDiU + VarFlow": {f"λ × {factor:g}": with_weight(VARDIU_VARFLOW, factor) for factor in (0.3, 3)},
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


ZOO_TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "DMD": ("10,000 pairs", {"pairs": 10_000}),
    "DMD2": ("λ_G × 10", {"generator_gan": 3e-2}),
    "f-distill": ("Jensen–Shannon", {"divergence": "jensen-shannon"}),
    "SMD": ("no adversarial term", {"generator_gan": 0.0}),
    "SMT": ("no adversarial term", {"generator_gan": 0.0}),
    "SiD": ("a = 0.5", {"a": 0.5}),
    "SiDA": ("λ_G × 10", {"generator_gan": 1e-3}),
    "SiM": ("square", {"distance": "square"}),
    "Moment matching": ("critic as wide as two", {"critic_width": 384}),
    "EMD": ("a chain of 8", {"chain_length": 8}),
    "LADD": ("no R1", {"r1": 0.0}),
    "ADD": ("λ_D × 0.1", {"distillation": 0.25}),
    "ADM": ("ρ = 0.25", {"shrink": 0.25}),
}
"""The choice that is each further objective's own, moved once."""


def zoo_neighbours(name: str) -> dict[str, Config]:
    """A preset of the zoo, and five that differ from it in one thing: rates, the critic's or the head's, its own."""
    preset, (choice, changes) = POINTS[(ZOO | OF_FEATURES)[name]].config, ZOO_TUNED[name]
    fewer = "critic_steps" if hasattr(preset.objective, "critic_steps") else "head_steps"
    other = 1 if getattr(preset.objective, fewer) > 1 else 5
    moved = {
        "rates × 0.5": with_rates(preset, 0.5, 0.5),
        "rates × 2": with_rates(preset, 2, 2),
        "its networks' rates × 2": with_rates(preset, auxiliary=2),
        f"{fewer.replace('_', ' ')} {other}": with_objective(preset, **{fewer: other}),
        choice: with_objective(preset, **changes),
    }
    return {name: preset} | {f"{name}, {label}": config for label, config in moved.items()}


FITTED: dict[str, Changes] = {
    f"learned, {n // 1000}k": {"teacher": TeacherConfig("learned", teacher_samples=n)} for n in (1_000, 5_000, 10_000)
}

FAMILIES: tuple[LearnedPosterior, ...] = ("diagonal", "full", "mixture", "nsf")

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

BIASED = (1.0, 4.0)
"""Those at which they are held against the exact ones."""

BIAS = tuple(f"bias_{ratio:g}" for ratio in BIASED)

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


ESTIMATORS = {
    "VarDiU, diagonal": DIAGONAL_1024,
    "VarDiU, full": FULL_1024,
    "VarDiU, NSF": with_levels(with_batch(learned_posterior("nsf"), 1024), draws=1, antithetic=False),
    "VarDiU, batch candidates": DEMO,
    "VarDiU, batch candidates, pool 2048": with_objective(DEMO, pool=2048),
    **{f"VarDiU, chain of {k}": with_objective(DEMO, candidates="chain", chain_length=k) for k in (2, 8, 32)},
    "Diff-Instruct": with_batch(diff_instruct(1), 1024),
}
"""What follows the gradient of the diffusive KL, in steps of 1024 rows."""


def over_dimensions(seeds: int) -> list[Cell]:
    """The mixtures with their exact teachers, and digits with an empirical and a learned one; first seeds first."""
    mixtures: tuple[ProblemName, ...] = ("mixture2", "mixture8", "mixture32", "mixture128")
    digits: dict[str, Changes] = {
        "empirical": {"teacher": TeacherConfig("empirical", bandwidth=0.15)},
        "learned": TEACHERS["learned"],
    }
    cells = []
    for problem in (*mixtures, "digits"):
        objectives = {label: adapted(config, problem) for label, config in HIGH.items()}
        cells += grid(objectives, digits if problem == "digits" else {"true": TEACHERS["true"]}, seeds=seeds)
    return sorted(cells, key=lambda cell: cell.seed)


PICTURES = {
    "Diff-Instruct": pictures.DIFF_INSTRUCT,
    "Diff-Instruct + VarFlow": pictures.PICTURES["diff-instruct-varflow"].config,
    "VarFlow": pictures.VARFLOW,
    "VarDiU": pictures.VARDIU,
    "VarDiU + VarFlow": pictures.VARDIU_VARFLOW,
    **{name: pictures.PICTURES[key].config for name, key in (ZOO | OF_FEATURES).items()},
}
"""What pictures are distilled with."""

CHOICES = {
    "VarDiU": pictures.VARDIU,
    "VarDiU, levels to 0.7": with_levels(
        pictures.VARDIU, distribution=LogNormal(base_start=2.0, base_end=0.7, spread=0.8)
    ),
    "VarDiU, no head start": replace(pictures.VARDIU, training=replace(pictures.VARDIU.training, head_start=0.0)),
    "VarDiU, rank 16": with_objective(pictures.VARDIU, posterior="low-rank", posterior_rank=16),
    "VarDiU, coupling flow": with_objective(pictures.VARDIU, posterior="coupling"),
    "VarDiU, 4 candidates": with_objective(pictures.VARDIU, candidates=4),
    "VarFlow": pictures.VARFLOW,
    "VarFlow, classifier's features": with_objective(pictures.VARFLOW, space="classifier"),
    "Diff-Instruct + VarFlow": PICTURES["Diff-Instruct + VarFlow"],
    "Diff-Instruct + VarFlow, λ = 6": with_varflow(pictures.DIFF_INSTRUCT, 6.0, 6.0),
}
"""Recipes for pictures and their neighbours."""

FEW_STEPS = (1, 2, 4, 8)
"""Steps of students that are compared."""


def of_steps(recipes: Mapping[str, Config], steps: Sequence[int]) -> dict[str, Config]:
    """Every recipe with students of so many steps."""
    return {
        f"{name}, {n} step{'s' if n > 1 else ''}": with_student(config, steps_per_sample=n)
        for name, config in recipes.items()
        for n in steps
    }


STEPS = of_steps({name: PICTURES[name] for name in ("Diff-Instruct", "VarFlow")}, FEW_STEPS)
"""A student's steps, each objective as it is tuned for one."""

SHAPES = {
    "Diff-Instruct": text.SHAPES["diff-instruct"].config,
    "VarFlow": text.SHAPES["varflow"].config,
    "Diff-Instruct + VarFlow": text.SHAPES["diff-instruct-varflow"].config,
}
"""What text to image is distilled with."""

TEXT_VARFLOW = SHAPES["VarFlow"]

TEXT_ABLATION = (
    {"VarFlow": TEXT_VARFLOW}
    | {f"β = {beta:g}": with_objective(TEXT_VARFLOW, beta=beta) for beta in (0.5, 1.5)}
    | {f"weight {weight}": with_levels(TEXT_VARFLOW, weight=weight) for weight in ("sigma2", "inverse_sigma")}
    | {f"{m} a prompt": with_objective(TEXT_VARFLOW, per_condition=m) for m in (2, 8, 16)}
    | {"all pairs, prompts in the distance": with_objective(TEXT_VARFLOW, per_condition=0)}
    | {"paired": with_objective(TEXT_VARFLOW, cross="paired")}
    | {
        f"space {space}": with_objective(TEXT_VARFLOW, space=space)
        for space in ("teacher", "teacher-blocks", "classifier")
    }
)
"""VarFlow's choices one at a time, beside its preset for shapes: β = 1, weight 1, four latents a prompt, latents."""

_ALL = (
    Bench(
        "smoke",
        "that benches work: four objectives, 20 steps each",
        lambda seeds: grid(SMOKE, seeds=seeds),
        metrics=QUALITY,
        curves=("log_mmd",),
        seeds=1,
        budget=Budget("steps", 20),
        milestones=2,
        one_process=True,
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
        on_mog40,
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
        "zoo-tuning",
        "the zoo's presets and five neighbours of each: as many for each, one thing moved at a time",
        lambda seeds: grid({label: c for name in ZOO_TUNED for label, c in zoo_neighbours(name).items()}, seeds=seeds),
        metrics=("log_density", *QUALITY, "critic_error", "gradient_bias"),
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
        "digits",
        "objectives on pictures of digits, 8×8, with one fitted teacher",
        lambda seeds: grid(PICTURES, seeds=seeds),
        metrics=PICTURE_QUALITY,
        curves=("fd",),
        budget=Budget("cpu", 2),
        one_teacher=True,
    ),
    Bench(
        "digits-choices",
        "recipes for pictures with one thing changed: the posterior, levels, features, weights",
        lambda seeds: grid(CHOICES, seeds=seeds),
        metrics=PICTURE_QUALITY,
        curves=("fd",),
        budget=Budget("cpu", 2),
        one_teacher=True,
    ),
    Bench(
        "mnist",
        "objectives on MNIST with one fitted teacher; --data takes it from a file",
        lambda seeds: grid({label: of_data(config, "mnist") for label, config in PICTURES.items()}, seeds=seeds),
        metrics=PICTURE_QUALITY,
        curves=("fd",),
        budget=Budget("cpu", 15),
        one_teacher=True,
    ),
    Bench(
        "steps",
        "students of 1, 2, 4 and 8 steps on pictures of digits, at equal training time",
        lambda seeds: grid(STEPS, seeds=seeds),
        metrics=("fd", "kd", "precision", "recall", "coverage", "label_accuracy", "evaluations"),
        curves=("fd",),
        figures="vardistill.bench.steps:figures",
        budget=Budget("cpu", 2),
        one_teacher=True,
    ),
    Bench(
        "shapes",
        "text to image: captioned shapes in 1, 2, 4 and 8 steps, with one fitted teacher",
        lambda seeds: grid(of_steps(SHAPES, FEW_STEPS), seeds=seeds),
        metrics=TEXT_QUALITY,
        curves=("prompt_accuracy", "fd"),
        budget=Budget("cpu", 10),
        one_teacher=True,
    ),
    Bench(
        "text-varflow-ablation",
        "VarFlow's power, weight, latents a prompt, cross term and space on shapes, one at a time",
        lambda seeds: grid(TEXT_ABLATION, seeds=seeds),
        metrics=TEXT_QUALITY,
        curves=("prompt_accuracy", "fd"),
        budget=Budget("cpu", 5),
        one_teacher=True,
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
    Bench(
        "bias",
        "how far a step's mean gradient is from that of the diffusive KL, by posterior, candidates, chain and critic",
        lambda seeds: grid(ESTIMATORS, seeds=seeds),
        metrics=(*BIAS, "step_ms"),
        measure="vardistill.bench.variance:gradient_bias",
        seeds=1,
        better=dict.fromkeys((*BIAS, "step_ms"), "lower"),
    ),
)

BENCHES = {bench.name: bench for bench in _ALL}
"""Every bench, by name."""
