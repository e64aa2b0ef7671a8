"""Diffusers networks and pipelines small enough to run in milliseconds, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch


def tiny_unet(
    classes: int | None = None, channels: int = 1, size: int = 8, seed: int = 0, **options: Any
) -> diffusers.UNet2DModel:
    """A UNet2DModel of one block on (channels, size, size), in evaluation mode; `options` go to its configuration."""
    of_one_block = {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": classes,
        "add_attention": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = diffusers.UNet2DModel(**(of_one_block | options))
    return network.eval()


def tiny_dit(classes: int = 3, channels: int = 2, size: int = 8, seed: int = 0) -> diffusers.DiTTransformer2DModel:
    """A DiT of one block with a learned variance, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=1,
            sample_size=size,
            patch_size=2,
            num_embeds_ada_norm=classes,
            norm_num_groups=1,
        )
    return network.eval()


def tiny_pipeline_folder(
    folder: Path, network: torch.nn.Module | None = None, scheduler: diffusers.SchedulerMixin | None = None
) -> Path:
    """A DDPM pipeline on disk; returns its folder."""
    pipeline = diffusers.DDPMPipeline(
        unet=tiny_unet() if network is None else network,
        scheduler=diffusers.DDPMScheduler() if scheduler is None else scheduler,
    )
    pipeline.save_pretrained(folder)
    return folder
