"""Weights w(t) of noise levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vardistill.errors import unknown

Weight = Callable[[Tensor, Tensor], Tensor]
"""w from (α_t, σ_t), each (R,)."""


def weights(sigma_data: float, sigma_max: float) -> dict[str, Weight]:
    """The named weights, for data of standard deviation σ_d = `sigma_data` and ratios up to r_max = `sigma_max`.

    `one` 1; `sigma2` σ²; `inverse_sigma` 1/σ; `snr` α²/σ²; and with r = σ/α: `sigma2_max` (r/r_max)² (VarDiU's
    reference, where α = 1); `edm` (r² + σ_d²)/(r σ_d)² (EDM, table 1); `sigma2_linear` r²/(r + σ_d/20), which goes
    from r² to r where r is a twentieth of σ_d.
    """
    return {
        "one": lambda alpha, sigma: torch.ones_like(sigma),
        "sigma2": lambda alpha, sigma: sigma**2,
        "sigma2_max": lambda alpha, sigma: (sigma / alpha / sigma_max) ** 2,
        "inverse_sigma": lambda alpha, sigma: 1 / sigma,
        "snr": lambda alpha, sigma: (alpha / sigma) ** 2,
        "edm": lambda alpha, sigma: (alpha / sigma) ** 2 + sigma_data**-2,
        "sigma2_linear": lambda alpha, sigma: (sigma / alpha) ** 2 / (sigma / alpha + sigma_data / 20),
    }


def named_weight(name: str, sigma_data: float = 1.0, sigma_max: float = 1.0) -> Weight:
    """The weight of this name; see `weights`. Raises UsageError for an unknown name."""
    known = weights(sigma_data, sigma_max)
    if name not in known:
        raise unknown("weight", name, known)
    return known[name]
