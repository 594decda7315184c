"""Group-relative advantages by hand, and the groups that carry no signal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.core.advantages import batch_scale, group_advantages

rewards = st.lists(st.sampled_from([-1.0, 0.0, 0.1, 0.3, 1.0]), min_size=2, max_size=16)


def test_one_success_in_four_by_hand() -> None:
    """Mean 1/4, variance (9/16 + 3 x 1/16) / 4 = 3/16: the success gets (3/4) / (sqrt(3)/4) = sqrt(3)."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), advantage="group_std")
    torch.testing.assert_close(advantages, torch.tensor([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3))


def test_without_the_division_advantages_are_reward_minus_mean() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), advantage="group_mean")
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_leaving_one_out_compares_each_rollout_with_the_mean_of_the_others() -> None:
    """Rewards 1, 0, 0.5: 1 - 0.25, 0 - 0.75, 0.5 - 0.5."""
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.5]), advantage="leave_one_out")
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.75, 0.0]))


def test_only_the_batch_std_leaves_a_scale_for_the_end_of_the_step() -> None:
    """Advantages 3/4, -1/4, -1/4, -1/4 and four zeros: variance (9/16 + 3/16) / 8 = 3/32."""
    advantages = [*group_advantages(torch.tensor([1.0, 0, 0, 0]), advantage="batch_std").tolist(), 0.0, 0.0, 0.0, 0.0]
    assert batch_scale(advantages, advantage="batch_std") == pytest.approx(math.sqrt(3 / 32))
    assert batch_scale([0.0] * 4, advantage="batch_std") == 1.0
    for advantage in ("group_std", "group_mean", "leave_one_out"):
        assert batch_scale(advantages, advantage=advantage) == 1.0


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3])
@pytest.mark.parametrize("advantage", ["group_std", "group_mean", "leave_one_out", "batch_std"])
def test_equal_rewards_give_exact_zeros_whatever_their_mean_rounds_to(reward: float, advantage: Any) -> None:
    """The mean of seven times 0.1 is not 0.1 in binary; a residue of 1e-17 would be trained on."""
    assert group_advantages(torch.full((7,), reward), advantage=advantage).tolist() == [0.0] * 7


@given(rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(values: list[float]) -> None:
    advantages = group_advantages(torch.tensor(values), advantage="group_std").tolist()
    assert sum(advantages) == pytest.approx(0.0, abs=1e-5)
    for r, a in zip(values, advantages, strict=True):
        for other_r, other_a in zip(values, advantages, strict=True):
            assert (r > other_r) == (a > other_a)


@given(rewards, st.floats(0.5, 20), st.floats(-5, 5))
def test_normalized_advantages_ignore_scale_and_offset_of_the_reward(
    values: list[float], scale: float, offset: float
) -> None:
    base = group_advantages(torch.tensor(values), advantage="group_std")
    moved = group_advantages(torch.tensor(values, dtype=torch.float64) * scale + offset, advantage="group_std")
    torch.testing.assert_close(moved, base, rtol=1e-4, atol=1e-5)
