"""What configurations are checked with: fields that hold one of few choices. Importing this module imports no torch."""

from __future__ import annotations

import types
import typing
from numbers import Integral, Real
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


_CHOICES: dict[type, dict[str, tuple[tuple[Any, ...], list[Any]]]] = {}
"""Of every class: a program's presets ask for few classes, each many times."""


def _choices_of(cls: type) -> dict[str, tuple[tuple[Any, ...], list[Any]]]:
    """The types and the named choices of every field."""
    if cls not in _CHOICES:
        kinds = {name: options_of(hint) for name, hint in typing.get_type_hints(cls).items()}
        _CHOICES[cls] = {
            name: (options, [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)])
            for name, options in kinds.items()
        }
    return _CHOICES[cls]


def check_choices(config: object) -> None:
    """Raise a UsageError for a field that holds none of its choices, no number, or no whole one that torch takes."""
    for name, (kinds, choices) in _choices_of(type(config)).items():
        value = getattr(config, name)
        if value in choices or (value is None and types.NoneType in kinds):
            continue
        if int in kinds:
            require(name, value, _is_whole(value), " or ".join([*map(repr, choices), "a whole number of 64 bits"]))
        elif float in kinds:
            known = isinstance(value, Real) and not isinstance(value, bool)
            require(name, value, known, " or ".join([*map(repr, choices), "a number"]))
        elif choices:
            raise unknown(name, str(value), choices)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
