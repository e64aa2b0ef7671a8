"""What a denoiser's network sees: the features of an inner layer, for discriminators, distances and conditions.

The layer is the middle block of a U-Net and the last hidden layer of a perceptron. For distances there are also the
features of all of a U-Net's blocks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vardistill.denoisers.adapters import Adapted
from vardistill.diffusion.denoiser import Denoiser
from vardistill.errors import UsageError
from vardistill.networks import LevelMLP


class _Reached(Exception):
    """The layer has returned: what follows it is not needed."""


def features(denoiser: Denoiser, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """φ(x_t, t), (R, channels, *places), in the type of x_t and differentiable in it; later layers are not run.

    Raises:
        UsageError: for a network without such a layer.
    """

    def reached(output: Tensor) -> None:
        raise _Reached(output)

    try:
        through_inner(denoiser, reached, x_t, t, **condition)
    except _Reached as found:
        output: Tensor = found.args[0]
        return output.to(x_t.dtype)
    raise UsageError(f"the inner layer of {type(denoiser).__name__} is never run: it has no features")


def features_and_mean(denoiser: Denoiser, x_t: Tensor, t: Tensor, **condition: Tensor) -> tuple[Tensor, Tensor]:
    """φ(x_t, t) and E[x | x_t] in one run of the network; see `features`."""
    seen: list[Tensor] = []
    denoised = through_inner(denoiser, seen.append, x_t, t, **condition)
    return seen[0].to(x_t.dtype), denoised


def through_inner(
    denoiser: Denoiser, act: Callable[[Tensor], Tensor | None], x_t: Tensor, t: Tensor, **condition: Tensor
) -> Tensor:
    """E[x | x_t]; `act` sees what the inner layer returns, and what it returns itself, if anything, takes its place."""
    hook = inner_layer(denoiser).register_forward_hook(lambda module, args, output: act(output))
    try:
        return denoiser(x_t, t, **condition)
    finally:
        hook.remove()


def block_features(denoiser: Denoiser, x_t: Tensor, t: Tensor, **condition: Tensor) -> list[Tensor]:
    """What each block of a U-Net returns, (R, channels, height, width) from the first to the last, in the type of x_t.

    Raises:
        UsageError: for a network without blocks.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])  # a block that shrinks returns its skips, too

    hooks = [block.register_forward_hook(keep) for block in blocks(denoiser)]
    try:
        denoiser(x_t, t, **condition)
    finally:
        for hook in hooks:
            hook.remove()
    return [output.to(x_t.dtype) for output in seen]


def blocks(denoiser: object) -> list[nn.Module]:
    """The blocks of a denoiser's U-Net: those that shrink, the middle one, and those that grow.

    Raises:
        UsageError: for another network.
    """
    middle = inner_layer(denoiser)
    for module in denoiser.modules() if isinstance(denoiser, nn.Module) else ():
        down, up = getattr(module, "down_blocks", None), getattr(module, "up_blocks", None)
        if (
            getattr(module, "mid_block", None) is middle
            and isinstance(down, nn.ModuleList)
            and isinstance(up, nn.ModuleList)
        ):
            return [*down, middle, *up]
    raise UsageError("features of several blocks need a U-Net of diffusers")


def inner_layer(denoiser: object) -> nn.Module:
    """The layer whose output the features are.

    Raises:
        UsageError: for a network without such a layer.
    """
    for module in denoiser.modules() if isinstance(denoiser, nn.Module) else ():
        if isinstance(module, Adapted):
            return inner_layer(module.network)
        if isinstance(module, LevelMLP):
            return module.layers[-2]
        if isinstance(block := getattr(module, "mid_block", None), nn.Module):
            return block
    network = type(getattr(denoiser, "network", denoiser)).__name__
    raise UsageError(
        f"{network} has no middle block to take features from, nor is it a perceptron with noise levels: what sees "
        "features needs a learned denoiser (of points --teacher learned)"
    )
