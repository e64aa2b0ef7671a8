r"""Variational posteriors q_φ(z | x_t, t, label) for images, by convolutional networks.

As in `posteriors`, networks see x_t/α scaled to unit variance and ln r/σ_d, r = σ_t/α_t, and scales are relative to
s(r) = r/√(r² + j²), the posterior's standard deviation where all singular values of the student's Jacobian ∂x/∂z are j
(σ_d for a latent of x's size that is spread over the data; less for one that says little). For a latent of the image's
size the parameters are maps, computed at half the resolution (2 × 2 pixels become channels, and back: Shi et al. 2016,
arXiv 1609.05158).

**Correlations.** Where a student x = g(z) is near linear, with Jacobian J, its posterior has the precision I + JᵀJ/r²:
x_t tells most of few directions of z. So a Gaussian of rank k is

    z = μ + S (I + VᵀV)⁻¹ η,   η ~ N(0, I),   S = diag(s(r) e^ω),   V (k, n),

with the precision S⁻¹ (I + Vᵀ(2I + VVᵀ)V) S⁻¹: diagonal but for k directions, in which it is narrower. With the k × k
matrix M = I + VVᵀ, (I + VᵀV)⁻¹ = I − Vᵀ M⁻¹ V (Woodbury) and det(I + VᵀV) = det M (Sylvester): both ways are exact, in
O(n k²).

**Shape.** A coupling flow (Dinh, Sohl-Dickstein & Bengio 2017, arXiv 1605.08803) bends the Gaussian: η is replaced by
u = f_L ∘ … ∘ f_1(η), where f_l keeps the pixels of one colour of a checkerboard, m, and moves the others,

    f_l(u) = m ∘ u + (1 − m) ∘ (e^{a_l(m ∘ u, x_t)} ∘ u + b_l(m ∘ u, x_t)),   ln det = Σ (1 − m) ∘ a_l,

with colours exchanged from layer to layer. It starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vardistill.diffusion.schedules import expand
from vardistill.errors import UsageError
from vardistill.networks import mlp
from vardistill.posteriors.few import Conditional, Posterior, standard_normal, triangular, triangular_size

LARGEST_FULL = 64
"""Dimension of the largest latent with a full covariance."""

POOLED = 4
"""Side of the grid that features are pooled to for a flat latent."""

LARGEST_LOG_SCALE = 2.0
"""Bound of |a_l|: far from its data a coupling must not overflow."""

START_OF_FACTOR = 0.3
"""Of V's entries times √n, roughly: at V = 0 its gradient would be 0."""


@dataclass(frozen=True)
class LowRank:
    """N(loc, S (I + VᵀV)⁻² S) with S = diag(scale): loc and scale (B, n), V = factor (B, k, n)."""

    loc: Tensor
    scale: Tensor
    factor: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """−½‖η‖² − ln det S + ln det M − (n/2) ln 2π with η from `whiten`."""
        return standard_normal(self.whiten(z)) - self.log_det()

    def transport(self, eta: Tensor) -> Tensor:
        """z = loc + S (η − Vᵀ M⁻¹ V η)."""
        solved = torch.linalg.solve(self._inner(), self._along(eta)[..., None]).squeeze(-1)
        return self.loc + self.scale * (eta - self._back(solved))

    def whiten(self, z: Tensor) -> Tensor:
        """η = (I + VᵀV) S⁻¹ (z − loc), (..., B, n)."""
        u = (z - self.loc) / self.scale
        return u + self._back(self._along(u))

    def log_det(self) -> Tensor:
        """ln det S − ln det M, (B,): of η → z."""
        return self.scale.log().sum(-1) - torch.logdet(self._inner())

    def _inner(self) -> Tensor:
        """M = I + VVᵀ, (B, k, k)."""
        identity = torch.eye(self.factor.shape[1], dtype=self.factor.dtype, device=self.factor.device)
        return identity + self.factor @ self.factor.mT

    def _along(self, u: Tensor) -> Tensor:
        """V u, (..., B, k)."""
        w: Tensor = torch.einsum("bkn,...bn->...bk", self.factor, u)
        return w

    def _back(self, w: Tensor) -> Tensor:
        """Vᵀ w, (..., B, n)."""
        u: Tensor = torch.einsum("bkn,...bk->...bn", self.factor, w)
        return u


@dataclass(frozen=True)
class Coupled:
    """The density of z = base.transport(u) with u from a coupling flow that sees features (B, width, h, w) of x_t."""

    base: LowRank
    couplings: nn.ModuleList
    features: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(η; 0, I) − ln det ∂u/∂η − ln det ∂z/∂u."""
        u, log_det = self.base.whiten(z), self.base.log_det()
        for coupling in reversed(self.couplings):
            log_scale, shift = coupling(u, self.features)
            u = (u - shift) * (-log_scale).exp()
            log_det = log_det + log_scale.sum(-1)
        return standard_normal(u) - log_det

    def transport(self, eta: Tensor) -> Tensor:
        """z = base.transport(f_L ∘ … ∘ f_1(η))."""
        for coupling in self.couplings:
            log_scale, shift = coupling(eta, self.features)
            eta = log_scale.exp() * eta + shift
        return self.base.transport(eta)


class Block(nn.Module):
    """h + conv(SiLU((1 + a) norm(conv(SiLU(norm h))) + b)); level and label give a and b (FiLM, arXiv 1709.07871).

    Args:
        width: channels.
        embedding: size of the level's and label's embedding.
        dilation: of the first convolution.
    """

    def __init__(self, width: int, embedding: int, dilation: int) -> None:
        super().__init__()
        groups = math.gcd(8, width)
        self.first_norm, self.second_norm = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        """(B, width, h, w) for embedded levels (B, embedding)."""
        gain, offset = self.modulation(F.silu(embedded))[:, :, None, None].chunk(2, dim=1)
        inside = self.second_norm(self.first(F.silu(self.first_norm(h))))
        out: Tensor = h + self.second(F.silu((1 + gain) * inside + offset))
        return out


class Features(nn.Module):
    """What a posterior sees of an image: a residual stack with dilations 1, 2, 4, 1, and so on.

    The result is not normalised, so that maps linear in x are in reach of the layer that reads it.

    Args:
        channels: of x.
        fold: pixels along a side that become channels.
        width: channels of the result.
        depth: blocks.
        classes: labels; one more stands for none.
    """

    def __init__(self, channels: int, fold: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        embedding = 2 * width
        self.fold = fold
        self.stem = nn.Conv2d(channels * fold**2, width, 3, padding=1)
        self.level = mlp(1, embedding, 1, embedding)
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.blocks = nn.ModuleList(Block(width, embedding, 2 ** (i % 3)) for i in range(depth))

    def forward(self, x: Tensor, c: Tensor, labels: Tensor | None) -> Tensor:
        """(B, width, H/fold, W/fold) for x (B, C, H, W), levels c (B,) and labels (B,)."""
        embedded = self.level(c[:, None])
        if self.label is not None:
            embedded = embedded + self.label(labels)
        h: Tensor = self.stem(F.pixel_unshuffle(x, self.fold))
        for block in self.blocks:
            h = block(h, embedded)
        return h


class Maps(nn.Module):
    """`count` maps of an image-shaped latent from features: (B, count, n), zero at first.

    Args:
        width: channels of the features.
        channels: of the latent.
        fold: channels that become pixels along a side.
        count: number of maps.
    """

    def __init__(self, width: int, channels: int, fold: int, count: int) -> None:
        super().__init__()
        self.fold, self.count = fold, count
        self.layer = nn.Conv2d(width, count * channels * fold**2, 3, padding=1)
        zero(self.layer)

    def forward(self, features: Tensor) -> Tensor:
        """(B, count, n)."""
        maps: Tensor = F.pixel_shuffle(self.layer(features), self.fold).unflatten(1, (self.count, -1))
        return maps.flatten(2)


class Vectors(nn.Module):
    """`count` vectors of a flat latent from pooled features: (B, count, n), zero at first.

    Args:
        width: channels of the features.
        latent: n.
        count: number of vectors.
    """

    def __init__(self, width: int, latent: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.layer = nn.Linear(width * POOLED**2, count * latent)
        zero(self.layer)

    def forward(self, features: Tensor) -> Tensor:
        """(B, count, n)."""
        pooled = F.adaptive_avg_pool2d(features, POOLED).flatten(1)
        return torch.unflatten(self.layer(pooled), 1, (self.count, -1))


def zero(layer: nn.Module) -> None:
    """Set all parameters of the layer to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ConvGaussian(Posterior):
    """A Gaussian with convolutional mean and scale: diagonal, of `rank` k (`LowRank`), or full for a small flat latent.

    At first it is N(0, s(r)² I), but for a small V.

    Args:
        shape: (C, H, W) of x.
        latent_shape: of z: (C', H, W), or (n,).
        sigma_data: σ_d, standard deviation of the data; > 0.
        width: channels of the network.
        depth: its residual blocks.
        classes: labels 0..classes − 1 that come as the condition `labels` (B,), int64, where `classes` stands for no
            class; 0 for none.
        rank: k, directions in which the precision is more than diagonal.
        full: whether the covariance is full, L Lᵀ; for a flat latent of at most 64 dimensions.
        spread: j; default σ_d.

    Raises:
        UsageError: for sizes or shapes that do not fit; when called, for missing or foreign conditions.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_shape: tuple[int, ...],
        sigma_data: float,
        width: int = 32,
        depth: int = 4,
        classes: int = 0,
        rank: int = 0,
        full: bool = False,
        spread: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(sigma_data, width=(width, 1), depth=(depth, 1), classes=(classes, 0), rank=(rank, 0))
        check_shapes(shape, latent_shape)
        flat = len(latent_shape) == 1
        if full and (rank or not flat or latent_shape[0] > LARGEST_FULL):
            raise UsageError(
                f"full covariance needs a flat latent of at most {LARGEST_FULL} dimensions and rank 0, but latents are "
                f"{tuple(latent_shape)} and rank={rank}"
            )
        self.latent, self.sigma_data, self.classes, self.full = math.prod(latent_shape), sigma_data, classes, full
        self.spread = sigma_data if spread is None else spread
        self.fold = fold = 1 if shape[1] % 2 or shape[2] % 2 else 2
        self.features = Features(shape[0], fold, width, depth, classes)
        count = 2 + rank
        self.head: Maps | Vectors
        if full:
            self.head = Vectors(width, triangular_size(self.latent), 1)
        else:
            self.head = Vectors(width, self.latent, count) if flat else Maps(width, latent_shape[0], fold, count)
            self._part_factors(rank / count)

    def _part_factors(self, share: float) -> None:
        """Make the last `share` of the head's outputs, V, small but not zero."""
        weight = self.head.layer.weight.data
        factors = weight[len(weight) - round(share * len(weight)) :]
        nn.init.normal_(factors, std=START_OF_FACTOR * weight[0].numel() ** -0.5)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Conditional:
        """The Gaussian at x_t (B, C, H, W), over flat latents (..., B, n)."""
        features, natural = self._see(x_t, alpha, sigma, condition)
        if self.full:
            return triangular(self.head(features).squeeze(1), natural, torch.zeros_like(natural), self.latent)
        return self._low_rank(features, natural)

    def _see(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features of x_t and its level, and the natural scale (B, 1)."""
        if set(condition) != ({"labels"} if self.classes else set()):
            wanted = "the condition 'labels'" if self.classes else "no conditions"
            raise UsageError(
                f"{type(self).__name__} with classes={self.classes} takes {wanted}, but got "
                f"{', '.join(condition) or 'none'}"
            )
        ratio = sigma / alpha
        total = (ratio**2 + self.sigma_data**2).sqrt()
        x = x_t / expand(alpha * total, x_t)
        features = self.features(x, (ratio / self.sigma_data).log(), condition.get("labels"))
        return features, (ratio / (ratio**2 + self.spread**2).sqrt())[:, None]

    def _low_rank(self, features: Tensor, natural: Tensor) -> LowRank:
        out: Tensor = self.head(features)
        loc, log_scale, factor = out[:, 0], out[:, 1], out[:, 2:] * self.latent**-0.5
        return LowRank(loc, natural * log_scale.exp(), factor)


class Coupling(nn.Module):
    """One layer of a coupling flow: log-scale and shift of the pixels of one colour, given the others and x_t.

    Args:
        shape: (C', H, W) of the latent.
        fold: pixels along a side that become channels.
        width: channels of the features and of the hidden layers.
        parity: of the colour that is kept, 0 or 1.
    """

    kept: Tensor

    def __init__(self, shape: tuple[int, ...], fold: int, width: int, parity: int) -> None:
        super().__init__()
        self.shape, self.fold = tuple(shape), fold
        colour = sum(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), torch.tensor(parity)) % 2
        self.register_buffer("kept", (colour == 0).to(torch.get_default_dtype()).flatten(), persistent=False)
        self.own = nn.Conv2d(shape[0] * fold**2, width, 3, padding=1)
        self.context = nn.Conv2d(width, width, 1)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.out = Maps(width, shape[0], fold, 2)

    def forward(self, u: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """a ∘ (1 − m) and b ∘ (1 − m), both (..., B, n), for u (..., B, n) and features (B, width, h, w)."""
        maps = F.pixel_unshuffle((self.kept * u).view(-1, *self.shape), self.fold)
        h = self.own(maps).unflatten(0, (-1, len(features))) + self.context(features)
        out = self.out(F.silu(self.hidden(F.silu(h.flatten(0, 1))))) * (1 - self.kept)
        log_scale, shift = out.unflatten(0, u.shape[:-1]).unbind(-2)
        return LARGEST_LOG_SCALE * (log_scale / LARGEST_LOG_SCALE).tanh(), shift


class CouplingFlow(ConvGaussian):
    """z = μ + S (I + VᵀV)⁻¹ u with u from a conditional coupling flow over an image-shaped latent.

    At first it is its `ConvGaussian`.

    Args:
        couplings: L, layers of the flow; at least 2 for every pixel to be moved.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent_shape: tuple[int, ...],
        sigma_data: float,
        width: int = 32,
        depth: int = 4,
        classes: int = 0,
        rank: int = 0,
        couplings: int = 4,
        spread: float | None = None,
    ) -> None:
        super().__init__(shape, latent_shape, sigma_data, width, depth, classes, rank, spread=spread)
        if couplings < 2 or len(latent_shape) == 1:
            raise UsageError(
                f"a coupling flow needs at least 2 couplings and a latent (C, H, W), but has {couplings} and "
                f"{tuple(latent_shape)}"
            )
        self.couplings = nn.ModuleList(Coupling(latent_shape, self.fold, width, i % 2) for i in range(couplings))

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Coupled:
        """The flow at x_t (B, C, H, W), over flat latents (..., B, n)."""
        features, natural = self._see(x_t, alpha, sigma, condition)
        return Coupled(self._low_rank(features, natural), self.couplings, features)


def check_sizes(sigma_data: float, **sizes: tuple[int, int]) -> None:
    """Raise UsageError unless σ_d is positive and every size at least its second number."""
    if not sigma_data > 0:
        raise UsageError(f"sigma_data must be positive, but is {sigma_data:g}")
    for name, (size, least) in sizes.items():
        if size < least:
            raise UsageError(f"{name} must be at least {least}, but is {size}")


def check_shapes(shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> None:
    """Raise UsageError unless x is an image, and z one of its size or flat."""
    if len(shape) != 3:
        raise UsageError(f"a convolutional posterior needs data (C, H, W), but they are {tuple(shape)}")
    if len(latent_shape) != 1 and (len(latent_shape) != 3 or tuple(latent_shape[1:]) != tuple(shape[1:])):
        size = "×".join(map(str, shape[1:]))
        raise UsageError(f"latents must be (n,) or (C, {size}) as the data, but are {tuple(latent_shape)}")
