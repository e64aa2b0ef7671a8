"""What a run's tensors take in memory, before it begins; activations, which depend on the batch, are none of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from vardistill.denoisers.adapters import Adapted

MOMENTS = 2
"""Tensors of a parameter's size that Adam keeps."""


def predicted_memory(
    networks: Mapping[str, nn.Module], frozen: Iterable[object] = (), average: bool = True
) -> dict[str, int]:
    """Bytes by their use: parameters, with buffers, gradients, optimiser and average.

    A tensor that several networks share is counted once, so that adapters add their factors to one base. Gradients are
    those of the network with the most, since an update drops its own before the next begins.

    Args:
        networks: that are trained, by name; the average is that of `student`.
        frozen: further ones, a teacher for example; what is no module takes nothing.
        average: whether the student has a moving average.
    """
    modules = [*networks.values(), *(module for module in frozen if isinstance(module, nn.Module))]
    trained = {
        name: sum(size(p) for p in network.parameters() if p.requires_grad) for name, network in networks.items()
    }
    kept = {id(v): size(v) for module in modules for v in held(module)}
    return {
        "parameters": sum(kept.values()),
        "gradients": max(trained.values(), default=0),
        "optimiser": MOMENTS * sum(trained.values()),
        "average": trained.get("student", 0) if average else 0,
    }


def held(module: nn.Module) -> Iterable[nn.Parameter]:
    """The tensors of a module, with those of the bases of its adapters."""
    for part in module.modules():
        yield from part.parameters(recurse=False)
        yield from part.buffers(recurse=False)  # type: ignore[misc]
        if isinstance(part, Adapted):
            yield from held(part.within)


def size(v: nn.Parameter) -> int:
    """Bytes of a tensor."""
    return v.numel() * v.element_size()
