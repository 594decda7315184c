"""Batches for the objectives: by hand, and at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlpost.core.losses import rollout_weight
from rlpost.types import GroupSummary, Rollout, TrainingBatch


def make_batch(
    sampler: Sequence[Sequence[float]],
    mask: Sequence[Sequence[int]],
    advantages: Sequence[float],
    ages: Sequence[Sequence[int]] | None = None,
    *,
    aggregation: str = "token_mean",
    truncated: Sequence[bool] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TrainingBatch:
    sampler_BT, mask_BT = torch.tensor(sampler, dtype=dtype), torch.tensor(mask, dtype=torch.bool)
    lengths = mask_BT.sum(-1).tolist()
    return TrainingBatch(
        token_ids_BT=torch.zeros(sampler_BT.shape, dtype=torch.int64),
        lengths_B=torch.full((len(sampler),), sampler_BT.shape[1]),
        loss_mask_BT=mask_BT,
        sampler_logprobs_BT=sampler_BT,
        temperatures_B=torch.ones(len(sampler)),
        advantages_B=torch.tensor(advantages, dtype=dtype),
        truncated_B=torch.tensor(truncated or [False] * len(sampler)),
        weights_B=torch.tensor([rollout_weight(n, aggregation=aggregation) for n in lengths], dtype=dtype),
        ages_BT=torch.zeros(sampler_BT.shape, dtype=torch.int64) if ages is None else torch.tensor(ages),
    )


def rows_of(batch: TrainingBatch, rows: slice) -> TrainingBatch:
    return TrainingBatch(**{name: getattr(batch, name)[rows] for name in TrainingBatch.__slots__})


def given_rollout() -> Rollout:
    """For tests in which only how many there are matters."""
    return Rollout(
        token_ids=torch.tensor([1, 2]),
        loss_mask=torch.tensor([False, True]),
        sampler_logprobs=torch.zeros(2),
        temperature=1.0,
        spans=(),
        finish_reason="stop",
        text="",
    )


def summary(*ends: tuple[int, str]) -> GroupSummary:
    """Of a group whose rollouts have these (response tokens, finish reason)."""
    return GroupSummary(
        prompt_id="p",
        num_tokens_G=tuple(length for length, _ in ends),
        num_prompt_tokens=1,
        finish_reasons_G=tuple(reason for _, reason in ends),
        temperature=1.0,
        surprisals_G=(0.0,) * len(ends),
        oldest_version=0,
        newest_version=0,
    )
