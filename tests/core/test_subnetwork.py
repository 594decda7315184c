"""Masks by hand: what changed, what is principal, and controls of the same size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.core.subnetwork import (
    complement_mask,
    coverage,
    low_magnitude_mask,
    packed,
    principal_mask,
    random_mask,
    unpacked,
    updated_mask,
    with_control,
)


def test_an_entry_is_updated_when_its_served_bytes_differ() -> None:
    """Bfloat16 neighbours of 1 are 1 - 2^-8 and 1 + 2^-7: 1.001 is still 1. And -0 is not 0."""
    before = torch.tensor([1.0, 1.0, 0.0, 2.0])
    after = torch.tensor([1.001, 1.01, -0.0, 2.0])
    assert updated_mask(before, after, dtype=torch.bfloat16).tolist() == [False, True, True, False]
    assert updated_mask(before, after, dtype=torch.float32).tolist() == [True, True, True, False]


def test_principal_entries_are_those_of_the_low_rank_approximation_and_not_of_the_weight() -> None:
    """3 uv' + 2 e3 e3': the largest entry of the weight, 2, belongs to the second singular value. u = v = (1, 1, 0) /
    sqrt 2, so the approximation of rank 1 is 1.5 on the upper left 2 x 2 and 0 elsewhere."""
    weight_MN = torch.tensor([[1.5, 1.5, 0.0], [1.5, 1.5, 0.0], [0.0, 0.0, 2.0]])
    assert principal_mask(weight_MN, rank=1, density=4 / 9).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert principal_mask(weight_MN, rank=2, density=1 / 9).int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_principal_entries_count_by_absolute_value_and_ties_go_to_the_first() -> None:
    weight_MN = torch.tensor([[-4.0, 0.0], [0.0, 1.0]])
    assert principal_mask(weight_MN, rank=2, density=0.25).tolist() == [[True, False], [False, False]]
    assert principal_mask(torch.zeros(2, 2), rank=1, density=0.5).tolist() == [[True, True], [False, False]]


def test_principal_entries_are_the_same_from_singular_vectors_at_hand() -> None:
    weight_MN = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    left_MR = torch.linalg.svd(weight_MN, full_matrices=False).U
    found = principal_mask(weight_MN, rank=3, density=0.2, left_MR=left_MR)
    assert torch.equal(found, principal_mask(weight_MN, rank=3, density=0.2))
    assert not torch.equal(found, principal_mask(weight_MN, rank=3, density=0.2, left_MR=left_MR.roll(1, 1)))


def test_small_entries_count_by_absolute_value_and_ties_go_to_the_first() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5], [1.0, -0.0, 2.0]])
    assert low_magnitude_mask(weight, density=0.5).int().tolist() == [[0, 1, 1], [0, 1, 0]]
    assert low_magnitude_mask(weight.bfloat16(), density=1 / 6).int().tolist() == [[0, 0, 0], [0, 1, 0]]


def test_a_mask_is_packed_from_the_lowest_bit_on() -> None:
    """Entries 0, 3 and 9 of 10: 1 + 8, then 2."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask.view(-1)[[0, 3, 9]] = True
    assert packed(mask).tolist() == [9, 2]


@given(shape=st.lists(st.integers(0, 9), max_size=3), seed=st.integers(0, 10))
def test_a_packed_mask_comes_back(shape: list[int], seed: int) -> None:
    size = torch.Size(shape)
    mask = random_mask(size, count=size.numel() // 2, seed=seed, name="w")
    data = packed(mask)
    assert len(data) == -(-size.numel() // 8)
    back = unpacked(data, size)
    assert back.dtype == torch.bool and back.shape == size and torch.equal(back, mask)


@given(size=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 10))
def test_controls_are_of_the_same_size_and_the_complement_is_disjoint(size: int, share: float, seed: int) -> None:
    mask = random_mask(torch.Size([size]), count=round(share * size), seed=seed, name="w")
    assert mask.sum() == round(share * size)
    random = with_control(mask, "random", seed=seed + 1, name="w")
    outside = with_control(mask, "complement", seed=seed, name="w")
    assert random.sum() == mask.sum()
    assert outside.sum() == min(mask.sum(), size - mask.sum())
    assert not (outside & mask).any()
    assert with_control(mask, None, seed=seed, name="w") is mask


def test_a_random_choice_depends_on_seed_and_name_and_nothing_else() -> None:
    """Uniform: over 400 names each of ten entries is chosen about 120 times of 400, 4 standard deviations are 37."""

    def mask(seed: int, name: str) -> torch.Tensor:
        return random_mask(torch.Size([2, 5]), count=3, seed=seed, name=name)

    torch.manual_seed(1)
    first = mask(0, "a")
    torch.manual_seed(2)
    assert torch.equal(mask(0, "a"), first)
    assert any(not torch.equal(mask(0, name), first) for name in "bcd")
    assert any(not torch.equal(mask(seed, "a"), first) for seed in (1, 2, 3))
    times = sum(mask(0, str(i)).int() for i in range(400))
    assert (times - 120).abs().max() < 37  # type: ignore[operator,union-attr]
    assert complement_mask(first, seed=0, name="a").sum() == 3


def test_coverage_counts() -> None:
    masks = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.zeros(3, dtype=torch.bool)}
    assert coverage(masks) == {"a": (3, 4), "b": (0, 3)}


@pytest.mark.parametrize("count", [0, 4])
def test_none_and_all(count: int) -> None:
    assert random_mask(torch.Size([4]), count=count, seed=0, name="w").sum() == count
