"""What configurations are checked with: fields that hold one of few choices. Importing this module imports no torch."""

from __future__ import annotations

import types
import typing
from numbers import Integral
from typing import Any, Literal, Union

from vardistill.errors import require, unknown

ScheduleName = Literal["ve", "vp", "cosine", "rectified"]
"""Forward processes."""

WeightName = Literal["one", "sigma2", "sigma2_max", "inverse_sigma", "snr", "edm", "sigma2_linear"]
"""Weights w(t) of noise levels; see `diffusion.weights`."""

ActivationName = Literal["silu", "gelu", "relu", "leaky_relu", "tanh"]
"""Activation functions of perceptrons."""


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def check_choices(config: object) -> None:
    """Raise a UsageError for a field that holds none of its choices, or no whole number that torch takes for an int."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), options_of(hint)
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        if value in choices or (value is None and types.NoneType in kinds):
            continue
        if int in kinds:
            require(name, value, _is_whole(value), " or ".join([*map(repr, choices), "a whole number of 64 bits"]))
        elif choices:
            raise unknown(name, str(value), choices)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
