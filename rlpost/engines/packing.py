"""Rows laid end to end, so that no weight is ever multiplied with padding. Axes: B rows, T positions, N tokens of all rows.

Everything in a transformer but attention takes each token alone. Attention takes rows of about one length together, padded
to the longest of them; whatever the rest of the micro-batch holds, a row costs itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

PACKED_ATTENTION = "rlpost_packed"
SHORTEST_SHARE = 0.75
"""Rows attend together when none is shorter than this share of the longest: at most about half of that is padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Rows that attend together.

    Example:
        rows of 3 and 2 tokens, first of all: index_BT [[0, 1, 2], [3, 4, 4]], tokens_N [0, 1, 2, 3, 4]
    """

    index_BT: Tensor
    """int64: which packed token stands there; after a row's end its last one, which no real token sees."""
    tokens_N: Tensor
    """int64: where in the flattened [B, T] each of the bucket's tokens stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where each token of some rows went: the longest row first (ties by position)."""

    starts_B: Tensor
    """int64: where each row begins."""
    order_N: Tensor
    """int64: of each packed token, where it stands in the flattened [B, T]."""
    positions_N: Tensor
    """int64: its position within its row."""
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, lengths_B: Tensor, num_positions: int) -> Packing:
        """That of rows padded on the right to `num_positions`, on the device of `lengths_B`."""
        lengths = lengths_B.tolist()
        rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        starts = [0] * len(lengths)
        for row, start in zip(rows, accumulate((lengths[row] for row in rows), initial=0), strict=False):
            starts[row] = start
        positions_N = torch.cat([torch.arange(lengths[row]) for row in rows])
        order_N = torch.cat([row * num_positions + torch.arange(lengths[row]) for row in rows])
        device = lengths_B.device
        return cls(
            starts_B=torch.tensor(starts, device=device),
            order_N=order_N.to(device),
            positions_N=positions_N.to(device),
            buckets=tuple(
                _bucket([starts[row] for row in alike], [lengths[row] for row in alike], device)
                for alike in _alike(rows, lengths)
            ),
        )

    def states_before(self, hidden_N: Tensor, rows_M: Tensor, positions_M: Tensor) -> Tensor:
        """[M, ...]: of packed `hidden_N` [N, ...], what stands before each of M tokens in its row."""
        return hidden_N.index_select(0, self.starts_B[rows_M] + positions_M - 1)


def _alike(rows: list[int], lengths: list[int]) -> list[list[int]]:
    buckets: list[list[int]] = []
    for row in rows:
        if buckets and lengths[row] >= SHORTEST_SHARE * lengths[buckets[-1][0]]:
            buckets[-1].append(row)
        else:
            buckets.append([row])
    return buckets


def _bucket(starts: list[int], lengths: list[int], device: torch.device) -> Bucket:
    at_T, lengths_B1 = torch.arange(lengths[0]), torch.tensor(lengths)[:, None]
    index_BT = torch.tensor(starts)[:, None] + at_T.minimum(lengths_B1 - 1)
    tokens_N = (at_T < lengths_B1).flatten().nonzero()[:, 0]
    return Bucket(index_BT=index_BT.to(device), tokens_N=tokens_N.to(device))


def packed_hidden_states(backbone: nn.Module, token_ids_BT: Tensor, packing: Packing) -> Tensor:
    """[N, H]: the last hidden state of each token, in packed order."""
    inputs = {
        "input_ids": token_ids_BT.flatten()[packing.order_N][None],
        "position_ids": packing.positions_N[None],
    }
    return backbone(**inputs, use_cache=False, packing=packing).last_hidden_state[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: [B, heads, T, D] to [B, T, heads, D], of packed rows with B = 1, T = N.

    Raises:
        ValueError: when the model asks for anything that this does not do.
    """
    if asked := sorted(name for name in ("softcap", "s_aux", "position_bias") if unknown.get(name) is not None):
        raise ValueError(f"{type(module).__name__} needs attention with {asked[0]}, which the learner does not have")
    assert attention_mask is None
    if packing is None:
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    outputs = []
    for bucket in packing.buckets:
        shape, index = bucket.index_BT.shape, bucket.index_BT.flatten()
        in_order = (x[0].transpose(0, 1) for x in (query, key, value))  # as it lies in memory: rows copy fast
        q, k, v = (x.index_select(0, index).unflatten(0, shape).transpose(1, 2) for x in in_order)
        output_BHTD = _causal(q, k, v, scaling, sliding_window)
        outputs.append(output_BHTD.transpose(1, 2).flatten(0, 1).index_select(0, bucket.tokens_N))
    return torch.cat(outputs)[None], None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """PyTorch's; on CPU in float32, because there its bfloat16 kernel takes up to 4 times as long on short rows."""
    dtype, num_positions = query.dtype, query.shape[2]
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    mask = None
    if window is not None and num_positions > window:
        at_T = torch.arange(num_positions, device=query.device)
        distance = at_T[:, None] - at_T
        mask = (distance >= 0) & (distance < window)
    grouped = key.shape[1] != query.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    ).to(dtype)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """`_attention` masks by itself."""


AttentionInterface.register(PACKED_ATTENTION, _attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def check_rows_are_alone(policy: PreTrainedModel) -> None:
    """Refuse a model in which a packed row sees another.

    Raises:
        ValueError: when one row's hidden states change with another row's tokens.
    """
    ids_BT = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 0]]])
    packing = Packing.of(torch.tensor([2, 2]), 2)
    with torch.no_grad():
        first, second = (packed_hidden_states(policy.base_model, ids, packing)[2:] for ids in ids_BT)
    if not torch.equal(first, second):
        raise ValueError(f"{type(policy).__name__} lets rows that are laid end to end see each other: not supported")
