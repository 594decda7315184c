"""Entries that moved at any version of a run, and those of them that came back.

Source: Mukherjee et al. (arXiv 2505.11711) find 8 % of the weights touched along the way and not in the end: a comparison of the
last version with the first cannot see them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.core.weights import bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Counts of one weight.

    Example:
        Moved(numel=1000, now=200, ever=280)
    """

    numel: int
    now: int
    """Entries that differ from the base in any bit."""
    ever: int
    """Entries that did at any of the versions seen."""

    @property
    def returned(self) -> int:
        """Entries that did, and are the base's again."""
        return self.ever - self.now


class MovedEntries:
    """Of one weight, version by version; keeps the base, to which nobody may write, and a byte per entry.

    A version that was not seen is no part of `ever`: an entry that moved and returned between two updates never moved.
    """

    def __init__(self, base: Tensor) -> None:
        self._base = bits(base)
        self._ever = torch.zeros(base.shape, dtype=torch.bool, device=base.device)

    def update(self, present: Tensor) -> Moved:
        """Counts after this version; the base's shape and dtype are the caller's part."""
        differs = bits(present) != self._base
        self._ever |= differs
        return Moved(numel=differs.numel(), now=int(differs.sum()), ever=int(self._ever.sum()))


def pooled_moved(parts: Iterable[Moved]) -> Moved:
    """Of several weights as if they were one."""
    every = list(parts)
    return Moved(
        numel=sum(m.numel for m in every),
        now=sum(m.now for m in every),
        ever=sum(m.ever for m in every),
    )
