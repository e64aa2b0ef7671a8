r"""Learned denoisers: EDM's preconditioning and denoising score matching (Karras et al. 2022, arXiv 2206.00364).

With x̂ = x_t/α, r = σ/α and data of standard deviation σ_d (eq. 7, table 1):

    D(x_t, t) = c_skip x̂ + c_out F(c_in x̂, ¼ ln r)
    c_skip = σ_d²/(r² + σ_d²),   c_out = r σ_d/√(r² + σ_d²),   c_in = 1/√(r² + σ_d²)
    loss   = w/d ‖D(x_t, t) − x‖²,   w = (r² + σ_d²)/(r σ_d)².
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.noise import Noise
from vardistill.diffusion.schedules import VE, Schedule, expand, require_schedule
from vardistill.diffusion.weights import named_weight
from vardistill.errors import require_positive
from vardistill.networks import predict, require_network


class Preconditioned(nn.Module):
    """A network F with EDM's preconditioning, as a denoiser.

    Args:
        network: F(x, c, **condition): x (B, *data) scaled to unit variance, c (B,) = ¼ ln(σ/α); returns (B, *data).
        sigma_data: σ_d, standard deviation of the data; > 0.
        schedule: of x_t and t.

    Raises:
        UsageError: unless sigma_data is positive and finite, and the schedule is one.
    """

    def __init__(self, network: Callable[..., Tensor], sigma_data: float, schedule: Schedule | None = None) -> None:
        super().__init__()
        require_network(network)
        require_positive("sigma_data", sigma_data)
        self.network = network
        self.sigma_data = sigma_data
        self.schedule: Schedule = VE() if schedule is None else schedule
        require_schedule(self.schedule)

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t], shape and type of x_t."""
        alpha, sigma = self.schedule(t)
        ratio = sigma / alpha
        total = (ratio**2 + self.sigma_data**2).sqrt()
        c_skip, c_out, c_in = (self.sigma_data / total) ** 2, ratio * self.sigma_data / total, 1 / total
        x = x_t / expand(alpha, x_t)
        prediction = predict(self.network, expand(c_in, x) * x, 0.25 * ratio.log(), **condition)
        return expand(c_skip, x) * x + expand(c_out, x) * prediction

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1/c_out² = (r² + σ_d²)/(r σ_d)², EDM's weight, (R,)."""
        return named_weight("edm", self.sigma_data)(alpha, sigma)


def dsm_loss(denoiser: Denoiser, x: Tensor, noise: Noise, **condition: Tensor) -> Tensor:
    """Denoising score matching, w(t)/d ‖D(x_t, t) − x‖², (R,), for clean x (R, *data) (Vincent 2011)."""
    error = denoiser(noise.x_t(x), noise.t, **condition) - x
    return noise.weight * error.flatten(1).pow(2).mean(1)
