"""Which states the critic's values are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlpost.engines.forward import load_policy
from rlpost.engines.value_model import ValueModel


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ValueModel:
    torch.manual_seed(0)
    model = ValueModel(load_policy(tiny_model, torch.float32))
    torch.nn.init.normal_(model.head.weight)
    return model


@torch.no_grad()
def values(model: ValueModel, token_ids: list[int], num_prompt: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Of the response's tokens, and of the last state."""
    ids = torch.tensor([[*token_ids, *[0] * padding]])
    mask = (torch.arange(ids.shape[1]) >= num_prompt) & (torch.arange(ids.shape[1]) < len(token_ids))
    of_tokens, end = model(ids, torch.tensor([len(token_ids)]), mask[None])
    assert not of_tokens[0, ~mask].any()
    return of_tokens[0, mask], end[0]


def test_the_value_of_a_token_is_that_of_the_state_before_it(model: ValueModel) -> None:
    """Another third response token changes what comes after it, the last state included, and nothing else."""
    ours, end = values(model, [10, 11, 20, 21, 22, 23], num_prompt=2)
    other, other_end = values(model, [10, 11, 20, 21, 99, 23], num_prompt=2)
    assert torch.equal(ours[:3], other[:3]) and ours[3] != other[3] and end != other_end


def test_the_last_state_is_the_state_the_next_token_would_be_drawn_in(model: ValueModel) -> None:
    end = values(model, [10, 11, 20, 21], num_prompt=2)[1]
    longer = values(model, [10, 11, 20, 21, 50], num_prompt=2)[0]
    torch.testing.assert_close(end, longer[2], rtol=1e-5, atol=1e-6)


def test_padding_changes_no_value(model: ValueModel) -> None:
    ours, padded = (values(model, [10, 11, 20, 21], num_prompt=2, padding=n) for n in (0, 5))
    torch.testing.assert_close(ours, padded, rtol=1e-5, atol=1e-6)


def test_a_fresh_head_values_everything_at_zero_in_any_dtype(tiny_model: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        of_tokens, end = values(ValueModel(load_policy(tiny_model, dtype)), [10, 11, 20, 21], num_prompt=2)
        assert of_tokens.dtype == torch.float32 and not of_tokens.any() and end == 0.0


def test_values_are_finer_than_bfloat16(tiny_model: Path) -> None:
    """Around 1 its neighbours are 1/128 apart: a bias of 1 and a small weight would give a few values only."""
    model = ValueModel(load_policy(tiny_model, torch.bfloat16))
    with torch.no_grad():
        model.head.weight.normal_(std=1e-4, generator=torch.Generator().manual_seed(0))
        model.head.bias.fill_(1.0)
    of_tokens, _ = values(model, list(range(10, 40)), num_prompt=2)
    assert len(of_tokens.unique()) > 20 and (of_tokens - 1).abs().max() < 1 / 128
