"""U-Nets by channels and blocks, and EDM's denoisers made of them."""

from __future__ import annotations

import pytest
import torch

from vardistill.diffusion import check_denoiser
from vardistill.diffusion.schedules import VE
from vardistill.domains.pictures.config import UNetConfig
from vardistill.domains.pictures.unets import build_unet, edm_denoiser
from vardistill.errors import UsageError

SMALL = UNetConfig((8, 16))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 12)])
@pytest.mark.parametrize("classes", [0, 4])
def test_a_unet_is_a_denoiser_of_its_shape(shape: tuple[int, int, int], classes: int) -> None:
    denoiser = edm_denoiser(build_unet(SMALL, shape, classes, seed=0), 0.6, 0.01, 50.0)
    assert denoiser.data_shape == shape
    assert denoiser.classes == classes
    assert denoiser.schedule == VE(0.01, 50.0)
    check_denoiser(denoiser, shape, torch.zeros(()), {"labels": torch.arange(2)} if classes else {})


def test_a_unet_has_the_channels_and_blocks_asked_for() -> None:
    network = build_unet(UNetConfig((8, 16, 24), blocks=2), (1, 8, 8), 0, seed=0)
    assert [len(block.resnets) for block in network.down_blocks] == [2, 2, 2]
    assert [block.resnets[-1].out_channels for block in network.down_blocks] == [8, 16, 24]
    assert network.mid_block.attentions[0].to_q.weight.shape == (24, 24)


def test_weights_are_those_of_the_seed_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    a, b, c = (build_unet(SMALL, (1, 8, 8), 3, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, b[name]) for name, v in a.items())
    assert not torch.equal(a["class_embedding.weight"], c["class_embedding.weight"])


def test_the_denoiser_has_edms_preconditioning() -> None:
    """D = c_skip x + c_out F(c_in x, ¼ ln σ) with σ_d = 0.6 (arXiv 2206.00364, table 1)."""
    network = build_unet(SMALL, (1, 8, 8), 0, seed=0).double()
    denoiser, std = edm_denoiser(network, 0.6, 0.01, 50.0), 0.6
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = (0.01 * (50.0 / 0.01) ** t).view(-1, 1, 1, 1)
    x = sigma * torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = sigma**2 + std**2
    inside = network(x / total.sqrt(), sigma.flatten().log() / 4).sample
    expected = std**2 / total * x + sigma * std / total.sqrt() * inside
    torch.testing.assert_close(denoiser(x, t), expected, rtol=1e-9, atol=1e-9)


def test_pictures_that_do_not_halve_are_refused() -> None:
    for shape in ((1, 6, 8), (1, 8, 6)):
        with pytest.raises(UsageError, match="do not halve 2 times: give them another --size"):
            build_unet(UNetConfig((8, 8, 8)), shape, 0, seed=0)


@pytest.mark.parametrize(("channels", "blocks"), [((), 1), ((12,), 1), ((4,), 1), ((8, 0), 1), ((8,), 0)])
def test_sizes_that_fit_no_network_are_refused(channels: tuple[int, ...], blocks: int) -> None:
    with pytest.raises(UsageError, match="multiples of 8|at least 1"):
        UNetConfig(channels, blocks)
