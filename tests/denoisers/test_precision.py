"""Networks with weights in half precision as denoisers: x_t stays in single precision, and double is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_dit, tiny_unet
from vardistill.denoisers import DiffusersDenoiser, Mixed, Preconditioned, from_azula, from_edm, from_module
from vardistill.diffusion import Denoiser, check_denoiser
from vardistill.diffusion.schedules import VE, VP
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP

every_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


class Network(nn.Module):
    """Two layers, a time and a condition of which it does not change the type."""

    label_dim, sigma_data = 3, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(2, 64), nn.Linear(1, 64), nn.Linear(64, 2)
        self.labels = nn.Linear(3, 64)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        self.told = time
        hidden = self.first(x) + self.time(time[:, None])
        out: Tensor = self.last((hidden if labels is None else hidden + self.labels(labels)).tanh())
        return out


class Azula(Network):
    """The same with azula's interface."""

    schedule = VP()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Any:
        return SimpleNamespace(mean=super().forward(x, time, labels))


ADAPTERS: dict[str, Callable[[torch.dtype], Denoiser]] = {
    "module": lambda dtype: from_module(Network().to(dtype), VP(), "v"),
    "preconditioned": lambda dtype: Preconditioned(Network().to(dtype), 0.5),
    "edm": lambda dtype: from_edm(Network().to(dtype), 0.01, 50.0),
    "azula": lambda dtype: from_azula(Azula().to(dtype)),
}


def both(make: Callable[[torch.dtype], Denoiser], dtype: torch.dtype) -> tuple[Denoiser, Denoiser]:
    """The same denoiser with weights in single precision and in `dtype`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = make(torch.float32)
        torch.manual_seed(0)
        return single, make(dtype)


@every_half
@pytest.mark.parametrize("name", ADAPTERS)
def test_half_weights_take_and_return_single_precision(name: str, half: torch.dtype, rng: torch.Generator) -> None:
    """E[x | x_t] is within some roundings, 2⁻⁹ or 2⁻¹² of values about 1, of that of single precision.

    The time, which 8 bits would blur, reaches the network in single precision; a gradient reaches x_t and the weights.
    """
    single, denoiser = both(ADAPTERS[name], half)
    x_t, t = torch.randn(16, 2, generator=rng).requires_grad_(), torch.linspace(0.1, 0.7, 16)
    x = denoiser(x_t, t)
    assert x.dtype == torch.float32
    eps = torch.finfo(half).eps
    assert (x - single(x_t, t)).abs().max() < 8 * eps * single(x_t, t).abs().max().clamp_min(1)
    assert not torch.equal(x, single(x_t, t))
    x.sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.dtype == torch.float32
    assert isinstance(denoiser, nn.Module)
    parameters = dict(denoiser.named_parameters())
    assert {p.dtype for p in parameters.values()} == {half}
    assert all(p.grad is not None for name, p in parameters.items() if "labels" not in name)
    (network,) = (module for module in denoiser.modules() if isinstance(module, Network))
    assert network.told.dtype == torch.float32
    check_denoiser(denoiser, (2,), torch.zeros(()), trained=True)


@every_half
def test_conditions_in_single_precision(half: torch.dtype, rng: torch.Generator) -> None:
    x_t, t, labels = torch.randn(4, 2, generator=rng), torch.full((4,), 0.5), torch.tensor([0, 1, 2, 3])
    of_edm = ADAPTERS["edm"](half)(x_t, t, labels=labels)
    of_module = ADAPTERS["module"](half)(x_t, t, labels=torch.eye(4)[:, :3])
    assert of_edm.dtype == of_module.dtype == torch.float32


@every_half
@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDIMScheduler(), diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()],
    ids=lambda s: type(s).__name__,
)
def test_diffusers_networks(scheduler: Any, half: torch.dtype, rng: torch.Generator) -> None:
    attention = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    single = DiffusersDenoiser(tiny_unet(**attention, attention_head_dim=4), scheduler)
    denoiser = DiffusersDenoiser(tiny_unet(**attention, attention_head_dim=4).to(half), scheduler)
    x_t, t = torch.randn(4, 1, 8, 8, generator=rng), torch.linspace(0.1, 0.7, 4)
    with torch.no_grad():
        x, exact = denoiser(x_t, t), single(x_t, t)
    assert x.dtype == torch.float32
    assert (x - exact).abs().max() < 8 * torch.finfo(half).eps * exact.abs().max()
    check_denoiser(denoiser, (1, 8, 8), x_t)


def test_a_transformer(rng: torch.Generator) -> None:
    denoiser = DiffusersDenoiser(tiny_dit().bfloat16(), diffusers.DDIMScheduler())
    x = denoiser(torch.randn(3, 2, 8, 8, generator=rng), torch.full((3,), 0.4), labels=torch.arange(3))
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_double_precision_asks_for_weights_in_it(name: str, weights: torch.dtype) -> None:
    """It is asked for where rounding matters: a network that rounds is refused, whatever adapts it."""
    with pytest.raises(UsageError, match="does not take the generator's samples.*float64"):
        check_denoiser(ADAPTERS[name](weights), (2,), torch.zeros((), dtype=torch.float64))


def test_mixed_reaches_the_hidden_layers_of_a_perceptron_and_these_alone(rng: torch.Generator) -> None:
    """What `LevelMLP(mixed=True)` gives; its first and last layers stay in single precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain, mixed = LevelMLP(2, 2, depth=3, width=32), LevelMLP(2, 2, depth=3, width=32, mixed=True)
    mixed.load_state_dict(plain.state_dict())
    seen: list[torch.dtype] = []
    for layer in plain.layers:
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x_t, t = torch.randn(8, 2, generator=rng), torch.linspace(0.1, 0.9, 8)
    rounded = Mixed(Preconditioned(plain, 0.5, VE()))(x_t, t)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(rounded, Preconditioned(mixed, 0.5, VE())(x_t, t))
    assert not torch.equal(rounded, Preconditioned(plain, 0.5, VE())(x_t, t))
