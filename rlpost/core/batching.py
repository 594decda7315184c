"""From groups to micro-batches: which rows go together, and how they are laid out. Axes: B rows, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from math import ceil

import torch

from rlpost.core.losses import rollout_weight
from rlpost.types import Rollout, TrainingBatch


def plan_micro_batches(lengths: Sequence[int], *, max_tokens: int, num_ranks: int = 1) -> list[list[int]]:
    """Cut rows into micro-batches of at most `max_tokens` tokens and about the same size, equally many per rank.

    The longest row first, each to the micro-batch with the fewest tokens ("longest processing time first", Graham 1969):
    micro-batches come out about equal, and so do ranks, which take them round robin. All need the same number of
    backward passes (a collective entered by one rank only would hang), so with few rows some are empty. A row longer
    than `max_tokens` gets a micro-batch of its own, and counts as one.

    Returns:
        Row indices per micro-batch; every index appears exactly once.
    """
    assert max_tokens > 0 and num_ranks > 0
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    turns = ceil(sum(min(length, max_tokens) for length in lengths) / (max_tokens * num_ranks))
    while True:
        batches: list[list[int]] = [[] for _ in range(turns * num_ranks)]
        loads = [(0, index) for index in range(len(batches))]
        for row in rows:
            load, index = loads[0]
            batches[index].append(row)
            heapreplace(loads, (load + lengths[row], index))
        if all(load <= max_tokens or len(batches[index]) == 1 for load, index in loads):
            return batches
        turns += 1


def collate(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    aggregation: str,
    learner_version: int,
    max_staleness: int | None,
) -> TrainingBatch:
    """Lay rollouts out as one padded micro-batch.

    Tokens older than `max_staleness` versions leave the loss mask: they belong to stragglers that outlived their step
    (see `pipeline.buffer`), and the bound holds for every trained token. A rollout's weight counts all its tokens, so
    masking never re-weights the rest.

    Args:
        advantages: one per rollout.
        learner_version: version the optimizer step will update.
        max_staleness: None for demonstrations, which no policy sampled.
    """
    assert rollouts and len(rollouts) == len(advantages)
    lengths_B = torch.tensor([len(r.token_ids) for r in rollouts])
    shape = (len(rollouts), int(lengths_B.max()))
    token_ids_BT = torch.zeros(shape, dtype=torch.int64)
    loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
    logprobs_BT = torch.zeros(shape)
    ages_BT = torch.zeros(shape, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        token_ids_BT[row, :length] = rollout.token_ids
        loss_mask_BT[row, :length] = rollout.loss_mask
        logprobs_BT[row, :length] = rollout.sampler_logprobs
        first = length - rollout.num_response_tokens
        for span in rollout.spans:
            ages_BT[row, first + span.start : first + span.end] = learner_version - span.version
    if max_staleness is not None:
        loss_mask_BT &= ages_BT <= max_staleness
    return TrainingBatch(
        token_ids_BT=token_ids_BT,
        lengths_B=lengths_B,
        loss_mask_BT=loss_mask_BT,
        sampler_logprobs_BT=torch.where(loss_mask_BT, logprobs_BT, 0.0),
        temperatures_B=torch.tensor([r.temperature for r in rollouts]),
        advantages_B=torch.tensor(advantages, dtype=torch.float32),
        truncated_B=torch.tensor([r.finish_reason == "length" for r in rollouts]),
        weights_B=torch.tensor([rollout_weight(r.num_response_tokens, aggregation=aggregation) for r in rollouts]),
        ages_BT=torch.where(loss_mask_BT, ages_BT, 0),
    )
