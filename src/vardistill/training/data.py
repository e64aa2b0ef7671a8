"""What a step is fed with: conditions, and real samples (a stored set's, or a teacher's own) under them.

A step draws conditions c ~ p(c) first, and from p(· | c) the student's samples and, where an objective compares with
them, the real ones.

A draw for a label y takes one of its n_y samples at random: with the indices sorted by label, those of y start at
o_y = Σ_{c<y} n_c, and the draw is number o_y + u, u uniform on {0, …, n_y − 1}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vardistill.diffusion.denoiser import Denoiser
from vardistill.diffusion.samplers import sample
from vardistill.errors import UsageError, first_line, require, require_type

Samples = Callable[..., Tensor]
"""n, a generator of random numbers and, by keyword, n conditions → (n, *data) samples, independent given these."""

Conditions = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""n and a generator of random numbers → n conditions by name, for example {"labels": (n,)}."""

AS_TENSOR = {
    "ndarray": "torch.from_numpy(data).float()",
    "list": "torch.tensor(data)",
    "DataLoader": "torch.cat([batch for batch in loader]), without labels",
    "str": "load it",
}
"""What makes a tensor of other kinds of data."""

BLOCK, VALUES = 8192, 2**19
"""Samples, and values of these, that a teacher draws at once, at most."""


class Labels:
    """Labels of the given frequencies, as the condition `labels`.

    Args:
        frequencies: (K,) not negative, of the labels 0..K−1; they need not sum to 1.

    Raises:
        UsageError: for frequencies that are none.
    """

    def __init__(self, frequencies: Tensor) -> None:
        require_type("frequencies", frequencies, Tensor, "a tensor (K,), such as torch.ones(K)")
        if frequencies.ndim != 1 or not (frequencies >= 0).all() or not 0 < float(frequencies.sum()) < float("inf"):
            raise UsageError(
                f"frequencies must be (K,), finite, not negative and not all 0, but are {frequencies.tolist()}"
            )
        self.frequencies = frequencies.double()

    def __call__(self, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """{"labels": (n,)}."""
        weights = self.frequencies.to(rng.device)
        return {"labels": torch.multinomial(weights, n, replacement=True, generator=rng)}


class StoredSamples:
    """Draws with replacement from a stored set, under a condition from its samples of the same label.

    Args:
        data: (n, *data), finite.
        labels: (n,) integers from 0, for draws under the condition `labels`; default none.

    Raises:
        UsageError: for an empty set, NaN or infinity in it, or labels that do not fit it.
    """

    def __init__(self, data: Tensor, labels: Tensor | None = None) -> None:
        if not isinstance(data, Tensor):
            raise UsageError(
                f"data must be a tensor (n, *data) of floats, or a function of (n, rng), but is {type(data).__name__}: "
                f"{AS_TENSOR.get(type(data).__name__, 'torch.stack its samples')}"
            )
        if not data.is_floating_point() or data.layout != torch.strided or data.is_meta:
            raise UsageError(
                f"data must be a dense tensor of floats in the units of generator and teacher, but is of {data.dtype}: "
                "pictures of 0 to 255 for example are data.float() / 127.5 - 1"
            )
        data = data.detach().clone() if data.is_inference() else data.detach()
        if data.ndim < 2 or data.numel() == 0:
            raise UsageError(f"data must be (n, *data) with n at least 1, but has shape {tuple(data.shape)}")
        if not data.isfinite().all():
            bad = int((~data.flatten(1).isfinite().all(1)).sum())
            raise UsageError(f"data must be finite, but {bad} of {len(data)} samples hold NaN or infinity")
        self.data, self.labels = data, labels
        self.by_label = None if labels is None else ByLabel(_checked(labels, len(data)))

    def to(self, like: Tensor) -> StoredSamples:
        """The same set in the dtype and on the device of `like`."""
        return StoredSamples(self.data.to(like), None if self.labels is None else self.labels.to(like.device))

    def __call__(self, n: int, rng: torch.Generator, labels: Tensor | None = None) -> Tensor:
        """(n, *data), the i-th of the i-th label where there are `labels` (n,)."""
        if labels is None:
            index = torch.randint(len(self.data), (n,), generator=rng, device=rng.device)
        elif self.by_label is None:
            raise UsageError("the data have no labels, but the generator is conditional: give StoredSamples labels")
        else:
            index = self.by_label.draw(n, rng, labels)
        return self.data[index.to(self.data.device)]


def _checked(labels: Tensor, n: int) -> Tensor:
    require_type("labels", labels, Tensor, f"a tensor of {n} integers from 0")
    if labels.shape != (n,) or labels.is_floating_point() or int(labels.min()) < 0:
        raise UsageError(f"labels must be {n} integers from 0, one a sample, but are {tuple(labels.shape)}")
    return labels


class ByLabel:
    """The places of a set's samples by their labels.

    Args:
        labels: (n,) integers in [0, K).
        names: of the K labels, for messages; default the numbers up to the largest.
    """

    def __init__(self, labels: Tensor, names: Sequence[str] | None = None) -> None:
        labels = labels.cpu()
        self.order = labels.argsort(stable=True)
        self.counts = labels.bincount(minlength=0 if names is None else len(names))
        self.names = tuple(map(str, range(len(self.counts)))) if names is None else tuple(names)
        self.tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def draw(self, n: int, rng: torch.Generator, labels: Tensor) -> Tensor:
        """The place of a random sample of each label (n,), on the device of `rng`; label K, past the last, is any.

        Raises:
            UsageError: for labels that are not (n,) integers in [0, K], or one without samples.
        """
        if labels.device.type == "cpu":  # on an accelerator a look at them would wait for it in every step
            self._check(labels, n)
        order, counts, offsets = self._on(rng.device)
        labels = labels.to(rng.device)
        # of 62 bits, so that the remainder is uniform but for n_y/2⁶²
        u = torch.randint(2**62, (n,), generator=rng, device=rng.device) % counts[labels]
        return order[offsets[labels] + u]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The places by label, the numbers of each label and where it starts; one past the last stands for all."""
        if device not in self.tables:
            counts = torch.cat([self.counts, self.counts.sum()[None]])
            offsets = torch.cat([self.counts.cumsum(0) - self.counts, torch.zeros(1, dtype=torch.int64)])
            self.tables[device] = self.order.to(device), counts.to(device), offsets.to(device)
        return self.tables[device]

    def _check(self, labels: Tensor, n: int) -> None:
        _, counts, _ = self._on(labels.device)
        if tuple(labels.shape) != (n,):
            raise UsageError(f"labels must be ({n},), but are {tuple(labels.shape)}")
        last = len(self.counts)
        outside = labels[(labels < 0) | (labels > last)]
        if len(outside):
            raise UsageError(f"labels must be 0 to {last}, but hold {int(outside[0])}")
        empty = labels[counts[labels] == 0]
        if len(empty):
            raise UsageError(f"label '{self.names[int(empty[0])]}' has no samples")


def teacher_samples(
    teacher: Denoiser,
    data_shape: tuple[int, ...],
    n: int,
    rng: torch.Generator,
    steps: int = 20,
    conditions: Conditions | None = None,
    dtype: torch.dtype = torch.float32,
) -> StoredSamples:
    """A stored set of the teacher's own samples: objectives that need data then need none but the teacher.

    Args:
        teacher: the denoiser.
        data_shape: of one sample.
        n: size of the set.
        rng: draws the starting noise, on the teacher's device.
        steps: of Heun's method on Karras' grid, two evaluations each but for the last.
        conditions: drawn for the teacher; its labels stay with the samples.
        dtype: of the noise that the sampler starts from.

    Raises:
        UsageError: where one of the `Labels` is not drawn once.
    """
    require("n", n, isinstance(n, int) and n >= 1, "a whole number, at least 1")
    require("data_shape", data_shape, isinstance(data_shape, tuple), "a tuple, such as (2,)")
    require_type("rng", rng, torch.Generator, "a torch.Generator, such as torch.Generator().manual_seed(0)")
    block = min(BLOCK, max(1, VALUES // math.prod(data_shape)))
    starts: list[tuple[Tensor, Mapping[str, Any]]] = []
    for start in range(0, n, block):
        size = min(block, n - start)
        condition = {} if conditions is None else conditions(size, rng)
        starts.append((torch.randn(size, *data_shape, generator=rng, device=rng.device, dtype=dtype), condition))
    labels = [condition["labels"] for _, condition in starts if "labels" in condition]
    if labels and isinstance(conditions, Labels):
        check_drawn(torch.cat(labels), conditions)
    samples = torch.cat([sample(teacher, noise, steps, **condition) for noise, condition in starts])
    return StoredSamples(samples, torch.cat(labels) if labels else None)


def check_drawn(labels: Tensor, wanted: Labels) -> None:
    """Raise UsageError unless every label of a positive frequency is among `labels` (n,)."""
    counts = labels.bincount(minlength=len(wanted.frequencies)).cpu()
    missing = ((wanted.frequencies.cpu() > 0) & (counts == 0)).nonzero().flatten().tolist()
    if missing:
        raise UsageError(
            f"none of the teacher's {len(labels)} samples has the label {missing[0]}: raise real_samples to "
            f"many times the number of labels, {len(counts)}"
        )


def check_samples(
    samples: Samples, data_shape: tuple[int, ...], device: torch.device, conditions: Conditions | None = None
) -> None:
    """Raise UsageError unless two samples come back in the generator's shape, finite, under conditions if any."""
    rng = torch.Generator(device).manual_seed(0)
    condition: Mapping[str, Tensor] = {} if conditions is None else conditions(2, rng)
    try:
        two = samples(2, rng, **condition)
    except UsageError:
        raise
    except Exception as error:  # a user's own may raise anything
        names = ", ".join(["n", "rng", *condition])
        raise UsageError(f"the data are no function of ({names}): {first_line(error)}") from error
    require_type("what data return", two, Tensor, "a tensor (n, *data)")
    require("what data return", two.dtype, two.is_floating_point(), "floats")
    if len(two) != 2:
        raise UsageError(f"the data must give as many samples as they are asked for, but of 2 gave {len(two)}")
    if tuple(two.shape) != (2, *data_shape):
        raise UsageError(f"data and generator differ: data have shape {tuple(two.shape[1:])}, samples {data_shape}")
    if not two.isfinite().all():
        raise UsageError("the data hold NaN or infinity")
