"""Micro-batches: every row once, within the token budget, as many per rank; and how rows are laid out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlpost.core.batching import collate, plan_micro_batches
from rlpost.types import Rollout, VersionSpan


def make_rollout(num_prompt: int, num_response: int, spans: tuple[VersionSpan, ...], first_token: int = 10) -> Rollout:
    length = num_prompt + num_response
    mask = torch.arange(length) >= num_prompt
    return Rollout(
        token_ids=torch.arange(first_token, first_token + length),
        loss_mask=mask,
        sampler_logprobs=torch.where(mask, -1.5, 0.0),
        temperature=1.0,
        spans=spans,
        finish_reason="stop",
        text="",
    )


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    max_tokens=st.integers(1, 200),
    num_ranks=st.integers(1, 4),
)
def test_every_row_is_in_exactly_one_micro_batch_and_ranks_have_equally_many(
    lengths: list[int], max_tokens: int, num_ranks: int
) -> None:
    batches = plan_micro_batches(lengths, max_tokens=max_tokens, num_ranks=num_ranks)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) % num_ranks == 0 and sum(not batch for batch in batches) < num_ranks
    for batch in batches:
        assert len(batch) <= 1 or sum(lengths[row] for row in batch) <= max_tokens


def test_micro_batches_are_about_equal() -> None:
    """29 tokens need two of 20: 9 + 3 + 2 (+ 2) and 8 + 3 + 2 by turns of the lighter one."""
    assert plan_micro_batches([2, 9, 3, 8, 2, 3, 2], max_tokens=20) == [[1, 5, 4], [3, 2, 0, 6]]


def test_a_row_above_the_budget_is_alone_and_brings_no_empty_micro_batches() -> None:
    """110 tokens would fill six of 20."""
    assert plan_micro_batches([100, 5, 5], max_tokens=20) == [[0], [1, 2]]


def test_ranks_share_work_before_one_gets_none() -> None:
    assert plan_micro_batches([3, 3, 3, 3], max_tokens=100, num_ranks=2) == [[0, 2], [1, 3]]
    assert plan_micro_batches([3], max_tokens=100, num_ranks=2) == [[0], []]
    assert plan_micro_batches([], max_tokens=100, num_ranks=2) == []


def test_ranks_get_equal_tokens_and_not_equal_numbers_of_rows() -> None:
    """One row of 12 weighs as much as six of 2, though all seven would fit in one micro-batch."""
    assert plan_micro_batches([2, 2, 12, 2, 2, 2, 2], max_tokens=100, num_ranks=2) == [[2], [0, 1, 3, 4, 5, 6]]


@given(lengths=st.lists(st.integers(16, 1024), min_size=64, max_size=300), num_ranks=st.integers(1, 8))
def test_no_rank_has_more_than_a_third_above_the_least_possible(lengths: list[int], num_ranks: int) -> None:
    """Graham's bound for one micro-batch per rank: 4/3 of the optimum, which is at least the mean and the longest row."""
    plan = plan_micro_batches(lengths, max_tokens=10**6, num_ranks=num_ranks)
    assert len(plan) == num_ranks
    least = max(sum(lengths) / num_ranks, max(lengths))
    assert max(sum(lengths[row] for row in batch) for batch in plan) <= 4 / 3 * least + 1


def test_collate_by_hand() -> None:
    """Row 0: 2 + 3 tokens, the last of them of version 7; row 1: 1 + 1. Updating version 8."""
    spans = (VersionSpan(version=6, start=0, end=2), VersionSpan(version=7, start=2, end=3))
    rollouts = [make_rollout(2, 3, spans), make_rollout(1, 1, (VersionSpan(version=8, start=0, end=1),), 50)]
    rollouts[1] = replace(rollouts[1], temperature=0.5)
    batch = collate(rollouts, [0.5, -0.5], aggregation="sequence_mean", learner_version=8, max_staleness=2)
    assert batch.token_ids_BT.tolist() == [[10, 11, 12, 13, 14], [50, 51, 0, 0, 0]]
    assert batch.lengths_B.tolist() == [5, 2]
    assert batch.loss_mask_BT.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.sampler_logprobs_BT.tolist() == [[0, 0, -1.5, -1.5, -1.5], [0, -1.5, 0, 0, 0]]
    assert batch.ages_BT.tolist() == [[0, 0, 2, 2, 1], [0, 0, 0, 0, 0]]
    assert batch.advantages_B.tolist() == [0.5, -0.5] and batch.temperatures_B.tolist() == [1.0, 0.5]
    torch.testing.assert_close(batch.weights_B, torch.tensor([1 / 3, 1.0]))


def test_tokens_past_the_staleness_bound_leave_the_mask_without_reweighting_the_rest() -> None:
    spans = (VersionSpan(version=6, start=0, end=2), VersionSpan(version=7, start=2, end=3))
    batch = collate([make_rollout(2, 3, spans)], [1.0], aggregation="sequence_mean", learner_version=8, max_staleness=1)
    assert batch.loss_mask_BT.int().tolist() == [[0, 0, 0, 0, 1]]
    assert batch.sampler_logprobs_BT.tolist() == [[0, 0, 0, 0, -1.5]]
    assert batch.ages_BT.tolist() == [[0, 0, 0, 0, 1]]
    torch.testing.assert_close(batch.weights_B, torch.tensor([1 / 3]))


@pytest.mark.parametrize("learner_version", [0, 1000])
def test_demonstrations_have_no_age(learner_version: int) -> None:
    batch = collate(
        [make_rollout(2, 3, ())], [1.0], aggregation="token_mean", learner_version=learner_version, max_staleness=None
    )
    assert batch.loss_mask_BT.sum() == 3
    assert not batch.ages_BT.any()
