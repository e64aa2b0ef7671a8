"""Mixed precision: where bfloat16 acts, and how far it moves E[x | x_t]."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vardistill.denoisers import Mixed, Preconditioned
from vardistill.diffusion import check_denoiser, score
from vardistill.diffusion.schedules import VE


class Network(nn.Module):
    """F(x, c) of two convolutions, which keeps the type of what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.seen: torch.dtype | None = None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        self.seen = hidden.dtype
        out: Tensor = self.second(hidden) + c[:, None, None, None]
        return out


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_bfloat16_within_and_the_type_of_x_outside(network: Network, rng: torch.Generator) -> None:
    denoiser = Mixed(Preconditioned(network, sigma_data=0.5, schedule=VE()))
    x_t, t = torch.randn(4, 1, 8, 8, generator=rng), torch.linspace(0.2, 0.8, 4)
    x = denoiser(x_t, t)
    assert network.seen == torch.bfloat16
    assert x.dtype == score(denoiser, x_t, t).dtype == torch.float32
    x.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in network.parameters())
    check_denoiser(denoiser, (1, 8, 8), x_t)


def test_bfloat16_blurs_the_network_alone(network: Network, rng: torch.Generator) -> None:
    """|D − D_mixed| ≤ c_out · 2⁻⁶ max |F|: some roundings of 2⁻⁹. At F = 0 nothing is rounded at all."""
    plain = Preconditioned(network, sigma_data=0.5, schedule=VE())
    x_t, t = torch.randn(64, 1, 8, 8, generator=rng), torch.linspace(0, 1, 64)
    sigma = plain.schedule(t)[1][:, None, None, None]
    c_in, c_out = (sigma**2 + 0.25).rsqrt(), sigma * 0.5 * (sigma**2 + 0.25).rsqrt()
    with torch.no_grad():
        largest = network(c_in * x_t, sigma.flatten().log() / 4).abs().amax((1, 2, 3), keepdim=True)
        error = (plain(x_t, t) - Mixed(plain)(x_t, t)).abs()
        assert (error <= 2**-6 * c_out * largest).all()
        assert error.any()
        for parameter in network.second.parameters():
            parameter.zero_()
        zero = Preconditioned(lambda x, c: network.second(network.first(x)), sigma_data=0.5, schedule=VE())
        assert torch.equal(zero(x_t, t), Mixed(zero)(x_t, t))
