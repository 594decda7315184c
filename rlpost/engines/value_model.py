"""The critic's model: a policy's backbone with one number on top. Axes: B rows, T positions, N tokens of all rows, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlpost.engines.packing import Packing, packed_hidden_states


class ValueHead(nn.Module):
    """Zero at first, so that every first value is 0; multiplied in float32, because bfloat16 knows 0.99 and 1 apart at
    best."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, hidden_NH: Tensor) -> Tensor:
        return linear(hidden_NH.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueModel(nn.Module):
    """What a state, the tokens so far, is worth."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = policy.base_model
        self.head = ValueHead(policy.config.hidden_size, policy.dtype)

    def forward(self, token_ids_BT: Tensor, lengths_B: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The fields of `core.critic.Values`.

        The state of a token is the position before it: its own hidden state has seen it already.

        Args:
            token_ids_BT: int64, rows padded on the right.
            lengths_B: int64: real tokens per row.
            mask_BT: bool; never the first position.
        """
        packing = Packing.of(lengths_B, token_ids_BT.shape[1])
        after_N = self.head(packed_hidden_states(self.backbone, token_ids_BT, packing))
        rows_M, positions_M = mask_BT.nonzero(as_tuple=True)
        before_M = packing.states_before(after_N, rows_M, positions_M)
        zeros_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
        return zeros_BT.index_put((rows_M, positions_M), before_M), after_N[packing.starts_B + lengths_B - 1]
