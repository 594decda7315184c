"""Whether two tuned models are the same model: how many of their entries agree, and how far their updates point the same way.

Source: Mukherjee et al. (arXiv 2505.11711) compare a run of the whole model with one of its subnetwork alone by the share of
entries within 1e-5 and 1e-4. Most entries of the untouched base agree as well, and more of another seed's run: the figures of
those pairs belong beside it. N entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.core.sparsity import CHUNK, Sparsity, pooled, sparsity
from rlpost.core.weights import bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of one weight in two models tuned from one base.

    Example:
        Agreement(difference=Sparsity(numel=4, bit_equal=3, ...), dot=0.5, first_squared=1.0, second_squared=0.25)
    """

    difference: Sparsity
    """From the first to the second: entries that are bit-equal, and within each tolerance."""
    dot: float
    """Sum of the products of the two updates."""
    first_squared: float
    """Sum of the squares of the first update."""
    second_squared: float

    @property
    def cosine(self) -> float | None:
        """Of the two updates; None when one is zero."""
        norms = math.sqrt(self.first_squared) * math.sqrt(self.second_squared)
        return self.dot / norms if norms else None


def agreement(before: Tensor, first: Tensor, second: Tensor) -> Agreement:
    """Of two updates that began at `before`, a chunk at a time; the caller compares its shape and dtype.

    Raises:
        ValueError: as `core.sparsity.sparsity` of the first and the second.
    """
    difference, dot, first_squared, second_squared = sparsity(first, second), 0.0, 0.0, 0.0
    for low in range(0, before.numel(), CHUNK):
        old, one, other = (tensor.flatten()[low : low + CHUNK] for tensor in (before, first, second))
        first_N, second_N = _update(old, one), _update(old, other)
        dot += float(first_N @ second_N)
        first_squared += float(first_N @ first_N)
        second_squared += float(second_N @ second_N)
    return Agreement(difference=difference, dot=dot, first_squared=first_squared, second_squared=second_squared)


def _update(before_N: Tensor, after_N: Tensor) -> Tensor:
    """float64; 0 where an entry that is not finite stayed so."""
    return torch.where(bits(before_N) == bits(after_N), 0.0, after_N.detach().double() - before_N.detach().double())


def pooled_agreement(parts: Iterable[Agreement]) -> Agreement:
    """Of several weights as if they were one."""
    every = list(parts)
    return Agreement(
        difference=pooled(a.difference for a in every),
        dot=math.fsum(a.dot for a in every),
        first_squared=math.fsum(a.first_squared for a in every),
        second_squared=math.fsum(a.second_squared for a in every),
    )
