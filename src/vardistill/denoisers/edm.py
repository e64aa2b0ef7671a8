r"""Teachers of EDM's kind: modules D(x + σ ε, σ, class labels) = E[x | x + σ ε] (Karras et al. 2022, arXiv 2206.00364).

The authors' networks (EDM, EDM2) precondition themselves and are called so. Labels are one-hot rows; a row of zeros is
"no class".
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from vardistill.diffusion.schedules import VE
from vardistill.diffusion.weights import named_weight
from vardistill.networks import predict, require_network


class FromEDM(nn.Module):
    """A module D(x, σ, labels) as a denoiser; see `from_edm`.

    Attributes:
        schedule: VE(sigma_min, sigma_max).
        classes: K, the module's `label_dim`; 0 without.
        data_shape: from the module's `img_channels` and `img_resolution`; None without.
    """

    def __init__(self, module: Callable[..., Tensor], sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        require_network(module)
        self.module = module
        self.schedule = VE(sigma_min, sigma_max)
        self.classes = int(getattr(module, "label_dim", 0))
        channels, size = (getattr(module, name, None) for name in ("img_channels", "img_resolution"))
        self.data_shape = None if channels is None or size is None else (int(channels), int(size), int(size))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x | x_t] for x_t (B, *data), t (B,) and labels (B,) int64, where K is "no class"; shape and type of x_t.

        A module without classes ignores the labels.
        """
        _, sigma = self.schedule(t)
        one_hot = None
        if labels is not None and self.classes:
            one_hot = F.one_hot(labels, self.classes + 1)[:, :-1].to(x_t)
        return predict(self.module, x_t, sigma, one_hot)

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """EDM's with the module's `sigma_data`, (R,); None for a module without, which may precondition otherwise."""
        sigma_data = getattr(self.module, "sigma_data", None)
        return None if sigma_data is None else named_weight("edm", float(sigma_data))(alpha, sigma)


def from_edm(module: Callable[..., Tensor], sigma_min: float = 0.002, sigma_max: float = 80.0) -> FromEDM:
    """Make a teacher of a module in the convention of NVIDIA's EDM.

    Args:
        module: called as `module(x, sigma, class_labels)` with x (B, *data), sigma (B,) and class_labels (B, K) one-hot
            or None; returns E[x | x_t] of the shape and dtype of x. K is its attribute `label_dim`.
        sigma_min: least σ, at t = 0; > 0.
        sigma_max: largest σ, at t = 1.

    Raises:
        UsageError: unless 0 < sigma_min < sigma_max.
    """
    return FromEDM(module, sigma_min, sigma_max)
