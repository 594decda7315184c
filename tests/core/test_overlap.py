"""Overlaps of planted updates, and chance that is what random updates give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlpost.core.overlap import Overlap, overlap, overlap_with_mask, pooled_overlap
from rlpost.core.subnetwork import low_magnitude_mask, principal_mask


def test_a_planted_overlap_is_counted() -> None:
    """Of ten entries the first changes four, the second five, and three are the same."""
    before = torch.arange(1.0, 11.0)
    first, second = before.clone(), before.clone()
    first[[0, 1, 2, 3]] += 0.5
    second[[1, 2, 3, 8, 9]] -= 0.5
    found = overlap(before, first, second)
    assert (found.numel, found.first, found.second, found.both, found.uniform) == (10, 4, 5, 3, 2.0)
    assert (found.of_first(found.both), found.of_second(found.both), found.jaccard(found.both)) == (0.75, 0.6, 0.5)
    assert found.matched == 3.0, "with an entry per bin nothing is left to chance"


def flip(before: Tensor, probability: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.where(torch.rand(before.shape) < probability, before + 1, before)


def test_chance_is_what_independent_updates_give() -> None:
    torch.manual_seed(0)
    before = torch.randn(400, 500)
    even = torch.full_like(before, 0.3)
    found = overlap(before, flip(before, even, 1), flip(before, even, 2))
    assert found.both == pytest.approx(found.uniform, rel=0.02) == pytest.approx(found.matched, rel=0.02)
    small_first = torch.exp(-2 * before.abs())
    found = overlap(before, flip(before, small_first, 1), flip(before, small_first, 2))
    assert found.both == pytest.approx(found.matched, rel=0.02)
    assert found.both > 1.3 * found.uniform, "small weights change first: that is no agreement of two runs"


def test_an_update_overlaps_wholly_with_itself_and_pooling_adds_counts() -> None:
    torch.manual_seed(0)
    before = torch.randn(50, 40)
    after = flip(before, torch.full_like(before, 0.1), 1)
    same = overlap(before, after, after)
    assert same.of_first(same.both) == same.of_second(same.both) == same.jaccard(same.both) == 1.0
    nothing = overlap(before, before, after)
    assert (nothing.first, nothing.both, nothing.of_first(0), nothing.uniform) == (0, 0, 0.0, 0.0)
    total = pooled_overlap([same, nothing])
    assert isinstance(total, Overlap) and total.numel == 4000 and total.both == same.both
    assert total.second == 2 * same.second and total.matched == same.matched
    assert overlap(torch.zeros(0), torch.zeros(0), torch.zeros(0)).numel == 0


def test_an_update_beside_a_mask_is_counted() -> None:
    """Of ten entries the update changes four and the mask has five: two are both, and chance is 4 x 5 / 10."""
    before = torch.arange(1.0, 11.0)
    after = before.clone()
    after[[0, 1, 2, 9]] += 0.5
    found = overlap_with_mask(before, after, low_magnitude_mask(before, density=0.5).roll(1))
    assert (found.first, found.second, found.both, found.uniform) == (4, 5, 2, 2.0)
    assert (found.of_first(found.both), found.of_first(found.uniform)) == (0.5, 0.5)


def test_an_update_of_small_weights_avoids_principal_ones_by_no_more_than_magnitude_explains() -> None:
    """A weight with two strong directions; each entry changes with a probability that falls with its magnitude alone."""
    torch.manual_seed(0)
    before = torch.randn(200, 2) @ torch.randn(2, 150) + 0.5 * torch.randn(200, 150)
    after = flip(before, torch.exp(-2 * before.abs()), 1)
    principal = overlap_with_mask(before, after, principal_mask(before, rank=2, density=0.3))
    assert principal.of_first(principal.uniform) == pytest.approx(0.3)
    assert principal.both < 0.5 * principal.uniform
    assert principal.both == pytest.approx(principal.matched, rel=0.1)
    low = overlap_with_mask(before, after, low_magnitude_mask(before, density=0.3))
    assert low.both > 1.5 * low.uniform and low.both == pytest.approx(low.matched, rel=0.02)
