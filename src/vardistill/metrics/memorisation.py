r"""Whether samples are copies of the training set: their nearest pictures in it and in held-out data.

Let a sample's nearest picture among N of training and M held out be held out for a share s of the samples. Had the
generator been fitted to other pictures of the same law, the N + M would be exchangeable given its samples, good or bad,
and s would be M/(N + M) in the mean. If a share c of the samples are copies, whose nearest pictures are of training,
s = (1 − c) M/(N + M) in the mean. So

    ĉ = 1 − s (N + M)/M

is 0 in the mean without memory of particular pictures, 1 where every sample is nearest to a training picture, and c in
between. From n samples that are independent its standard deviation at c = 0 is √(N/(nM)), and somewhat more for the
chance of the split. A picture that is in both sets counts half.

The question is that of Meehan et al. 2020 (arXiv 2004.05675), whose C_T compares the distances of samples and of
held-out data to the training set, and of Alaa et al. 2022 (arXiv 2102.08921, authenticity). Both take the generator's
own faults for memory or the lack of it: samples in the middle of the data are near to all pictures, noisy ones are
near to none. Comparing the two distances of one and the same sample leaves that out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vardistill.errors import UsageError
from vardistill.metrics.pairwise import sample_matrix


class Nearest(NamedTuple):
    """Nearest members of a set, nearest first.

    Attributes:
        distances: (n, k), Euclidean.
        indices: (n, k), in the order in which the set came.
        size: of the set.
    """

    distances: Tensor
    indices: Tensor
    size: int


@torch.no_grad()
def nearest(samples: Tensor, blocks: Iterable[Tensor], k: int = 1) -> Nearest:
    """The k members of a set that are nearest to each sample.

    Products of matrices find the candidates of each block; their distances are then those of the differences, so that
    a copy's is exactly 0.

    Args:
        samples: (n, *data).
        blocks: the set in parts (b, *data), which need not fit in memory together.
        k: neighbours, at least 1 and at most the set's size.

    Raises:
        UsageError: for k out of range, or samples or blocks that are not finite or of different shape.
    """
    x, size = sample_matrix(samples, "samples"), 0
    distances, indices = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long, device=x.device)
    for block in blocks:
        if block.shape[1:] != samples.shape[1:]:
            shapes = f"{tuple(samples.shape)} and {tuple(block.shape)}"
            raise UsageError(f"samples and data must have the same data shape, but are {shapes}")
        near, where = _nearest_in(x, block.flatten(1).to(x), max(k, 1))
        distances, order = torch.cat([distances, near], 1).sort(dim=1, stable=True)
        indices = torch.cat([indices, where + size], 1).gather(1, order)[:, :k]
        distances, size = distances[:, :k], size + len(block)
    if not 1 <= k <= size:
        raise UsageError(f"k must be at least 1 and at most the data's size, {size}, but is {k}")
    return Nearest(distances, indices, size)


def _nearest_in(x: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (n, min(k, b)) of the block's members nearest to x."""
    if not block.isfinite().all():
        raise UsageError("data must be finite, but hold NaN or infinity")
    centre = block.mean(0)
    half = 0.5 * (block - centre).square().sum(1) - (x - centre) @ (block - centre).T
    where = half.topk(min(k, len(block)), largest=False).indices
    near = [(x - block[column]).norm(dim=1) for column in where.T]
    return torch.stack(near, 1), where


def memorised_share(train: Nearest, held_out: Nearest) -> float:
    """ĉ, the share of samples that are copies, from the samples' nearest pictures of training and held out.

    Args:
        train: `nearest` of the samples in the training set.
        held_out: the same in held-out data of the same law.

    Returns:
        At most 1, and about 0, of either sign, without memory.

    Raises:
        UsageError: for different numbers of samples.
    """
    a, b = train.distances[:, 0], held_out.distances[:, 0]
    if len(a) != len(b):
        raise UsageError(f"both must be of the same samples, but are of {len(a)} and {len(b)}")
    s = float((b < a).double().mean() + 0.5 * (b == a).double().mean())
    return 1 - s * (train.size + held_out.size) / held_out.size
