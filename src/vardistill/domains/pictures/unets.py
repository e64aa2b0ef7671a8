"""U-Nets of diffusers for pictures of any size, and denoisers made of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from vardistill.denoisers.diffusers import DiffusersDenoiser, import_diffusers
from vardistill.domains.pictures.config import UNetConfig
from vardistill.errors import UsageError
from vardistill.networks import initial_weights


def build_unet(config: UNetConfig, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """An untrained `UNet2DModel`: residual blocks, and attention at the lowest resolution.

    Args:
        config: its channels and blocks.
        shape: (C, H, W); H and W are divisible by 2 for each resolution after the first.
        classes: rows of the table of labels; 0 for an unconditional network.
        seed: fixes the initial weights.

    Raises:
        UsageError: for pictures whose sides do not halve that often, or without diffusers.
    """
    channels, height, width = shape
    halvings = len(config.channels) - 1
    if height % 2**halvings or width % 2**halvings:
        raise UsageError(
            f"pictures of {height}×{width} do not halve {halvings} times: give them another --size, or the network "
            "fewer channels"
        )
    diffusers = import_diffusers()
    options: dict[str, Any] = {"num_class_embeds": classes} if classes else {}
    with initial_weights(seed):
        network: nn.Module = diffusers.UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            layers_per_block=config.blocks,
            block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) * len(config.channels),
            up_block_types=("UpBlock2D",) * len(config.channels),
            norm_num_groups=8,
            attention_head_dim=8,
            **options,
        )
    return network


def edm_denoiser(network: nn.Module, sigma_data: float, sigma_min: float, sigma_max: float) -> DiffusersDenoiser:
    """The network with EDM's preconditioning and a scheduler of diffusers that says so."""
    diffusers = import_diffusers()
    scheduler = diffusers.EDMEulerScheduler(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data)
    return DiffusersDenoiser(network, scheduler)
