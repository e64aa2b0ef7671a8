"""Digits by a class-conditional U-Net, from a training script in plain diffusers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

import vardistill as vd

CLASSES = 10


@dataclass(frozen=True)
class Figures:
    """Fréchet distances of pixels to the data's, and the processor time of the README's lines."""

    student: float
    teacher: float
    """Of the teacher's own sampler."""
    seconds: float


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) in [−1, 1] and their labels."""
    found = load_digits()
    return torch.from_numpy(found.images / 8 - 1).float()[:, None], torch.from_numpy(found.target)


def build(steps: int, folder: Path) -> Path:
    """What somebody left: a pipeline's folder."""
    pictures, labels = digits()
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        num_class_embeds=CLASSES,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows, t = torch.randint(len(pictures), (64,)), torch.randint(1000, (64,))
        x, eps = pictures[rows], torch.randn(64, 1, 8, 8)
        found = unet(scheduler.add_noise(x, eps, t), t, class_labels=labels[rows]).sample
        loss = (found - scheduler.get_velocity(x, eps, t)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def distil(folder: Path, steps: int, seed: int, compared: int = 1797, sampler_steps: int = 40) -> Figures:
    """The README's lines, and the distances of so many pictures of each."""
    begun = time.process_time()
    teacher = vd.denoisers.from_diffusers(folder)
    student = vd.students.from_teacher(teacher)
    training = vd.TrainingConfig(
        steps=steps, batch=32, lr=2e-4, auxiliary_lr=4e-4, clip=10.0, ema=0.98, seed=seed, eval_every=0, tracker="none"
    )
    run = vd.distill(student, teacher=teacher, conditions=vd.data.Labels(torch.ones(CLASSES)), training=training)
    seconds = time.process_time() - begun
    pictures, labels = (v[:compared] for v in digits())
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1000 + seed))
    own = vd.samplers.sample(teacher, noise, steps=sampler_steps, labels=labels)
    made = run.generator.sample(len(pictures), seed=seed, labels=labels)
    student_distance, teacher_distance = (
        vd.metrics.frechet_distance(x.flatten(1), pictures.flatten(1)) for x in (made, own)
    )
    return Figures(student_distance, teacher_distance, seconds)
