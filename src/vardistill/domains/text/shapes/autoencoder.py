r"""The autoencoder of shapes, fitted to their pictures: q(z|x) = N(μ(x), σ(x)²), and a decoder g.

    loss = E‖g(z) − x‖² + L1 E‖g(z) − x‖₁ + KL ½ Σ (μ² + σ² − 1 − ln σ²),   means over the values of each

The small weight of the divergence leaves latents nearly what the encoder says; their scale goes into the
configuration as `scaling_factor`, as pipelines of diffusers expect it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vardistill.denoisers.diffusers import import_diffusers
from vardistill.domains.text.shapes.formula import scenes
from vardistill.domains.text.shapes.networks import autoencoder
from vardistill.files import whole
from vardistill.progress import bar
from vardistill.training.optimisers import cosine

L1, KL = 0.1, 1e-5

SCALED = 2000
"""Pictures that the latents' scale is computed of."""

BLOCK = 250
"""Pictures that are encoded at once."""


def fit_autoencoder(seed: int, steps: int, batch: int = 16, lr: float = 3e-3) -> Any:
    """Fit an `AutoencoderKL` to fresh pictures; it is returned in evaluation mode, its scale in its configuration.

    Args:
        seed: of its weights and the pictures.
        steps: of training.
        batch: pictures of a step.
        lr: largest learning rate of Adam.
    """
    network, rng = autoencoder(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99), fused=True)
    for step in bar(range(steps), name="autoencoder", unit="steps"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * cosine(step / steps)
        autoencoder_loss(network, scenes(batch, rng).pictures, rng).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.eval().requires_grad_(False)
    mean, std = encoded_pictures(network, scenes(SCALED, rng).pictures)
    network.register_to_config(scaling_factor=float((mean.var() + std.square().mean()).rsqrt()))
    return network


def autoencoder_loss(network: Any, x: Tensor, rng: torch.Generator) -> Tensor:
    """The loss of pictures x (n, 3, H, W), a scalar."""
    q = network.encode(x).latent_dist
    z = q.mean + q.std * torch.randn(q.mean.shape, generator=rng)
    error = network.decode(z).sample - x
    divergence = (q.mean.square() + q.var - 1 - q.logvar).mean() / 2
    loss: Tensor = error.square().mean() + L1 * error.abs().mean() + KL * divergence
    return loss


@torch.no_grad()
def encoded_pictures(network: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents of pictures (n, 3, H, W), as the encoder has them."""
    parts = [network.encode(x).latent_dist for x in pictures.split(BLOCK)]
    return torch.cat([q.mean for q in parts]), torch.cat([q.std for q in parts])


def kept_autoencoder(path: Path, seed: int, steps: int) -> Any:
    """The autoencoder in the folder `path`, fitted where there is none yet."""
    if not (path / "config.json").is_file():
        fitted = fit_autoencoder(seed, steps)
        with whole(path, folder=True) as partial:
            fitted.save_pretrained(partial)
    kept = import_diffusers().AutoencoderKL.from_pretrained(path, local_files_only=True)
    return kept.eval().requires_grad_(False)
