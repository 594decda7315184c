"""Two tuned models beside each other, by hand."""

from __future__ import annotations

import pytest
import torch

from rlpost.core.agreement import agreement, pooled_agreement


def test_agreement_worked_by_hand() -> None:
    """Updates (3e-5, 1, 0, 0) and (0, 1, 2, 0) of (1e-4, 0, 0, inf): the second and fourth entry are equal, the first within
    1e-4, and the third is neither. Their product is 1, their squares are 1 and 5: the cosine is 1 / sqrt 5."""
    before = torch.tensor([1e-4, 0.0, 0.0, torch.inf])
    first, second = before.clone(), before.clone()
    first[0] += 3e-5
    first[1], second[1], second[2] = 1.0, 1.0, 2.0
    found = agreement(before, first, second)
    assert (found.difference.numel, found.difference.bit_equal) == (4, 2)
    assert (found.difference.within[1e-5], found.difference.within[1e-4]) == (2, 3)
    assert found.cosine == pytest.approx(5**-0.5, rel=1e-6)
    with_base = agreement(before, before, second)
    assert (with_base.difference.bit_equal, with_base.cosine) == (2, None)


def test_the_cosine_of_pooled_updates_is_that_of_one_long_one_and_keeps_its_sign() -> None:
    torch.manual_seed(0)
    before = torch.randn(50, 4).bfloat16()
    first, second = before + 0.1 * torch.randn(50, 4).bfloat16(), before + 0.1 * torch.randn(50, 4).bfloat16()
    whole = agreement(before, first, second)
    halves = pooled_agreement(
        agreement(*(t[rows] for t in (before, first, second))) for rows in (slice(20), slice(20, 50))
    )
    assert halves.cosine == pytest.approx(whole.cosine)
    assert halves.difference.bit_equal == whole.difference.bit_equal
    updates = (tensor.double().flatten() - before.double().flatten() for tensor in (first, second))
    assert whole.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*updates, dim=0)))
    reverse = agreement(torch.zeros(3), torch.ones(3), -torch.ones(3))
    assert reverse.cosine == pytest.approx(-1.0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        agreement(torch.zeros(3), torch.zeros(3), torch.zeros(3).bfloat16())
