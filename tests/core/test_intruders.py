"""Intruders made smaller: by hand on diagonal matrices, and that nothing else of a weight changes."""

from __future__ import annotations

import pytest
import torch

from rlpost.core.intruders import dampened
from rlpost.core.spectrum import decompose, intruder_dimensions


def test_a_planted_intruder_is_scaled_and_all_else_stays() -> None:
    """Before has directions e0 and e1; after has e2 too, first of all, with singular value 8."""
    before_MK = torch.tensor([[4.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert dampened(before_MK, before_MK * 2, 0.5)[1] == 0
    after_MK = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 8.0], [0.0, 0.0]])
    smaller_MK, num_found = dampened(before_MK, after_MK, 0.25)
    assert num_found == 1
    torch.testing.assert_close(smaller_MK, torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))


def test_only_leading_directions_are_asked() -> None:
    before_MK = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    after_MK = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    before_MK[1, 1] = 1.0
    assert dampened(before_MK, after_MK, 0.0, k=1)[1] == 0
    smaller_MK, num_found = dampened(before_MK, after_MK, 0.0, k=2)
    assert num_found == 1
    torch.testing.assert_close(smaller_MK, torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_are_scaled_as_are_counted_and_the_spectrum_loses_only_theirs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before_MK = torch.randn(60, 40) @ torch.diag(torch.linspace(1, 0.01, 40))
    after_MK = (before_MK + 30 * torch.outer(torch.randn(60), torch.randn(40)) / 40).to(dtype)
    counted = intruder_dimensions(decompose(before_MK), decompose(after_MK), k=10, epsilon=0.6)
    smaller_MK, num_found = dampened(before_MK.to(dtype), after_MK, 0.0, k=10, epsilon=0.6)
    assert num_found == counted >= 1 and smaller_MK.dtype == dtype
    difference = decompose(after_MK.float() - smaller_MK.float())
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    assert (difference.sigma_R > tolerance * difference.sigma_R[0]).sum() == num_found
