"""Noise levels: their laws, their motion over a run, weights, antithetic pairs, rows and shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from vardistill.diffusion.denoiser import score
from vardistill.diffusion.levels import EDM, LevelDistribution, LogNormal, PowerLaw, UniformTime, normal_quantile
from vardistill.diffusion.noise import Draw, Noise, NoiseLevels
from vardistill.diffusion.schedules import VE, VP, Cosine, Rectified, Schedule
from vardistill.diffusion.weights import named_weight, weights
from vardistill.errors import UsageError

SCHEDULES = [VE(1e-4, 1e3), VP(), Cosine(), Rectified()]
DISTRIBUTIONS = [PowerLaw(), LogNormal(), LogNormal(broad=0.3), EDM(), UniformTime()]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: type(d).__name__)
stratified_or_not = pytest.mark.parametrize("stratified", [False, True], ids=["independent", "stratified"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ratios(
    distribution: LevelDistribution, schedule: Schedule, progress: float, n: int, stratified: bool = False
) -> Tensor:
    """σ/α of a draw, in double precision."""
    levels = NoiseLevels(schedule, distribution, stratified=stratified)
    noise = levels.draw((1,), n, progress, generator(), torch.float64)
    return noise.sigma / noise.alpha


def power_law_cdf(r: Tensor, progress: float) -> Tensor:
    rho = min(0.1 + progress / 0.19 * 1.9, 2.0)
    return ((r - 0.1) / 19.9).clamp(0, 1) ** (1 / rho)


def log_normal_cdf(r: Tensor, progress: float) -> Tensor:
    base = 15.0 * (0.5 / 15.0) ** min(progress / 0.8, 1.0)
    return torch.special.ndtr((r / base).log() / 0.5)


def broad_cdf(r: Tensor, progress: float) -> Tensor:
    broad = ((r / 0.5).log() / math.log(20)).clamp(0, 1)
    return 0.7 * log_normal_cdf(r, progress) + 0.3 * broad


def edm_cdf(r: Tensor, progress: float) -> Tensor:
    return torch.special.ndtr((r.log() + 1.2) / 1.2)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("distribution", "cdf"),
    [
        (PowerLaw(), power_law_cdf),
        (LogNormal(), log_normal_cdf),
        (LogNormal(broad=0.3), broad_cdf),
        (EDM(), edm_cdf),
    ],
    ids=["power law", "log-normal", "broad", "EDM"],
)
@stratified_or_not
@every_schedule
def test_law_of_the_ratio(
    schedule: Schedule,
    stratified: bool,
    distribution: LevelDistribution,
    cdf: Callable[[Tensor, float], Tensor],
    progress: float,
) -> None:
    """Seed 0; by the DKW inequality the distance exceeds √(log(2/p)/2n) with probability p = 1e-5 at most."""
    n = 20_000
    ratio = ratios(distribution, schedule, progress, n, stratified).sort().values
    at = cdf(ratio, progress)
    step = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((step[1:] - at).max(), (at - step[:-1]).max())
    assert distance < math.sqrt(math.log(2 / 1e-5) / (2 * n))


@stratified_or_not
@every_schedule
def test_uniform_time(schedule: Schedule, stratified: bool) -> None:
    """Kolmogorov–Smirnov as above."""
    n = 20_000
    levels = NoiseLevels(schedule, UniformTime(0.1, 0.7), stratified=stratified)
    t = levels.draw((1,), n, 0.0, generator(), torch.float64).t.sort().values
    distance = ((t - 0.1) / 0.6 - torch.linspace(0, 1, n, dtype=torch.float64)).abs().max()
    assert distance < math.sqrt(math.log(2 / 1e-5) / (2 * n))


def test_power_law_climbs_as_the_reference() -> None:
    """ρ starts at 0.1 and grows by 0.01 every 1000 of 1,000,000 steps, up to 2."""
    for step in [*range(0, 1_000_000, 500), 999, 1001, 189_999, 190_000, 1_000_000]:
        reference = min(0.1 + 0.01 * (step // 1000), 2.0)
        assert PowerLaw().rho(step / 1_000_000) == pytest.approx(reference, abs=1e-12)


@given(progress=st.floats(0, 1))
def test_log_normal_anneals_geometrically(progress: float) -> None:
    """log base is linear in progress up to `anneal`, then constant; the median is the base."""
    levels = LogNormal(base_start=8.0, base_end=0.5, anneal=0.5)
    assert levels.base(progress) == pytest.approx(8 * 2 ** (-4 * min(2 * progress, 1)))
    median = levels(torch.tensor([0.5], dtype=torch.float64), progress, VE())
    assert float(median) == pytest.approx(levels.base(progress))


@every_distribution
@given(u=st.lists(st.floats(1e-7, 1 - 1e-7), min_size=1), progress=st.floats(0, 1))
def test_levels_stay_in_range(distribution: LevelDistribution, u: list[float], progress: float) -> None:
    ratio = distribution(torch.tensor(u, dtype=torch.float64), progress, Cosine())
    assert ratio.shape == (len(u),)
    assert (ratio > 0).all()
    assert ratio.isfinite().all()
    if isinstance(distribution, PowerLaw | LogNormal):
        slack = 1 + 1e-12
        assert (ratio >= distribution.sigma_min / slack).all()
        assert (ratio <= distribution.sigma_max * slack).all()


@given(u=st.floats(1e-6, 1 - 1e-6))
def test_normal_quantile(u: float) -> None:
    point = torch.tensor(u, dtype=torch.float64)
    torch.testing.assert_close(normal_quantile(point), torch.special.ndtri(point), rtol=1e-7, atol=1e-9)


@every_distribution
@every_schedule
@stratified_or_not
def test_single_precision_levels_are_finite(
    schedule: Schedule, distribution: LevelDistribution, stratified: bool
) -> None:
    noise = NoiseLevels(schedule, distribution, stratified=stratified).draw((1,), 100_000, 0.3, generator())
    for v in (noise.t, noise.alpha, noise.sigma):
        assert v.dtype == torch.float32
        assert v.isfinite().all()
        assert (v > 0).all()
    assert (noise.t <= 1).all()


@given(
    alpha=st.floats(0.01, 1),
    sigma=st.floats(0.01, 100),
    sigma_data=st.floats(0.1, 50),
    sigma_max=st.floats(1, 100),
)
def test_weights(alpha: float, sigma: float, sigma_data: float, sigma_max: float) -> None:
    ratio = sigma / alpha
    expected = {
        "one": 1.0,
        "sigma2": sigma**2,
        "sigma2_max": (ratio / sigma_max) ** 2,
        "inverse_sigma": 1 / sigma,
        "snr": 1 / ratio**2,
        "edm": (ratio**2 + sigma_data**2) / (ratio * sigma_data) ** 2,
        "sigma2_linear": ratio**2 / (ratio + sigma_data / 20),
    }
    assert weights(sigma_data, sigma_max).keys() == expected.keys()
    scales = torch.tensor([[alpha], [sigma]], dtype=torch.float64)
    for name, value in expected.items():
        weight = named_weight(name, sigma_data, sigma_max)(*scales)
        assert weight.shape == (1,)
        assert float(weight) == pytest.approx(value, rel=1e-9)


def test_any_callable_is_a_weight() -> None:
    levels = NoiseLevels(VP(), EDM(), weight=lambda alpha, sigma: 3 * alpha + sigma)
    noise = levels.draw((2,), 5, 0.0, generator())
    torch.testing.assert_close(noise.weight, 3 * noise.alpha + noise.sigma)


def draw(shape: tuple[int, ...] = (2,), n: int = 6, draws: int = 1, antithetic: bool = False, seed: int = 0) -> Noise:
    levels = NoiseLevels(VP(), LogNormal(), named_weight("sigma2"), draws=draws, antithetic=antithetic)
    return levels.draw(shape, n, 0.5, generator(seed), torch.float64)


@pytest.mark.parametrize("shape", [(), (2,), (3, 4, 4)])
@pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (3, False), (2, True), (4, True)])
def test_shapes_and_scales(shape: tuple[int, ...], draws: int, antithetic: bool) -> None:
    noise = draw(shape, 6, draws, antithetic)
    rows = 6 * draws
    assert noise.latents == 6
    assert noise.eps.shape == (rows, *shape)
    for v in (noise.t, noise.alpha, noise.sigma, noise.weight):
        assert v.shape == (rows,)
    alpha, sigma = VP()(noise.t)
    torch.testing.assert_close(noise.alpha, alpha)
    torch.testing.assert_close(noise.sigma, sigma)
    torch.testing.assert_close(noise.weight, noise.sigma**2)


@pytest.mark.parametrize("draws", [2, 4])
def test_antithetic_twins(draws: int) -> None:
    """Row r and its twin R/2 rows on share latent and time, with opposite ε; other rows share nothing."""
    noise = draw((2,), 6, draws, antithetic=True)
    half = 6 * draws // 2
    for v in (noise.t, noise.alpha, noise.sigma, noise.weight):
        assert torch.equal(v[:half], v[half:])
    assert torch.equal(noise.eps[:half], -noise.eps[half:])
    latent = noise.rows(torch.arange(6))
    assert torch.equal(latent[:half], latent[half:])
    assert len(noise.t.unique()) == half
    assert len(noise.eps.abs().unique()) == 2 * half


def test_rows_share_latents() -> None:
    noise = draw((2,), 6, 3)
    latents = torch.randn(6, 4, generator=generator())
    for r, row in enumerate(noise.rows(latents)):
        assert torch.equal(row, latents[r % 6])


def test_noising() -> None:
    """x_t = α x + σ ε, with a gradient α in x; a pair's mean is α x."""
    noise = draw((3, 4), 6, 2, antithetic=True)
    x = noise.rows(torch.randn(6, 3, 4, generator=generator(), dtype=torch.float64)).requires_grad_()
    of_draw = Draw(z=torch.zeros(12, 2), x=x, noise=noise, generator=torch.nn.Identity()).x_t
    assert torch.equal(of_draw, noise.x_t(x))
    for r in range(12):
        torch.testing.assert_close(of_draw[r], noise.alpha[r] * x[r] + noise.sigma[r] * noise.eps[r])
    torch.testing.assert_close((of_draw[:6] + of_draw[6:]) / 2, noise.alpha[:6, None, None] * x[:6])
    of_draw.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, noise.alpha[:, None, None].expand(12, 3, 4))


def test_eps_is_standard_normal() -> None:
    """Seed 0, 40,000 values: mean and second moment within 5 standard errors fail at 1.2e-6."""
    for antithetic in (False, True):
        eps = draw((2,), 10_000, 2, antithetic).eps
        independent = eps[: len(eps) // 2] if antithetic else eps
        n = independent.numel()
        assert independent.mean().abs() < 5 / math.sqrt(n)
        assert (independent.square().mean() - 1).abs() < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_shards_are_the_whole(processes: int) -> None:
    """Each process gets all rows of its latents, antithetic twins included; together every row once."""
    noise = draw((2,), 6, 4, antithetic=True)
    shards = [noise.shard(process, processes) for process in range(processes)]
    per_shard = 6 // processes
    for name in ("t", "alpha", "sigma", "weight", "eps"):
        whole = getattr(noise, name).unflatten(0, (4, 6))
        parts = [getattr(shard, name).unflatten(0, (4, per_shard)) for shard in shards]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    for process, shard in enumerate(shards):
        assert shard.latents == per_shard
        half = 2 * per_shard
        assert torch.equal(shard.eps[:half], -shard.eps[half:])
        mine = torch.arange(6)[process * per_shard : (process + 1) * per_shard]
        whole_rows = noise.x_t(noise.rows(torch.eye(6, 2, dtype=torch.float64)))
        shard_rows = shard.x_t(shard.rows(torch.eye(6, 2, dtype=torch.float64)[mine]))
        assert torch.equal(shard_rows, whole_rows.unflatten(0, (4, 6))[:, mine].flatten(0, 1))


def test_strata() -> None:
    """One u in each of n equal strata, in random order: over 2000 draws row 0's mean u is near ½.

    Seed 0; the mean of 2000 uniforms is within 5 standard errors but for 6e-7.
    """
    levels = NoiseLevels(Rectified(), UniformTime(0.0, 1.0), stratified=True)
    rng = generator()
    first = []
    for _ in range(2000):
        t = levels.draw((1,), 8, 0.0, rng, torch.float64).t
        assert (t * 8).floor().sort().values.tolist() == list(range(8))
        first.append(t[0])
    assert (torch.stack(first).mean() - 0.5).abs() < 5 / math.sqrt(12 * 2000)


def test_strata_lower_the_variance() -> None:
    """Of a batch's mean of σ, by more than ten times for 64 rows; 500 draws of seed 0."""

    def spread(stratified: bool) -> Tensor:
        levels, rng = NoiseLevels(VE(), LogNormal(), stratified=stratified), generator()
        return torch.stack([levels.draw((1,), 64, 0.5, rng).sigma.mean() for _ in range(500)]).var()

    assert spread(True) < spread(False) / 10


def test_determined_by_rng() -> None:
    """The same state gives the same draw; the global random state has no part in it and is left alone."""
    one, rng = draw((2,), 6, 2), generator()
    before = torch.random.get_rng_state()
    other = NoiseLevels(VP(), LogNormal(), named_weight("sigma2"), draws=2).draw((2,), 6, 0.5, rng, torch.float64)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("t", "alpha", "sigma", "weight", "eps"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert not torch.equal(draw(seed=1).eps, draw(seed=2).eps)
    assert not torch.equal(draw(seed=1).t, draw(seed=2).t)


every_kind_of_draw = pytest.mark.parametrize(("draws", "antithetic"), [(1, False), (3, False), (2, True), (4, True)])


def shared_levels(shared: int, draws: int = 1, antithetic: bool = False, stratified: bool = False) -> NoiseLevels:
    return NoiseLevels(VP(), LogNormal(), named_weight("sigma2"), draws, antithetic, stratified, shared)


class TestSharedLevels:
    @every_kind_of_draw
    @stratified_or_not
    def test_the_rows_of_a_group_share_a_level(self, draws: int, antithetic: bool, stratified: bool) -> None:
        levels = shared_levels(4, draws, antithetic, stratified)
        noise = levels.draw((2,), 12, 0.5, generator(), torch.float64)
        assert noise.shared == 4
        for v in (noise.t, noise.alpha, noise.sigma, noise.weight):
            groups = noise.groups(v)
            assert groups.shape == (4 * draws, 3)
            assert torch.equal(groups, groups[:, :1].expand(-1, 3))
        assert len(noise.t.unique()) == 4 * (draws // 2 if antithetic else draws)
        latents = noise.groups(noise.rows(torch.arange(12)))
        assert all(len(set(group.tolist())) == 3 for group in latents)
        assert len(noise.eps.abs().unique()) == 2 * 12 * (draws // 2 if antithetic else draws)
        if antithetic:
            half = len(noise.t) // 2
            assert torch.equal(noise.t[:half], noise.t[half:])
            assert torch.equal(noise.eps[:half], -noise.eps[half:])

    @every_kind_of_draw
    @pytest.mark.parametrize("shape", [(), (2,), (3, 4)])
    def test_ungroup_is_the_inverse_of_groups(self, shape: tuple[int, ...], draws: int, antithetic: bool) -> None:
        noise = shared_levels(4, draws, antithetic).draw((1,), 12, 0.5, generator())
        v = torch.randn(12 * draws, *shape, generator=generator(1))
        assert noise.groups(v).shape == (4 * draws, 3, *shape)
        assert torch.equal(noise.ungroup(noise.groups(v)), v)
        rows = torch.arange(12 * draws)
        for g, group in enumerate(noise.groups(rows)):
            assert all(r // 12 == g // 4 and r % 12 % 4 == g % 4 for r in group.tolist())

    @pytest.mark.parametrize("processes", [1, 2, 3])
    @every_kind_of_draw
    def test_shards_keep_the_groups(self, draws: int, antithetic: bool, processes: int) -> None:
        """The shards' parts of a group, side by side, are the whole's."""
        noise = shared_levels(2, draws, antithetic).draw((2,), 12, 0.5, generator(), torch.float64, real=True)
        shards = [noise.shard(process, processes) for process in range(processes)]
        assert all((shard.shared, shard.latents) == (2, 12 // processes) for shard in shards)
        for name in ("t", "alpha", "sigma", "weight", "eps", "real_eps"):
            parts = [shard.groups(getattr(shard, name)) for shard in shards]
            assert torch.equal(torch.cat(parts, 1), noise.groups(getattr(noise, name)))

    @stratified_or_not
    def test_they_have_the_distributions_law(self, stratified: bool) -> None:
        """Seed 0; by the DKW inequality the distance exceeds √(log(2/p)/2n) with probability p = 1e-5 at most."""
        n = 20_000
        noise = NoiseLevels(VE(1e-4, 1e3), LogNormal(broad=0.3), stratified=stratified, shared=n)
        ratio = noise.draw((1,), 2 * n, 0.3, generator(), torch.float64).sigma[:n].sort().values
        at, step = broad_cdf(ratio, 0.3), torch.arange(n + 1, dtype=torch.float64) / n
        distance = torch.maximum((step[1:] - at).max(), (at - step[:-1]).max())
        assert distance < math.sqrt(math.log(2 / 1e-5) / (2 * n))

    def test_strata_are_as_many_as_levels(self) -> None:
        levels = NoiseLevels(Rectified(), UniformTime(0.0, 1.0), draws=2, stratified=True, shared=4)
        t = levels.draw((1,), 12, 0.0, generator(), torch.float64).t
        assert (t.unique() * 8).floor().tolist() == list(range(8))

    def test_a_batch_that_does_not_split_is_refused(self) -> None:
        with pytest.raises(UsageError, match="the batch must be divisible by the 4 shared levels, but is 10"):
            shared_levels(4).draw((2,), 10, 0.5, generator())
        with pytest.raises(UsageError, match="every row has a noise level of its own"):
            draw().groups(torch.zeros(6))


@every_kind_of_draw
@stratified_or_not
def test_levels_of_ones_own_are_drawn_as_they_ever_were(draws: int, antithetic: bool, stratified: bool) -> None:
    """Bit for bit: u, then its strata's order, then ε, and nothing else unless real samples are asked for."""
    levels = shared_levels(0, draws, antithetic, stratified)
    rng = generator()
    n = 6 * (draws // 2 if antithetic else draws)
    u = torch.rand(n, generator=rng, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(n, generator=rng) + u) / n
    t = VP().time(LogNormal()(u.clamp(1e-7, 1 - 1e-7), 0.5, VP())).clamp(0, 1)
    eps = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    after = torch.randn(5, generator=rng)
    if antithetic:
        t, eps = t.repeat(2), torch.cat([eps, -eps])
    own = generator()
    noise = levels.draw((2,), 6, 0.5, own, torch.float64)
    assert torch.equal(noise.t, t)
    assert torch.equal(noise.eps, eps)
    assert noise.real_eps is None
    assert torch.equal(torch.randn(5, generator=own), after)
    with_real = levels.draw((2,), 6, 0.5, generator(), torch.float64, real=True)
    assert torch.equal(with_real.eps, eps)
    assert with_real.real_eps is not None
    assert len(torch.cat([with_real.real_eps, eps]).abs().unique()) == 2 * (n + len(eps))


def test_real_samples_are_noised_by_noise_of_their_own() -> None:
    """y_t = α y + σ ε′ at the level of the row."""
    noise = shared_levels(2, draws=2).draw((3,), 4, 0.5, generator(), torch.float64, real=True)
    y = torch.randn(8, 3, generator=generator(1), dtype=torch.float64)
    of_draw = Draw(y, y, noise, torch.nn.Identity(), real=y).real_t
    for r in range(8):
        assert noise.real_eps is not None
        torch.testing.assert_close(of_draw[r], noise.alpha[r] * y[r] + noise.sigma[r] * noise.real_eps[r])
    assert not torch.equal(noise.eps, noise.real_eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLaw(2.0, 1.0), "sigma_min must be positive and below sigma_max"),
        (lambda: PowerLaw(rho_start=0.0), "rho must be positive"),
        (lambda: PowerLaw(rho_end=-1.0), "rho must be positive"),
        (lambda: LogNormal(sigma_min=1.0, sigma_max=1.0), "sigma_min must be positive and below sigma_max"),
        (lambda: LogNormal(base_start=0.0), "base must be positive"),
        (lambda: LogNormal(base_end=-1.0), "base must be positive"),
        (lambda: LogNormal(broad=1.5), r"broad must be a share in \[0, 1\]"),
        (lambda: LogNormal(broad_min=2.0, broad_max=1.0), "broad_min must be positive and below broad_max"),
        (lambda: UniformTime(0.5, 0.5), "t_min and t_max must obey"),
        (lambda: UniformTime(-0.1, 0.5), "t_min and t_max must obey"),
        (lambda: UniformTime(0.5, 1.1), "t_min and t_max must obey"),
        (lambda: named_weight("sigma"), "unknown weight 'sigma': did you mean .*sigma2"),
        (lambda: NoiseLevels(VE(), EDM(), draws=0), "draws must be at least 1, but is 0"),
        (lambda: NoiseLevels(VE(), EDM(), draws=3, antithetic=True), "even number .* draws=3"),
        (lambda: NoiseLevels(VE(), EDM(), shared=-1), "shared must be 0 or the number of levels .*, but is -1"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


class Counting:
    """D(x_t, t, c) = c x_t, which counts its calls."""

    schedule = VP()

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        self.calls += 1
        return scale[:, None] * x_t


class TestMemo:
    """What a draw remembers is that of its own samples, noise and conditions."""

    @pytest.fixture
    def draw(self) -> Draw:
        rng, levels = generator(), NoiseLevels(VP(), EDM(), draws=2)
        noise, other = (levels.draw((3,), 4, 0.0, rng) for _ in range(2))
        x = torch.randn(4, 3, generator=rng).requires_grad_()
        batch = {"scale": torch.rand(8, generator=rng)}
        return Draw(x, noise.rows(x), noise, torch.nn.Identity(), batch=batch, other_noise=(other,))

    def test_a_denoiser_is_asked_once(self, draw: Draw) -> None:
        denoiser = Counting()
        s, again = draw.score(denoiser), draw.score(denoiser)
        denoised = draw.denoised(denoiser)
        assert denoiser.calls == 1
        assert torch.equal(s, again)
        expected = score(denoiser, draw.x_t, draw.noise.t, **draw.batch)
        torch.testing.assert_close(s, expected.detach())
        torch.testing.assert_close(denoised, (draw.batch["scale"][:, None] * draw.x_t).detach())
        assert not s.requires_grad
        detached = replace(draw, x=draw.x.detach().requires_grad_())  # as diagnostics take it
        assert torch.equal(detached.score(denoiser), s)
        assert denoiser.calls == 2  # the expectation's own

    def test_it_is_asked_again_for_other_samples_noise_conditions_and_by_others(self, draw: Draw) -> None:
        denoiser = Counting()
        draw.denoised(denoiser)
        changed = [
            replace(draw, x=draw.x + 1),
            replace(draw, noise=replace(draw.noise, eps=-draw.noise.eps)),
            replace(draw, batch={"scale": torch.ones(8)}),
        ]
        for other in changed:
            expected = (other.batch["scale"][:, None] * other.x_t).detach()
            torch.testing.assert_close(other.denoised(denoiser), expected)
        assert denoiser.calls == 4
        for _ in range(3):  # others, that may come to lie at one place
            once = Counting()
            draw.denoised(once)
            assert once.calls == 1

    def test_a_draw_under_another_noise_keeps_the_graph_whoever_asks_first(self, draw: Draw) -> None:
        (noise,) = draw.other_noise
        with torch.no_grad():
            first = draw.under(noise)
        assert draw.under(noise) is first
        (gradient,) = torch.autograd.grad(first.x_t.sum(), draw.z, retain_graph=True)
        assert torch.equal(gradient, noise.alpha.view(2, 4).sum(0)[:, None].expand(4, 3))
        moved = replace(draw, x=draw.x + 1)
        torch.testing.assert_close(moved.under(noise).x, first.x + 1)
