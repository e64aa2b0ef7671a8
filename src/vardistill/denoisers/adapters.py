r"""Adapters of low rank on one frozen base (Hu et al. 2021, arXiv 2106.09685).

    W x + B A x,   A (r, inputs), B (outputs, r), B = 0 at the start

An adapted denoiser has modules of its own around the base's tensors: teacher, student, critic and moving average on
one base hold its weights once in memory, and nothing has to be switched, neither before a forward pass nor before one
that gradient checkpointing runs again. Only the factors A and B are parameters of it, so optimisers, checkpoints,
copies and processes see nothing else, and the base, which is the denoiser without adapters, knows nothing of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vardistill.denoisers.diffusers import DiffusersDenoiser
from vardistill.errors import UsageError

NAME = "default"
"""What peft calls the one adapter of a tree of modules."""

HALF = (torch.bfloat16, torch.float16)
"""Types of weights in which steps of training would be lost."""


class Adapted(nn.Module):
    """A denoiser with adapters on the frozen weights of another, which it shares.

    Its output is the base's until B has moved. A is drawn from torch's global generator. Parameters, those of
    `state_dict` too, are the factors, named as in a LoRA file: `adapters.LAYER.lora_A.weight`, in single precision
    where the base's are half. It knows all that the base does: schedule, shapes, classes. `copy.deepcopy` copies the
    factors alone; `to` moves the base, but leaves its type.

    Args:
        base: a denoiser with a network of diffusers; its parameters are frozen.
        rank: r of every layer, at least 1.
        targets: names of the adapted layers, or ends of them; default all linear and convolutional ones.

    Attributes:
        adapters: the factors, in a tree of the layers' names.

    Raises:
        UsageError: for a rank below 1, a base that is adapted itself, no such layers, or without peft.
    """

    def __init__(self, base: DiffusersDenoiser, rank: int, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        if rank < 1 or isinstance(base, Adapted):
            raise UsageError(f"adapters need a rank of at least 1, and are added once; rank={rank}")
        peft, chosen = import_peft(), chosen_layers(base.network, targets)
        base.requires_grad_(False)
        self.rank = rank
        self._shared = Shared(copy.deepcopy(base, tensors(base)))
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)
        peft.inject_adapter_in_model(config, self.network, adapter_name=NAME)
        self.adapters = nn.Module()
        for name, layer in adapted_layers(self.network):
            place = self.adapters
            for part in name.split("."):
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.lora_A, place.lora_B = layer.lora_A[NAME], layer.lora_B[NAME]
        for p in self.adapters.parameters():
            p.data = p.data.float() if p.dtype in HALF else p.data
        self.eval()

    @property
    def within(self) -> DiffusersDenoiser:
        """The denoiser that computes: the base's tensors and the adapters."""
        return self._shared.denoiser

    @property
    def network(self) -> nn.Module:
        """Of the denoiser within."""
        return self.within.network

    def __getattr__(self, name: str) -> Any:
        """What the base knows: its schedule, shapes and classes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.within, name)

    def forward(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """E[x | x_t], as the base's."""
        x: Tensor = self.within(x_t, t, **condition)
        return x

    def loss_weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Of the squared error of what the network predicts, (R,)."""
        return self.within.loss_weight(alpha, sigma)

    @torch.no_grad()
    def merged(self) -> DiffusersDenoiser:
        """A denoiser with weights of its own, W + B A, in single precision where the base's are half."""
        denoiser = copy.deepcopy(self._shared.denoiser)
        network = denoiser.network
        if next(network.parameters()).dtype in HALF:
            nn.Module.float(network)  # diffusers' own warns
        for name, layer in list(adapted_layers(network)):
            parent, _, child = name.rpartition(".")
            layer.merge()
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
        del network.peft_config
        return denoiser.requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapted:
        """To the factors; of the base only the device changes."""
        move: Any = self.within._apply
        move(lambda v: v.to(fn(v.new_empty(0)).device))
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


class Shared:
    """Holds a denoiser that is no child of its holder, and is copied without its frozen tensors."""

    def __init__(self, denoiser: DiffusersDenoiser) -> None:
        self.denoiser = denoiser

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """The adapters' copy on the same base."""
        memo |= tensors(self.denoiser)
        return Shared(copy.deepcopy(self.denoiser, memo))


def tensors(denoiser: nn.Module) -> dict[int, Any]:
    """The base's parameters and buffers, as what a deep copy has copied already."""
    named = *denoiser.named_parameters(), *denoiser.named_buffers()
    return {id(v): v for name, v in named if ".lora_" not in name}


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers, by the names of those that they stand for."""
    return ((name, layer) for name, layer in network.named_modules() if hasattr(layer, "lora_A"))


def chosen_layers(network: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """The names of all linear and convolutional layers, or of those whose names end so; UsageError for none."""
    layers = [name for name, layer in network.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    chosen = [name for name in layers if targets is None or name.endswith(tuple(targets))]
    if not chosen:
        raise UsageError(f"no linear or convolutional layer is named {', '.join(targets or ())}; one is {layers[-1]}")
    return chosen


def import_peft() -> Any:
    """The peft package; raises UsageError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft: pip install 'vardistill[diffusers]'") from error
    return peft
