r"""A student without times: x = g(z), z ~ N(0, I) of few or many dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vardistill.errors import UsageError, require_positive, require_type, require_whole
from vardistill.networks import full_precision, mlp
from vardistill.students.axes import PrincipalAxes, principal_axes
from vardistill.students.hub import SafeHubMixin
from vardistill.students.student import Student


class MLP(
    Student,
    SafeHubMixin,
    library_name="vardistill",
    tags=["one-step-generation", "diffusion-distillation"],
):
    """x = mean + std · f(z), with f a perceptron of z and, for sharper maps, of its random Fourier features.

    The features are sin(zF) and cos(zF) with a fixed F ~ N(0, 1) (Tancik et al. 2020, arXiv 2006.10739).
    With `linear` it is x = μ + U diag(s) z + std · f(z), and f starts at zero: see `from_data`, the best start where
    there are data or a teacher's own samples.

    Args:
        latent: dimension of z.
        data: dimension of x.
        depth: hidden layers.
        width: units of a hidden layer.
        activation: name in `vardistill.networks.ACTIVATIONS`.
        data_std: scale of the data.
        data_mean: offset of the data.
        fourier: columns of F; 0 for none.
        linear: whether f is added to a fixed linear map.

    Raises:
        UsageError: for an unknown activation or a scale that is not positive.
    """

    frequencies: Tensor
    offset: Tensor
    slope: Tensor

    def __init__(
        self,
        latent: int = 2,
        data: int = 2,
        depth: int = 4,
        width: int = 256,
        activation: str = "silu",
        data_std: float = 1.0,
        data_mean: float = 0.0,
        fourier: int = 0,
        linear: bool = False,
    ) -> None:
        super().__init__()
        for name, size in {"latent": latent, "data": data, "depth": depth, "width": width}.items():
            require_whole(name, size)
        require_whole("fourier", fourier, least=0)
        require_positive("data_std", data_std)
        self.latent_shape, self.data_shape = (latent,), (data,)
        self.data_std, self.data_mean = data_std, data_mean
        self.register_buffer("frequencies", torch.randn(latent, fourier))
        self.linear = linear
        if linear:
            self.register_buffer("offset", torch.full((data,), float(data_mean)))
            self.register_buffer("slope", torch.zeros(latent, data))
        self.layers = mlp(latent + 2 * fourier, data, depth, width, activation)
        self._initialise()

    def _initialise(self) -> None:
        """He's initialisation (arXiv 1502.01852), the first layer's units spread over the prior's mass, |z| ≤ 2."""
        first, *hidden, last = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        nn.init.uniform_(first.bias, -2, 2)
        nn.init.normal_(last.weight, std=0.0 if self.linear else last.in_features**-0.5)
        nn.init.zeros_(last.bias)

    @classmethod
    def from_data(
        cls,
        points: Tensor,
        latent: int | None = None,
        depth: int = 4,
        width: int = 256,
        activation: str = "silu",
        fourier: int = 0,
    ) -> MLP:
        """A generator that starts as a linear map, with the mean and along the principal axes of the points.

        Args:
            points: (n, d), samples of the data or of a teacher; a thousand or more for few dimensions.
            latent: dimension of z, at most d; default d.
            depth: hidden layers.
            width: units of a hidden layer.
            activation: name in `vardistill.networks.ACTIVATIONS`.
            fourier: random Fourier features; 0 for none.

        Raises:
            UsageError: as `principal_axes` does.
        """
        require_type("points", points, Tensor, "a tensor (n, d) of floats")
        axes = principal_axes(points, points.shape[-1] if latent is None else latent)
        std = float(points.var(0).mean().sqrt())
        generator = cls(axes.directions.shape[1], len(axes.mean), depth, width, activation, std, 0.0, fourier, True)
        return generator.to(points).start_from(axes)

    @property
    def axes(self) -> PrincipalAxes:
        """The linear map's μ, U and s, for a posterior that starts as the exact one of this start.

        Raises:
            UsageError: for a generator without a linear map.
        """
        if not self.linear:
            raise UsageError("a generator that starts from random weights has no principal axes: see MLP.from_data")
        scales = self.slope.norm(dim=1)
        if not (scales > 0).all():
            raise UsageError("the generator's linear map is not set: see MLP.from_data, or start_from")
        return PrincipalAxes(self.offset.clone(), (self.slope / scales[:, None]).T, scales)

    def start_from(self, axes: PrincipalAxes) -> MLP:
        """Set the linear map z → μ + U diag(s) z, and return the generator.

        Raises:
            UsageError: for a generator without a linear map, or axes that do not fit its shapes.
        """
        shape = (*self.data_shape, *self.latent_shape)
        if not self.linear or axes.directions.shape != shape:
            raise UsageError(f"principal axes {tuple(axes.directions.shape)} need MLP(linear=True) of shape {shape}")
        self.offset.copy_(axes.mean)
        self.slope.copy_((axes.directions * axes.scales).T)
        return self

    def forward(self, z: Tensor, renoise: Tensor | None = None, step: int = 1, **condition: Tensor) -> Tensor:
        """Map z (B, latent) to x (B, data); the first and the last layer stay in full precision under autocast.

        Raises:
            UsageError: for further steps, or a condition.
        """
        self.require_steps(step, renoise)
        if condition:
            raise UsageError(f"a perceptron takes no {', '.join(condition)}")
        with torch.autocast(z.device.type, enabled=False):
            start = self.offset + z @ self.slope if self.linear else self.data_mean
            if self.frequencies.shape[1]:
                phase = z @ self.frequencies
                z = torch.cat([z, phase.sin(), phase.cos()], dim=1)
        first, *hidden, last = self.layers
        h = full_precision(first, z)
        for layer in hidden:
            h = layer(h)
        return start + self.data_std * full_precision(last, h)
