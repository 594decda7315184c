"""Entries that moved and those that came back, by hand."""

from __future__ import annotations

import torch

from rlpost.core.moved import Moved, MovedEntries, pooled_moved


def test_an_entry_that_moves_and_returns_is_counted() -> None:
    """Of four entries the first moves, the second moves and returns, the third changes its sign at zero, the last never."""
    base = torch.tensor([[1.0, 2.0], [0.0, torch.nan]]).bfloat16()
    entries = MovedEntries(base)
    version = base.clone()
    assert entries.update(version) == Moved(numel=4, now=0, ever=0)
    version[0] = torch.tensor([1.5, 2.5])
    assert entries.update(version) == Moved(numel=4, now=2, ever=2)
    version[0, 1] = 2.0
    version[1, 0] = -0.0
    found = entries.update(version)
    assert (found.now, found.ever, found.returned) == (2, 3, 1)
    version[0, 0] = 3.0
    assert entries.update(version).returned == 1, "another value is no return"
    assert entries.update(base).returned == 3


def test_pooling_adds_counts() -> None:
    total = pooled_moved([Moved(numel=4, now=1, ever=3), Moved(numel=6, now=0, ever=1)])
    assert total == Moved(numel=10, now=1, ever=4) and total.returned == 3
