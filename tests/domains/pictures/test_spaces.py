"""Where VarFlow takes distances: frozen features that are differentiable in the noisy pictures."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_dit, tiny_unet
from vardistill.denoisers import DiffusersDenoiser
from vardistill.domains.pictures.classifier import Classifier
from vardistill.domains.pictures.spaces import PLACES, BlocksSpace, ClassifierSpace, EncoderSpace
from vardistill.errors import UsageError
from vardistill.objectives import VarFlow


def classifier_space() -> ClassifierSpace:
    classifier = Classifier((1, 8, 8), ("a", "b")).initialise(torch.Generator().manual_seed(0))
    return ClassifierSpace(classifier)


def encoder_space(classes: int | None = None, label: int | None = None) -> EncoderSpace:
    return EncoderSpace(DiffusersDenoiser(tiny_unet(classes), diffusers.DDIMScheduler()), label)


def blocks_space(classes: int | None = None, label: int | None = None) -> BlocksSpace:
    return BlocksSpace(DiffusersDenoiser(tiny_unet(classes), diffusers.DDIMScheduler()), label)


def noisy(n: int = 3) -> tuple[Tensor, Tensor]:
    x_t = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x_t, torch.linspace(0.2, 0.8, n)


@pytest.mark.parametrize("make", [classifier_space, encoder_space])
def test_features_are_frozen_and_differentiable_in_the_pictures(make: type) -> None:
    space = make()
    assert not VarFlow(features=space).networks
    assert not any(module.training for module in space.modules())
    x_t, t = noisy()
    x_t.requires_grad_()
    features = space(x_t, t)
    assert features.shape[0] == 3
    assert features.ndim == 2
    features.square().sum().backward()
    assert x_t.grad is not None
    assert bool((x_t.grad.flatten(1).norm(dim=1) > 1e-6).all())
    assert all(p.grad is None for p in space.parameters())


def test_the_classifiers_space_is_its_features_at_every_level() -> None:
    space = classifier_space()
    x_t, t = noisy()
    assert torch.equal(space(x_t, t), space.classifier.features(x_t))
    assert torch.equal(space(x_t, t), space(x_t, 1 - t))


def test_the_encoders_space_is_what_the_middle_block_returns() -> None:
    """Equal to the first half of the network run by hand, with its skips left out of the middle."""
    space = encoder_space()
    x_t, t = noisy()
    network = space.denoiser.network
    embedded = network.time_embedding(network.time_proj(999 * t))
    h = network.conv_in(x_t)
    for block in network.down_blocks:
        h, _ = block(h, embedded)
    expected = network.mid_block(h, embedded).flatten(1)
    torch.testing.assert_close(space(x_t, t), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(space(x_t, t), space(x_t, 1 - t), atol=1e-3)


def test_what_follows_the_middle_block_is_not_run() -> None:
    """Nor are its gradients taken: a network whose last layers fail has the same features."""
    space, broken = encoder_space(), encoder_space()

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise AssertionError("ran")

    for module in (*broken.denoiser.network.up_blocks, broken.denoiser.network.conv_out):
        module.register_forward_pre_hook(fail)
    x_t, t = noisy()
    assert torch.equal(broken(x_t, t), space(x_t, t))


def test_bfloat16_by_name_by_autocast_and_by_the_weights() -> None:
    """Features come back in the type of x_t, within some roundings of 2⁻⁹ of those in single precision."""
    x_t, t = noisy()
    exact = encoder_space()(x_t, t)
    by_name = EncoderSpace(encoder_space().denoiser, mixed=True)(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = encoder_space()(x_t, t)
    half = encoder_space()
    half.bfloat16()
    assert torch.equal(by_name, by_autocast)
    for features in (by_name, half(x_t, t)):
        assert features.dtype == torch.float32
        assert 0 < (features - exact).abs().max() < 8 * 2**-9 * exact.abs().max()


def test_a_conditional_encoder_is_told_the_label() -> None:
    x_t, t = noisy()
    told = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        told.append(inputs[0])

    outputs = []
    for label in (0, 2):
        space = encoder_space(classes=3, label=label)
        space.denoiser.network.class_embedding.register_forward_pre_hook(keep)
        outputs.append(space(x_t, t))
    assert [labels.tolist() for labels in told] == [[0, 0, 0], [2, 2, 2]]
    assert not torch.allclose(*outputs, atol=1e-4)


def test_no_hook_stays_behind() -> None:
    space = encoder_space()
    middle = space.denoiser.network.mid_block
    space(*noisy())
    assert not middle._forward_hooks
    with pytest.raises(RuntimeError):
        space(torch.zeros(2, 5, 8, 8), torch.zeros(2))
    assert not middle._forward_hooks


def test_a_network_without_a_middle_block_is_refused() -> None:
    scheduler = diffusers.DDIMScheduler()
    for network, name in ((tiny_dit(), "DiTTransformer2DModel"), (tiny_unet(mid_block_type=None), "UNet2DModel")):
        with pytest.raises(UsageError, match=f"{name} has no middle block"):
            EncoderSpace(DiffusersDenoiser(network, scheduler))


class TestBlocks:
    def test_views_are_what_blocks_return_averaged_over_patches(self) -> None:
        """Of an 8×8 picture: places 4×4 of the blocks of 8×8 and of 4×4, whose means are the blocks' own."""
        space, (x_t, t) = blocks_space(), noisy()
        network, seen = space.denoiser.network, []
        parts = [*network.down_blocks, network.mid_block, *network.up_blocks]
        hooks = [
            p.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
            for p in parts
        ]
        network(x_t, 999 * t)
        for hook in hooks:
            hook.remove()
        views = space(x_t, t)
        assert len(views) == len(parts)
        for view, output in zip(views, seen, strict=True):
            side = min(PLACES, output.shape[2])
            assert view.shape == (3, side * side, output.shape[1])
            patches = output.unflatten(2, (side, -1)).unflatten(4, (side, -1)).mean((3, 5))
            torch.testing.assert_close(view, patches.flatten(2).transpose(1, 2))
        assert not any(p._forward_hooks for p in parts)

    def test_they_are_differentiable_in_the_pictures_and_frozen(self) -> None:
        space, (x_t, t) = blocks_space(), noisy()
        VarFlow(features=space)
        for view in space(x_t.requires_grad_(), t):
            (grad,) = torch.autograd.grad(view.square().sum(), x_t, retain_graph=True)
            assert bool((grad.flatten(1).norm(dim=1) > 0).all())
        assert not any(p.requires_grad for p in space.parameters())

    def test_a_conditional_teacher_sees_the_label_for_none(self) -> None:
        x_t, t = noisy()
        denoiser = blocks_space(4).denoiser
        of_two, of_three = (BlocksSpace(denoiser, label)(x_t, t) for label in (2, 3))
        assert not torch.allclose(of_two[0], of_three[0])

    def test_networks_without_blocks_are_refused(self) -> None:
        with pytest.raises(UsageError, match="DiTTransformer2DModel has no middle block"):
            BlocksSpace(DiffusersDenoiser(tiny_dit(), diffusers.DDIMScheduler()))
