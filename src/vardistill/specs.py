"""Configurations in a line: NAME(key=value, ...) or FILE.py:CLASS(...), and weighted sums of such.

Importing this module imports no torch.

critic(lr=1e-4, beta1=0)
mine.py:MineConfig(critic_steps=2)
diff-instruct(critic_steps=2) + 6..1*varflow(beta=0.5, shared=2)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from vardistill.errors import UsageError

_TERM = re.compile(
    r"\s*(?:(?P<weight>[^*(),=\s]+?)(?:\.\.(?P<end>[^*(),=\s]+))?\s*\*\s*)?"
    r"(?P<name>(?:[^()*+=,]*:)?[A-Za-z_][\w.-]*|[^()*+=,]*\.py)\s*"
    r"(?:\((?P<options>[^()]*)\))?\s*"
)

_COMMA = re.compile(r",(?![^\[\]]*\])")
"""Between options: not in a list."""


@dataclass(frozen=True)
class Spec:
    """A name with options and, in a sum, a weight.

    Attributes:
        name: as written; that of a class in a file has a colon.
        options: values by key, read as YAML reads them.
        weight: at the start.
        weight_end: at the end; None where the weight stays.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    weight_end: float | None = None


def parse_sum(text: str) -> list[Spec]:
    """The terms of a sum; raises UsageError for what is none."""
    terms, at = [], 0
    while True:
        match = _TERM.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            example = "diff-instruct + 6..1*varflow(beta=0.5)"
            raise UsageError(f"cannot read {text!r} as a sum of names with weights and options, like {example!r}")
        terms.append(_spec(match, text))
        if match.end() == len(text):
            return terms
        at = match.end() + 1


def parse_spec(text: str) -> Spec:
    """A single name with options; raises UsageError for what is none."""
    first, *others = parse_sum(text)
    if others or "*" in text:
        raise UsageError(f"cannot read {text!r} as a name with options, like 'critic(lr=1e-4)'")
    return first


def _spec(match: re.Match[str], text: str) -> Spec:
    options: dict[str, Any] = {}
    for option in filter(str.strip, _COMMA.split(match["options"] or "")):
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"options are key=value, parted by commas, but {text!r} has {option.strip()!r}")
        options[key.strip().replace("-", "_")] = _value(value, text)
    weight = 1.0 if match["weight"] is None else _number(match["weight"], text)
    end = None if match["end"] is None else _number(match["end"], text)
    return Spec(match["name"], options, weight, end)


def _value(text: str, whole: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read {text.strip()!r} in {whole!r}") from error


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"a weight must be a number, but is {text!r} in {whole!r}") from error
