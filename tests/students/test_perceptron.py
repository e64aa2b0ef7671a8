"""Generators: shapes, scale, seeds, and weights that come back from disk as they went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from linear_gaussian import Linears
from vardistill.errors import UsageError
from vardistill.networks import ACTIVATIONS, mlp
from vardistill.students.perceptron import MLP
from vardistill.students.student import Student


def small(seed: int = 0, **arguments: Any) -> MLP:
    torch.manual_seed(seed)
    return MLP(**({"latent": 3, "data": 2, "depth": 2, "width": 16} | arguments))


def test_shapes_and_dtype() -> None:
    generator = small().double()
    assert (generator.latent_shape, generator.data_shape) == ((3,), (2,))
    z = generator.latents(5, torch.Generator().manual_seed(0))
    assert (z.shape, z.dtype) == ((5, 3), torch.float64)
    assert (generator(z).shape, generator(z).dtype) == ((5, 2), torch.float64)
    assert generator.sample(7).shape == (7, 2)


def test_latents_are_standard_normal() -> None:
    """χ² of 60,000 squares, 4.4 standard deviations: failure rate 1e-5, seed 0."""
    z = small().latents(20_000, torch.Generator().manual_seed(0)).double()
    assert abs(z.mean()) < 4.4 / z.numel() ** 0.5
    assert abs(z.pow(2).mean() - 1) < 4.4 * (2 / z.numel()) ** 0.5


def test_output_is_scaled_and_moved_by_the_data() -> None:
    plain, scaled = small(), small(data_std=7.0, data_mean=-3.0)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled(z), -3.0 + 7.0 * plain(z))


def test_a_linear_map_begins_at_the_datas_mean() -> None:
    assert torch.equal(small(linear=True, data_mean=-3.0).sample(4), torch.full((4, 2), -3.0))


def in_bfloat16(generator: MLP, z: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x: torch.Tensor = generator(z)
    return x


def test_bfloat16_leaves_the_places_of_z_and_x_alone() -> None:
    """Without hidden layers between the first and the last nothing is rounded: phases, linear map and result."""
    generator = small(latent=2, depth=1, fourier=16, linear=True, data_std=20.0)
    torch.nn.init.normal_(generator.layers[-1].weight)
    generator.slope.copy_(torch.tensor([[25.0, 1.0], [-3.0, 18.0]]))
    z = generator.latents(100, torch.Generator().manual_seed(0))
    assert torch.equal(in_bfloat16(generator, z), generator(z).detach())


def test_bfloat16_rounds_hidden_layers() -> None:
    """By some roundings of 2⁻⁹ of the largest value."""
    generator = small(latent=2, depth=3, fourier=16, activation="relu")
    z = generator.latents(100, torch.Generator().manual_seed(0))
    exact, rounded = generator(z).detach(), in_bfloat16(generator, z)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=2**-6 * float(exact.abs().max()), rtol=0)


def test_samples_have_a_seed_and_no_gradient() -> None:
    generator = small()
    state = torch.get_rng_state()
    x = generator.sample(8, seed=1)
    assert not x.requires_grad
    assert torch.equal(x, generator.sample(8, seed=1))
    assert not torch.equal(x, generator.sample(8, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(x, generator(generator.latents(8, torch.Generator().manual_seed(1))).detach())


@pytest.mark.parametrize("block", [1, 3, 10, 11, 65_536])
def test_samples_do_not_depend_on_the_block(block: int) -> None:
    """To rounding: matrix products of different sizes may add in different orders."""
    generator = small().double()
    torch.testing.assert_close(generator.sample(11, block=block), generator.sample(11), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_parameter_gets_a_gradient(activation: str) -> None:
    generator = small(activation=activation)
    generator(torch.randn(64, 3, generator=torch.Generator().manual_seed(0))).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())


@pytest.mark.parametrize("arguments", [{}, {"activation": "gelu", "data_std": 33.0, "data_mean": 1.5, "depth": 1}])
def test_weights_and_settings_come_back_from_disk(tmp_path: Path, arguments: dict[str, Any]) -> None:
    generator = small(**arguments)
    generator.save_pretrained(tmp_path)
    loaded = MLP.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["config.json", "model.safetensors"]
    assert torch.equal(loaded.sample(100), generator.sample(100))
    assert (loaded.latent_shape, loaded.data_shape) == (generator.latent_shape, generator.data_shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent": 0}, "latent must be at least 1, but is 0"),
        ({"data": -1}, "data must be at least 1, but is -1"),
        ({"depth": 0}, "depth must be at least 1, but is 0"),
        ({"width": 0}, "width must be at least 1, but is 0"),
        ({"latent": 2.0}, "latent must be a whole number, but is 2.0"),
        ({"latent": "2"}, "latent must be a whole number, but is 2"),
        ({"depth": True}, "depth must be a whole number, but is True"),
        ({"fourier": -1}, "fourier must be at least 0, but is -1"),
        ({"data_std": 0.0}, "data_std must be a number, positive and finite, but is 0"),
        ({"data_std": float("nan")}, "data_std must be a number, positive and finite, but is nan"),
        ({"data_std": float("inf")}, "data_std must be a number, positive and finite, but is inf"),
        ({"data_std": "1"}, "data_std must be a number, positive and finite, but is 1"),
        ({"data_std": torch.ones(2)}, "data_std must be a number, positive and finite, but is tensor([1., 1.])"),
        ({"activation": "sliu"}, "unknown activation 'sliu': did you mean silu"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        small(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2.5}, "the number of samples must be a whole number, but is 2.5"),
        ({"n": "3"}, "the number of samples must be a whole number, but is 3"),
        ({"n": 0}, "the number of samples must be at least 1, but is 0"),
        ({"n": 3, "seed": "a"}, "seed must be a whole number of 64 bits, but is a"),
        ({"n": 3, "seed": 2**64}, "seed must be a whole number of 64 bits, but is 18446744073709551616"),
        ({"n": 3, "block": 0}, "block must be at least 1, but is 0"),
    ],
)
def test_samples_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        small().sample(**arguments)
    assert str(caught.value) == message


def test_labels_and_points_are_tensors() -> None:
    with pytest.raises(UsageError, match="^labels must be a tensor of 2 integers below 3, but is list$"):
        conditional().sample(2, labels=[0, 1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^points must be a tensor \(n, d\) of floats, but is list$"):
        MLP.from_data([[0.0, 1.0]])  # type: ignore[arg-type]


def conditional() -> Linears:
    rng = torch.Generator().manual_seed(0)
    return Linears(torch.randn(3, 2, 4, generator=rng), torch.randn(3, 2, generator=rng)).double()


@pytest.mark.parametrize("block", [1, 3, 65_536])
def test_samples_of_labels_are_those_of_their_latents(block: int) -> None:
    generator, labels = conditional(), torch.tensor([2, 0, 1, 1, 2, 0, 0])
    x = generator.sample(7, seed=5, block=block, labels=labels)
    z = generator.latents(7, torch.Generator().manual_seed(5))
    assert not x.requires_grad
    for row, latent, label in zip(x, z, labels, strict=True):
        torch.testing.assert_close(row, generator.A[label] @ latent + generator.b[label])


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "the generator is conditional: give 3 integer labels below 3"),
        (torch.tensor([0, 1]), "the generator is conditional: give 3 integer labels below 3"),
        (torch.tensor([[0, 1, 2]]), "the generator is conditional: give 3 integer labels below 3"),
        (torch.tensor([0.0, 1.0, 2.0]), "the generator is conditional: give 3 integer labels below 3"),
        (torch.tensor([0, 1, 3]), r"labels must be in \[0, 3\), but are 0 to 3"),
        (torch.tensor([0, -1, 2]), r"labels must be in \[0, 3\), but are -1 to 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor | None, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        conditional().sample(3, labels=labels)
    assert "\n" not in str(caught.value)


def test_an_unconditional_generator_takes_no_labels() -> None:
    with pytest.raises(UsageError, match="the generator is unconditional: it takes no labels"):
        small().sample(3, labels=torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("n", [0, -3])
def test_no_samples_are_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"at least 1, but is {n}"):
        small().sample(n)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_perceptron_has_the_layers_asked_for(depth: int) -> None:
    sizes = [(p.shape[1], p.shape[0]) for p in mlp(3, 2, depth, 7).parameters() if p.ndim == 2]
    assert sizes == [(3, 7), *[(7, 7)] * (depth - 1), (7, 2)]


def test_a_generator_of_ones_own_needs_forward_and_shapes_only() -> None:
    class Shift(Student):
        latent_shape = data_shape = (1, 2, 2)

        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Parameter(torch.tensor(4.0))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z + self.offset

    assert Shift().sample(3).shape == (3, 1, 2, 2)
