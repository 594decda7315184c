"""Whether two updates of one weight moved the same entries, or one those of a mask, against what chance alone would give.

Source: one-sided overlaps and uniform chance are Mukherjee et al.'s (arXiv 2505.11711, section 5 and appendix E); the overlap
with principal and low-magnitude weights is that of "The Path Not Taken" (arXiv 2511.08567). Small weights change first
whatever trains them, so chance is also taken among weights of about one magnitude. N entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rlpost.core.weights import bits

NUM_BINS = 64
"""Quantiles of the magnitude of a weight's entries, within which chance is uniform."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Counts of one weight: the entries that two updates changed, or that one did and a mask holds.

    Example:
        Overlap(numel=1000, first=300, second=200, both=120, uniform=60.0, matched=85.3)
    """

    numel: int
    first: int
    second: int
    both: int
    uniform: float
    """`both` of two random sets of their sizes."""
    matched: float
    """`both` of two random sets that have as many entries of each magnitude as they do."""

    def of_first(self, count: float) -> float:
        """As a share of the first's entries; 0 when it has none."""
        return count / self.first if self.first else 0.0

    def of_second(self, count: float) -> float:
        return count / self.second if self.second else 0.0

    def jaccard(self, count: float) -> float:
        """As a share of the entries of either."""
        either = self.first + self.second - count
        return count / either if either else 0.0


def overlap(before: Tensor, first: Tensor, second: Tensor) -> Overlap:
    """Of two updates that began at `before`; the caller compares shapes and dtypes."""
    return _overlap(before, _changed(before, first), _changed(before, second))


def overlap_with_mask(before: Tensor, after: Tensor, mask: Tensor) -> Overlap:
    """Of an update, the first, with a mask, the second, such as `core.subnetwork`'s of principal or low-magnitude entries.

    `of_first(both)` is the overlap of "The Path Not Taken", |mask and changed| / |changed|; its chance, `of_first(uniform)`, is
    the density of the mask. The matched chance is what is owed to the mask's entries being large or small, and nearly all of
    it where the mask is of low magnitudes.
    """
    return _overlap(before, _changed(before, after), mask.flatten())


def _changed(before: Tensor, after: Tensor) -> Tensor:
    return bits(before.flatten()) != bits(after.flatten())


def _overlap(before: Tensor, first_N: Tensor, second_N: Tensor) -> Overlap:
    numel, num_first, num_second = len(first_N), int(first_N.sum()), int(second_N.sum())
    return Overlap(
        numel=numel,
        first=num_first,
        second=num_second,
        both=int((first_N & second_N).sum()),
        uniform=num_first * num_second / numel if numel else 0.0,
        matched=_matched(before.flatten().float().abs(), first_N, second_N),
    )


def _matched(magnitude_N: Tensor, first_N: Tensor, second_N: Tensor) -> float:
    """Sum over bins of (of the first) (of the second) / entries."""
    order_N = magnitude_N.argsort(stable=True)
    edges = [len(order_N) * index // NUM_BINS for index in range(NUM_BINS + 1)]
    expected = 0.0
    for start, stop in itertools.pairwise(edges):
        if inside := stop - start:
            entries = order_N[start:stop]
            expected += int(first_N[entries].sum()) * int(second_N[entries].sum()) / inside
    return expected


def pooled_overlap(parts: Iterable[Overlap]) -> Overlap:
    """Of several weights; chance stays within each."""
    every = list(parts)
    return Overlap(
        numel=sum(o.numel for o in every),
        first=sum(o.first for o in every),
        second=sum(o.second for o in every),
        both=sum(o.both for o in every),
        uniform=math.fsum(o.uniform for o in every),
        matched=math.fsum(o.matched for o in every),
    )
