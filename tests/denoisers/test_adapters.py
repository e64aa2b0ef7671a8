"""Adapters on one base: the same as separate copies, and nothing of the base is copied, moved or trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tiny_models import tiny_unet
from vardistill.denoisers import Adapted, DiffusersDenoiser, Mixed
from vardistill.denoisers.features import features
from vardistill.errors import UsageError

T = torch.tensor([0.3, 0.8])


def base_of(dtype: torch.dtype = torch.float32, **options: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser(tiny_unet(**options).to(dtype), diffusers.DDPMScheduler())


def adapted(base: DiffusersDenoiser, seed: int = 0, moved: float = 0.1, **options: Any) -> Adapted:
    """Adapters of rank 2 that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = Adapted(base, **({"rank": 2} | options))
        for name, p in found.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=moved) if moved else None
    return found


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def gradients(denoiser: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> list[Tensor]:
    """Of a loss with respect to these parameters and to x."""
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(denoiser(x, T).square().mean(), [x, *parameters]))


def trained(denoiser: Adapted, steps: int = 3) -> Adapted:
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        denoiser(x_of(step), T).square().mean().backward()
        optimizer.step()
    return denoiser


def test_an_adapter_starts_as_its_base_to_the_bit() -> None:
    base = base_of()
    assert torch.equal(adapted(base, moved=0.0)(x_of(), T), base(x_of(), T))


def test_its_formula() -> None:
    """(W + B A) x of a linear layer, and the same of a convolution's patches."""
    base = base_of()
    one = adapted(base)
    network, factors = one.network, dict(one.adapters.named_parameters())
    linear, convolution = "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1"
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    b, a = (factors[f"{linear}.lora_{name}.weight"] for name in "BA")
    weight = base.network.get_parameter(f"{linear}.weight") + b @ a
    expected = nn.functional.linear(x, weight, base.network.get_parameter(f"{linear}.bias"))
    torch.testing.assert_close(network.get_submodule(linear)(x), expected)
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    b, a = (factors[f"{convolution}.lora_{name}.weight"] for name in "BA")
    weight = base.network.get_parameter(f"{convolution}.weight") + torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    expected = nn.functional.conv2d(x, weight, base.network.get_parameter(f"{convolution}.bias"), padding=1)
    torch.testing.assert_close(network.get_submodule(convolution)(x), expected, rtol=1e-5, atol=1e-5)


def test_adapters_on_one_base_are_separate_copies_with_adapters() -> None:
    """Outputs and gradients, whichever was run before; each copy has a base of its own."""
    base = base_of()
    together = [adapted(base, seed) for seed in range(3)]
    apart = [adapted(base_of(), seed) for seed in range(3)]
    for _ in range(2):
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one(x_of(), T), other(x_of(), T), rtol=1e-6, atol=1e-6)
            pair = (gradients(d, list(d.parameters()), x_of()) for d in (one, other))
            for own, theirs in zip(*pair, strict=True):
                torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)
            trained(one), trained(other)
    assert not torch.allclose(together[0](x_of(), T), together[1](x_of(), T), atol=1e-3)


def test_training_moves_no_bit_of_the_base_and_gives_it_no_gradient() -> None:
    base = base_of()
    before, answers = copy.deepcopy(base.state_dict()), base(x_of(), T)
    student, critic = adapted(base, 0), adapted(base, 1)
    trained(student), trained(critic)
    assert all(torch.equal(v, before[name]) for name, v in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()
    assert torch.equal(base(x_of(), T), answers)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_a_gradient_passes_through_frozen_adapters_and_the_base_to_the_input() -> None:
    """As in SiD: by a finite difference in double precision."""
    base = base_of(torch.float64)
    critic = adapted(base).requires_grad_(False)
    x, v, t = x_of().double(), x_of(1).double(), T.double()

    def loss(x: Tensor) -> Tensor:
        return (critic(x, t) - base(x, t)).square().mean()

    given = x.clone().requires_grad_()
    loss(given).backward()
    assert given.grad is not None
    slope = (loss(x + 1e-5 * v) - loss(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close((given.grad * v).sum(), slope, rtol=1e-6, atol=1e-10)
    assert all(p.grad is None for p in (*critic.parameters(), *base.parameters()))


def storages(*modules: nn.Module) -> dict[int, int]:
    """Bytes by place in memory."""
    found = {}
    for module in modules:
        trees = [module.network] if isinstance(module, Adapted) else []
        for v in (v for tree in (module, *trees) for v in (*tree.parameters(), *tree.buffers())):
            found[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
    return found


def test_the_base_is_in_memory_once() -> None:
    base = base_of()
    student, critic = adapted(base, 0), adapted(base, 1)
    average = copy.deepcopy(student)
    own = sum(p.numel() * p.element_size() for p in student.parameters())
    assert sum(storages(base, student, critic, average).values()) == sum(storages(base).values()) + 3 * own
    layers = [m for m in base.network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(list(student.parameters())) == 2 * len(layers)


def test_a_copy_is_one_of_the_adapters_alone() -> None:
    base = base_of()
    student = adapted(base)
    before = student(x_of(), T)
    average = copy.deepcopy(Mixed(student)).denoiser
    trained(student)
    assert isinstance(average, Adapted)
    assert torch.equal(average(x_of(), T), before)
    assert not torch.equal(student(x_of(), T), before)
    average.load_state_dict(student.state_dict())
    assert torch.equal(average(x_of(), T), student(x_of(), T))
    assert {name.rpartition(".lora_")[0].partition(".")[0] for name in average.state_dict()} == {"adapters"}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_runs_the_right_adapters_again(precision: torch.dtype) -> None:
    """Student, critic and base in one loss: each block is run again in the backward pass, after all have run."""

    def loss_gradients(checkpointing: bool) -> list[Tensor]:
        base = base_of(precision)
        student, critic = adapted(base, 0), adapted(base, 1)
        for denoiser in (base, student, critic) if checkpointing else ():
            denoiser.network.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            x = student(x_of(), T)
            difference = critic(x, T) - base(x, T)
        return list(torch.autograd.grad(difference.square().mean(), [*student.parameters(), *critic.parameters()]))

    for own, plain in zip(loss_gradients(True), loss_gradients(False), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-6, atol=1e-8)


def test_checkpointing_drops_what_blocks_keep_for_the_backward_pass() -> None:
    """That the flag is heeded though networks are in evaluation mode: a block of the way down is run twice."""
    runs = 0

    def counted(*_: Any) -> None:
        nonlocal runs
        runs += 1

    student = adapted(base_of())
    block: Any = student.network.down_blocks[0]
    block.resnets[0].register_forward_pre_hook(counted)
    student.network.enable_gradient_checkpointing()
    student(x_of(), T).sum().backward()
    assert runs == 2


def test_a_base_in_half_precision_has_adapters_in_single() -> None:
    base = base_of(torch.bfloat16)
    student = adapted(base)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    trained(student)
    student.to(torch.float64)
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}


def test_merged_weights_leave_the_base_alone() -> None:
    base = base_of()
    student = trained(adapted(base))
    before = copy.deepcopy(base.state_dict())
    merged = student.merged()
    torch.testing.assert_close(merged(x_of(), T), student(x_of(), T), rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[name]) for name, v in base.state_dict().items())
    assert storages(merged).keys().isdisjoint(storages(base))
    assert not any(type(module).__module__.startswith("peft") for module in merged.modules())


def test_features_are_those_of_the_adapted_network() -> None:
    base = base_of()
    student = adapted(base)
    torch.testing.assert_close(features(student, x_of(), T), features(student.merged(), x_of(), T))
    assert not torch.allclose(features(student, x_of(), T), features(base, x_of(), T), atol=1e-3)


def test_it_knows_what_its_base_knows() -> None:
    base = base_of(classes=3)
    one = adapted(base)
    for name in ("schedule", "scheduler", "data_shape", "classes", "classes_given", "null_label", "latents"):
        assert repr(getattr(one, name)) == repr(getattr(base, name))
    with pytest.raises(AttributeError):
        one.nothing  # noqa: B018


def test_layers_are_chosen_by_the_ends_of_their_names() -> None:
    one = adapted(base_of(), targets=["conv1", "conv_out"])
    named = {name for name, _ in base_of().network.named_modules() if name.endswith(("conv1", "conv_out"))}
    assert {name.partition(".lora_A")[0] for name, _ in one.adapters.named_parameters() if "lora_A" in name} == named
    assert len(named) > 2


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda base: Adapted(base, 2, ["to_q"]), r"no linear or convolutional layer is named to_q; one is \S+$"),
        (lambda base: Adapted(base, 0), "rank of at least 1, and are added once; rank=0"),
        (lambda base: Adapted(Adapted(base, 2), 2), "added once"),
    ],
)
def test_foreign_layers_and_ranks_are_refused(of: Callable[[DiffusersDenoiser], Adapted], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        of(base_of())
