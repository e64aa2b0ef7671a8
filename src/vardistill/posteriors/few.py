r"""Variational posteriors q_φ(z | x_t, t).

Networks see x_t scaled to unit variance and ln r/σ_d, r = σ_t/α_t. Scales are predicted relative to

    s(r) = r/√(r² + σ_d²),

the posterior's standard deviation when z → x is linear: it goes from 0 at small noise to the prior's 1 at large.
Where the student starts as a linear map along principal axes (`principal_axes`), the network sees x_t along these axes
and what lies off them, scales are relative to the axes' own, and with the network's output at its initial zero q is
that map's exact posterior. Every posterior is a normalised density in z and differentiable in x_t, almost everywhere
where the network's activation is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vardistill.errors import UsageError, first_line
from vardistill.networks import LevelMLP
from vardistill.students.axes import PrincipalAxes

if TYPE_CHECKING:
    from vardistill.students.student import Student


def standard_normal(eta: Tensor) -> Tensor:
    """log N(η; 0, I) over the last axis."""
    return -0.5 * (eta**2).sum(-1) - 0.5 * eta.shape[-1] * math.log(2 * math.pi)


class Conditional(Protocol):
    """q(z | x_t, t) for a batch of x_t."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x_t, t) in nats, (..., B), for z (..., B, latent)."""
        ...


class Reparameterised(Conditional, Protocol):
    """A conditional with reparameterised draws."""

    def transport(self, eta: Tensor) -> Tensor:
        """z ~ q(z | x_t, t) as a differentiable function of η ~ N(0, I), both (..., B, latent)."""
        ...


class Posterior(nn.Module):
    """q_φ(z | x_t, t, c), as a module from (x_t, α, σ) and conditions c by name to a `Conditional`.

    Attributes:
        reparameterised: whether its conditionals have `transport`.
    """

    reparameterised = True

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Conditional:
        """q(· | x_t, t, c) for x_t (B, *data), the scales (B,) and conditions of B rows, labels for example."""
        raise NotImplementedError


def check_posterior(posterior: Posterior, student: Student, condition: Mapping[str, Tensor]) -> None:
    """Ask twice for the density of two latents of the generator, under conditions of two rows.

    Raises:
        UsageError: unless it has one for each, the same both times.
    """
    like, latent = next(student.parameters()), math.prod(student.latent_shape)
    own = getattr(posterior, "latent", None)
    if isinstance(own, int) and own != latent:
        raise UsageError(f"posterior and generator differ: the posterior has {own} latents, the generator {latent}")
    x_t, z = like.new_zeros(2, *student.data_shape), like.new_zeros(2, latent)
    try:
        with torch.no_grad():
            log_q, again = (posterior(x_t, *like.new_ones(2, 2), **condition).log_prob(z) for _ in range(2))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = first_line(error)
        raise UsageError(
            f"the posterior does not take the generator's samples, {tuple(x_t.shape)} of {x_t.dtype}: {reason}"
        ) from error
    if log_q.shape != (2,):
        raise UsageError(f"a posterior has one log-density per row, (2,), but this one has {tuple(log_q.shape)}")
    if not torch.equal(log_q, again):
        raise UsageError(
            "the posterior is random beside its input (dropout that ignores evaluation mode?): neither a seed nor a "
            "checkpoint would hold its numbers"
        )


@dataclass(frozen=True)
class Triangular:
    """N(loc, L Lᵀ) with lower triangular L, (B, d, d): full covariance, diagonal as a special case."""

    loc: Tensor
    scale_tril: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """−½‖η‖² − Σ ln L_ii − (d/2) ln 2π with η = L⁻¹(z − loc)."""
        eta = self.whiten(z)
        return standard_normal(eta) - self.log_det()

    def transport(self, eta: Tensor) -> Tensor:
        """z = loc + L η."""
        return self.loc + (self.scale_tril @ eta[..., None]).squeeze(-1)

    def whiten(self, z: Tensor) -> Tensor:
        """η = L⁻¹(z − loc), (..., B, d)."""
        residual = (z - self.loc)[..., None]
        eta: Tensor = torch.linalg.solve_triangular(self.scale_tril, residual, upper=False)
        return eta.squeeze(-1)

    def log_det(self) -> Tensor:
        """ln det L, (B,)."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def triangular_size(d: int) -> int:
    """Number of parameters of a `triangular` Gaussian in d dimensions."""
    return d + d * (d + 1) // 2


def triangular(parameters: Tensor, scale: Tensor, location: Tensor, d: int) -> Triangular:
    """The Gaussian with unconstrained `parameters` (B, triangular_size(d)), relative to a scale and a location.

    L's rows are multiplied by `scale`, (B, 1) or (B, d), and `location`, of either shape, is added to the mean.
    """
    loc, log_diagonal, below = parameters.split([d, d, d * (d - 1) // 2], dim=1)
    rows, columns = torch.tril_indices(d, d, offset=-1, device=parameters.device)
    batch = torch.arange(len(parameters), device=parameters.device)[:, None]
    tril = torch.diag_embed(log_diagonal.exp()).index_put((batch, rows, columns), below)
    return Triangular(location + loc, scale[..., None] * tril)


@dataclass(frozen=True)
class Diagonal:
    """N(loc, diag(scale²)), both (B, d)."""

    loc: Tensor
    scale: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """Σ_i ln N(z_i; loc_i, scale_i²)."""
        eta = (z - self.loc) / self.scale
        return standard_normal(eta) - self.scale.log().sum(-1)

    def transport(self, eta: Tensor) -> Tensor:
        """z = loc + scale η."""
        return self.loc + self.scale * eta


class Prior(Posterior):
    """q(z | x_t) = N(0, I), without parameters: for bounds with candidates from the prior."""

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Diagonal:
        """N(0, I), the prior under every condition; the latent's dimension comes from z."""
        return Diagonal(torch.zeros_like(alpha)[:, None], torch.ones_like(alpha)[:, None])


class _Amortised(Posterior):
    """A posterior whose parameters a network computes from x_t and the level.

    Args:
        data: dimension of x.
        latent: dimension of z.
        sigma_data: σ_d, standard deviation of the data; > 0.
        depth: hidden layers.
        width: units of a hidden layer.
        network: (inputs, outputs) → the network F(x, c); default a perceptron.
        axes: of the map that the student starts from, as many as latents; default none.
        activation: of the perceptron, a name in `vardistill.networks.ACTIVATIONS`.
        mixed: whether the perceptron's hidden layers run in bfloat16.

    Raises:
        UsageError: unless sigma_data > 0 and there is an axis for every latent.
    """

    mean: Tensor
    directions: Tensor
    scales: Tensor

    def __init__(
        self,
        data: int,
        latent: int,
        sigma_data: float,
        depth: int = 4,
        width: int = 256,
        network: Callable[[int, int], nn.Module] | None = None,
        axes: PrincipalAxes | None = None,
        activation: str = "silu",
        mixed: bool = False,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise UsageError(f"sigma_data must be positive, but is {sigma_data:g}")
        self.latent, self.sigma_data = latent, sigma_data
        self.has_axes = axes is not None
        if axes is not None:
            if len(axes.scales) != latent:
                raise UsageError(f"a posterior of {latent} latents needs as many axes, but has {len(axes.scales)}")
            for name in ("mean", "directions", "scales"):
                self.register_buffer(name, getattr(axes, name))
        self.sees_rest = self.has_axes and latent < data
        inputs, outputs = latent + data if self.sees_rest else data, self._outputs(latent)
        if network is None:
            self.network: nn.Module = LevelMLP(inputs, outputs, depth, width, activation, mixed)
        else:
            self.network = network(inputs, outputs)
        if self.has_axes and network is None:
            for p in list(self.network.parameters())[-2:]:
                nn.init.zeros_(p)

    def _outputs(self, latent: int) -> int:
        raise NotImplementedError

    def _head(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, condition: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The network's output (B, outputs), the natural scale, (B, 1) or (B, latent), and the natural location."""
        if condition:
            raise UsageError(f"{type(self).__name__} takes no conditions, but got {', '.join(condition)}")
        ratio = (sigma / alpha)[:, None]
        x = x_t / alpha[:, None]
        total = isotropic = (ratio**2 + self.sigma_data**2).sqrt()
        seen, location = x / isotropic, torch.zeros_like(ratio)
        if self.has_axes:
            along = (x - self.mean) @ self.directions
            total = (ratio**2 + self.scales**2).sqrt()
            seen, location = along / total, self.scales * along / total**2
            if self.sees_rest:
                rest = x - self.mean - along @ self.directions.T
                seen = torch.cat([seen, rest / isotropic], dim=1)
        out: Tensor = self.network(seen, (ratio.squeeze(1) / self.sigma_data).log())
        return out, ratio / total, location


class DiagonalGaussian(_Amortised):
    """q = N(μ_φ, diag(s(r)² e^{2 ω_φ})): the paper's posterior."""

    def _outputs(self, latent: int) -> int:
        return 2 * latent

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Diagonal:
        """The Gaussian at x_t."""
        out, scale, location = self._head(x_t, alpha, sigma, condition)
        loc, log_scale = out.chunk(2, dim=1)
        return Diagonal(location + loc, scale * log_scale.exp())


class FullGaussian(_Amortised):
    """q = N(μ_φ, s(r)² L_φ L_φᵀ), L_φ lower triangular with positive diagonal."""

    def _outputs(self, latent: int) -> int:
        return triangular_size(latent)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Triangular:
        """The Gaussian at x_t."""
        return triangular(*self._head(x_t, alpha, sigma, condition), self.latent)


class MixtureOfGaussians(_Amortised):
    """q = Σ_m ω_m N(μ_m, diag(s(r)² e^{2ω_m})), weights and components from the network.

    Its draws are not reparameterised, so it serves the single-sample bound only.

    Args:
        components: M, at least 1.
    """

    reparameterised = False

    def __init__(
        self,
        data: int,
        latent: int,
        sigma_data: float,
        depth: int = 4,
        width: int = 256,
        components: int = 8,
        axes: PrincipalAxes | None = None,
        activation: str = "silu",
        mixed: bool = False,
    ) -> None:
        if components < 1:
            raise UsageError(f"components must be at least 1, but is {components}")
        self.components = components
        super().__init__(data, latent, sigma_data, depth, width, axes=axes, activation=activation, mixed=mixed)
        if self.has_axes:
            self._part_components()

    def _outputs(self, latent: int) -> int:
        return self.components * (1 + 2 * latent)

    def _part_components(self) -> None:
        """Give equal components unequal weights: the density is the same, and their gradients no longer are."""
        weight = list(self.network.parameters())[-2]
        of_logits = weight.data.view(self.components, -1, weight.shape[1])[:, 0]
        nn.init.normal_(of_logits, std=weight.shape[1] ** -0.5)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> MixtureSameFamily:
        """The mixture at x_t."""
        out, scale, location = self._head(x_t, alpha, sigma, condition)
        logits, loc, log_scale = out.unflatten(1, (self.components, -1)).split([1, self.latent, self.latent], -1)
        gaussians = Normal(location[:, None] + loc, scale[:, None] * log_scale.exp(), validate_args=False)
        weights = Categorical(logits=logits.squeeze(-1), validate_args=False)
        return MixtureSameFamily(weights, Independent(gaussians, 1, validate_args=False), validate_args=False)


class NeuralSplineFlow(_Amortised):
    """VarDiU-NSF: a conditional neural spline flow on the whitened residual of a full Gaussian.

    z = μ_φ + s(r) L_φ u, u ~ NSF(· | x_t, r) (Durkan et al. 2019, arXiv 1906.04032): the Gaussian carries the
    place and the scale, which shrinks with the noise, and the splines, the identity outside [−5, 5], the shape. With
    `axes` the splines start as the identity inside, too: bins of one size and derivatives of 1, from parameters of 0.

    Args:
        transforms: autoregressive spline transforms.
        bins: bins of a spline.
        hidden: units of the flow's hidden layers.
    """

    def __init__(
        self,
        data: int,
        latent: int,
        sigma_data: float,
        depth: int = 4,
        width: int = 256,
        transforms: int = 2,
        bins: int = 8,
        hidden: tuple[int, ...] = (64, 64),
        context: int = 32,
        axes: PrincipalAxes | None = None,
        activation: str = "silu",
        mixed: bool = False,
    ) -> None:
        self.context = context
        super().__init__(data, latent, sigma_data, depth, width, axes=axes, activation=activation, mixed=mixed)
        self.flow = zuko.flows.NSF(
            features=latent, context=context, bins=bins, transforms=transforms, hidden_features=hidden
        )
        if self.has_axes:
            self._straighten_splines()

    def _outputs(self, latent: int) -> int:
        return triangular_size(latent) + self.context

    def _straighten_splines(self) -> None:
        """Set all parameters of the splines to 0, under a context that is not: else its first gradient would be 0."""
        for transform in self.flow.transform.transforms:
            for p in list(transform.hyper.parameters())[-2:]:
                nn.init.zeros_(p)
        weight = list(self.network.parameters())[-2]
        nn.init.normal_(weight.data[-self.context :], std=weight.shape[1] ** -0.5)

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> WhitenedFlow:
        """The flow at x_t."""
        out, scale, location = self._head(x_t, alpha, sigma, condition)
        parameters, context = out[:, : -self.context], out[:, -self.context :]
        return WhitenedFlow(triangular(parameters, scale, location, self.latent), self.flow(context))


@dataclass(frozen=True)
class WhitenedFlow:
    """The density of z = loc + L u with u from a flow."""

    gaussian: Triangular
    flow: zuko.distributions.NormalizingFlow

    def log_prob(self, z: Tensor) -> Tensor:
        """log p_flow(u) − ln det L with u = L⁻¹(z − loc)."""
        log_density: Tensor = self.flow.log_prob(self.gaussian.whiten(z))
        return log_density - self.gaussian.log_det()

    def transport(self, eta: Tensor) -> Tensor:
        """z = loc + L f⁻¹(η), f the flow's map to its normal base."""
        return self.gaussian.transport(self.flow.transform.inv(eta))
