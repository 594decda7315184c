"""Micro-batches: every row once, within the token budget, as many per rank; and how rows are laid out."""

from __future__ import annotations

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
    assert len(batches) % num_ranks == 0
    for batch in batches:
        padded = len(batch) * max((lengths[row] for row in batch), default=0)
        assert len(batch) <= 1 or padded <= max_tokens


def test_rows_of_like_length_share_a_micro_batch() -> None:
    """Budget 20: the rows of 9 and 8 fill 18, the five of 2 and 3 fill 15."""
    assert plan_micro_batches([2, 9, 3, 8, 2, 3, 2], max_tokens=20) == [[1, 3], [2, 5, 0, 4, 6]]


def test_work_is_halved_before_a_rank_gets_none() -> None:
    assert plan_micro_batches([3, 3, 3, 3], max_tokens=100, num_ranks=2) == [[0, 1], [2, 3]]
    assert plan_micro_batches([3], max_tokens=100, num_ranks=2) == [[0], []]
    assert plan_micro_batches([], max_tokens=100, num_ranks=2) == []


def test_collate_by_hand() -> None:
    """Row 0: 2 + 3 tokens, the last of them of version 7; row 1: 1 + 1. Updating version 8."""
    spans = (VersionSpan(version=6, start=0, end=2), VersionSpan(version=7, start=2, end=3))
    rollouts = [make_rollout(2, 3, spans), make_rollout(1, 1, (VersionSpan(version=8, start=0, end=1),), 50)]
    batch = collate(rollouts, [0.5, -0.5], aggregation="sequence_mean", learner_version=8, max_staleness=2)
    assert batch.token_ids_BT.tolist() == [[10, 11, 12, 13, 14], [50, 51, 0, 0, 0]]
    assert batch.lengths_B.tolist() == [5, 2]
    assert batch.loss_mask_BT.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.sampler_logprobs_BT.tolist() == [[0, 0, -1.5, -1.5, -1.5], [0, -1.5, 0, 0, 0]]
    assert batch.ages_BT.tolist() == [[0, 0, 2, 2, 1], [0, 0, 0, 0, 0]]
    assert batch.advantages_B.tolist() == [0.5, -0.5]
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
