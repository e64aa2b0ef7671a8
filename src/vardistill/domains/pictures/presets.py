"""Named configurations of runs on pictures. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import replace

from vardistill.diffusion.levels import LogNormal
from vardistill.domains.pictures.config import (
    ImageDiffInstructConfig,
    ImagesConfig,
    ImagesTeachConfig,
    ImageSumConfig,
    ImageVarDiUConfig,
    ImageVarFlowConfig,
    UNetConfig,
)
from vardistill.domains.points.presets import Preset
from vardistill.runs.config import NoiseConfig, TrainingConfig

TRAINING = TrainingConfig(
    steps=1000,
    batch=64,
    lr=2e-4,
    auxiliary_lr=1e-3,
    clip=10.0,
    ema=0.995,
    log_every=50,
    eval_every=100,
    checkpoint_every=500,
    eval_samples=1000,
    precision="bf16",
)

DIFF_INSTRUCT = ImagesConfig(
    objective=ImageDiffInstructConfig(),
    levels=NoiseConfig(
        distribution=LogNormal(base_start=0.6, base_end=0.3, spread=1.2), weight="sigma2", stratified=True
    ),
    training=replace(TRAINING, auxiliary_lr=4e-4),
)

VARFLOW = ImagesConfig(
    objective=ImageVarFlowConfig(),
    levels=NoiseConfig(
        distribution=LogNormal(base_start=0.5, base_end=0.1, spread=1.0), weight="one", stratified=True, shared=2
    ),
    training=replace(TRAINING, batch=128),
)

VARDIU = ImagesConfig(
    objective=ImageVarDiUConfig(posterior_steps=4),
    levels=NoiseConfig(
        distribution=LogNormal(base_start=2.0, base_end=0.3, spread=0.8), weight="sigma2", stratified=True
    ),
    training=replace(TRAINING, auxiliary_lr=2e-3, head_start=0.3),
)

VARDIU_VARFLOW = replace(
    VARDIU,
    training=replace(TRAINING, auxiliary_lr=2e-3),
    objective=ImageSumConfig(first=ImageVarDiUConfig(posterior_steps=3), varflow_weight=12.0, varflow_weight_end=12.0),
)

DIFF_INSTRUCT_VARFLOW = replace(
    DIFF_INSTRUCT,
    objective=ImageSumConfig(first=ImageDiffInstructConfig(), varflow_weight=6.0, varflow_weight_end=1.0),
)

IMAGE_PRESETS = {
    "images-vardiu": Preset("pictures, VarDiU with a convolutional Gaussian posterior", VARDIU),
    "images-varflow": Preset("pictures, VarFlow: the energy distance between noisy pictures", VARFLOW),
    "images-vardiu-varflow": Preset("pictures, VarDiU + λ·VarFlow", VARDIU_VARFLOW),
    "images-diff-instruct-varflow": Preset("pictures, Diff-Instruct + λ·VarFlow", DIFF_INSTRUCT_VARFLOW),
    "images-diff-instruct": Preset("pictures, Diff-Instruct with a critic from the teacher's weights", DIFF_INSTRUCT),
}

DIGITS = ImagesTeachConfig(network=UNetConfig((32, 64)), steps=1500, batch=64, checkpoint_every=500)
MNIST = ImagesTeachConfig(
    data="mnist", network=UNetConfig((16, 32, 64), blocks=2), steps=6000, batch=64, checkpoint_every=500
)

IMAGE_TEACHERS = {
    "digits": Preset("scikit-learn's 8×8 digits, a U-Net", DIGITS),
    "mnist": Preset("MNIST, a U-Net", MNIST),
}
