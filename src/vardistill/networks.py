"""Small networks that generators, posteriors and denoisers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from vardistill.errors import UsageError, require, unknown

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
    "tanh": nn.Tanh,
}


def mlp(inputs: int, outputs: int, depth: int, width: int, activation: str = "silu") -> nn.Sequential:
    """A perceptron with `depth` hidden layers of `width` units: (..., inputs) → (..., outputs)."""
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    layers: list[nn.Module] = []
    for size_in, size_out in zip([inputs, *[width] * (depth - 1)], [width] * depth, strict=True):
        layers += [nn.Linear(size_in, size_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class LevelMLP(nn.Module):
    """A perceptron of a vector and a noise level, F(x, c): x (B, d), c (B,) → (B, outputs).

    Args:
        inputs: d.
        outputs: size of the result.
        depth: hidden layers.
        width: units of a hidden layer.
        activation: name in `ACTIVATIONS`.
        mixed: whether hidden layers run in bfloat16, as they also do within autocast; the first and the last stay in
            full precision.
    """

    def __init__(
        self, inputs: int, outputs: int, depth: int = 4, width: int = 256, activation: str = "silu", mixed: bool = False
    ) -> None:
        super().__init__()
        self.mixed = mixed
        self.layers = mlp(inputs + 1, outputs, depth, width, activation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """F(x, c), (B, outputs)."""
        first, *hidden, last = self.layers
        with torch.autocast(x.device.type, torch.bfloat16) if self.mixed else nullcontext():
            h = full_precision(first, torch.cat([x, c[:, None]], dim=1))
            for layer in hidden:
                h = layer(h)
            return full_precision(last, h)


def own_precision(network: object, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to the precision of a network's weights where that is half; nothing for other networks.

    Its matrices and convolutions then take inputs in single precision; what a network does itself in single precision,
    embeddings of the time or a preconditioning, stays in it.
    """
    parameters = network.parameters() if isinstance(network, nn.Module) else iter(())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()


def require_network(network: object) -> None:
    """Raise UsageError for what is no network that can be called: nothing, or a class instead of an instance of it."""
    if isinstance(network, type):
        raise UsageError(f"the network must be an instance, but is the class {network.__name__}: build it first")
    require("the network", network, callable(network), "a module or function of (x, time)")


def predict(network: Callable[..., Tensor], x: Tensor, *given: Tensor | None, **condition: Tensor) -> Tensor:
    """What a user's network returns for x (B, *data) and what else it is given, in its own precision; type of x.

    Raises:
        UsageError: for other than a tensor of floats of the shape of x, which would broadcast or fail far from here.
    """
    with own_precision(network, x.device):
        out: object = network(x, *given, **condition)
    if not isinstance(out, Tensor):
        remedy = "its .sample" if hasattr(out, "sample") else "that tensor alone"
        raise UsageError(
            f"the network must return a tensor of the shape of x_t, {tuple(x.shape)}, but returns "
            f"{type(out).__name__}: let its forward, or an nn.Module around it, return {remedy}"
        )
    if out.shape != x.shape or not out.is_floating_point():
        raise UsageError(
            f"the network must return floats of the shape of x_t, {tuple(x.shape)}, but returns {tuple(out.shape)} of "
            f"{out.dtype}"
        )
    return out.to(x.dtype)


def full_precision(layer: nn.Module, v: Tensor) -> Tensor:
    """The layer's result in its weights' precision: what bfloat16's 8 bits would blur is the place of z and x."""
    with torch.autocast(v.device.type, enabled=False):
        out: Tensor = layer(v.to(next(layer.parameters()).dtype))
    return out


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Networks built inside draw their initial weights from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
