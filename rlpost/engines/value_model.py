"""The critic's model: a policy's backbone with one number on top. Axes: B rows, T positions, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """Zero at first, so that every first value is 0; multiplied in float32, because bfloat16 knows 0.99 and 1 apart at
    best."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        return linear(hidden_BTH.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueModel(nn.Module):
    """What a state, the tokens so far, is worth."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = policy.base_model
        self.head = ValueHead(policy.config.hidden_size, policy.dtype)

    def forward(self, token_ids_BT: Tensor, mask_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """The fields of `core.critic.Values`.

        The state of a token is the position before it: its own hidden state has seen it already.

        Args:
            token_ids_BT: int64, rows padded on the right.
            mask_BT: bool; never the first position.
            lengths_B: int64: real tokens per row.
        """
        after_BT = self.head(self.backbone(input_ids=token_ids_BT, use_cache=False).last_hidden_state)
        end_B = after_BT.gather(-1, lengths_B[:, None] - 1)[:, 0]
        return torch.where(mask_BT, pad(after_BT, (1, -1)), 0.0), end_B
