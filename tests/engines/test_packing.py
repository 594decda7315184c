"""Rows laid end to end: where everything goes, and that no row sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlpost.engines import packing as packing_module
from rlpost.engines.forward import Scorer, load_policy
from rlpost.engines.packing import (
    PACKED_ATTENTION,
    SHORTEST_SHARE,
    Packing,
    check_rows_are_alone,
    packed_hidden_states,
)


def test_a_packing_by_hand() -> None:
    """Rows of 2, 4 and 3 tokens, padded to 4: the second first, then the third with it, the first in a bucket of its own."""
    packing = Packing.of(torch.tensor([2, 4, 3]), 4)
    assert packing.starts_B.tolist() == [7, 0, 4]
    assert packing.order_N.tolist() == [4, 5, 6, 7, 8, 9, 10, 0, 1]
    assert packing.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    first, second = packing.buckets
    assert first.index_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 6]]
    assert first.tokens_N.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (second.index_BT.tolist(), second.tokens_N.tolist()) == ([[7, 8]], [0, 1])


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40))
@settings(deadline=None)
def test_buckets_hold_every_token_once_and_little_else(lengths: list[int]) -> None:
    packing = Packing.of(torch.tensor(lengths), max(lengths))
    kept = torch.cat([bucket.index_BT.flatten()[bucket.tokens_N] for bucket in packing.buckets])
    assert kept.tolist() == list(range(sum(lengths)))
    for bucket in packing.buckets:
        assert len(bucket.tokens_N) >= SHORTEST_SHARE * bucket.index_BT.numel()


def rows_of(lengths: list[int], vocab: int) -> tuple[Tensor, Tensor]:
    """Rows of random tokens, padded with others."""
    generator = torch.Generator().manual_seed(len(lengths))
    return torch.randint(0, vocab, (len(lengths), max(lengths)), generator=generator), torch.tensor(lengths)


LENGTHS = [5, 31, 2, 17, 30, 8, 31]


@pytest.mark.parametrize("family", ["grouped queries", "sliding window"])
def test_log_probs_and_gradients_are_those_of_rows_scored_alone_by_transformers(family: str, tmp_path: Path) -> None:
    """Against the library's own eager attention, row by row, without padding, each at a temperature of its own: nothing of
    ours but the scoring."""
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if family == "grouped queries":
        Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tmp_path)
    else:
        MistralForCausalLM(
            MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, sliding_window=6)
        ).save_pretrained(tmp_path)
    scorer = Scorer(load_policy(tmp_path, torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    token_ids_BT, lengths_B = rows_of(LENGTHS, 96)
    mask_BT = torch.arange(token_ids_BT.shape[1]) < lengths_B[:, None]
    mask_BT[:, 0] = False
    temperatures_B = torch.linspace(0.7, 1.3, len(LENGTHS))
    ours_BT = scorer(token_ids_BT, lengths_B, mask_BT, temperatures_B)[0]
    ours_BT.sum().backward()
    for row, length in enumerate(LENGTHS):
        ids = token_ids_BT[row, :length]
        table = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1] / temperatures_B[row], -1)
        logprobs = table.gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(ours_BT[row, 1:length], logprobs, rtol=1e-5, atol=1e-5)
        logprobs.sum().backward()
    for (name, ours), theirs in zip(scorer.policy.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


@torch.no_grad()
def test_no_row_sees_another(tiny_model: Path) -> None:
    """Every other row's tokens replaced: not a bit of this one's hidden states changes."""
    policy = load_policy(tiny_model, torch.float32)
    token_ids_BT, lengths_B = rows_of(LENGTHS, 96)
    packing = Packing.of(lengths_B, token_ids_BT.shape[1])
    before = packed_hidden_states(policy.base_model, token_ids_BT, packing)
    for row, length in enumerate(LENGTHS):
        others = token_ids_BT.flip(-1) ^ 1
        others[row] = token_ids_BT[row]
        after = packed_hidden_states(policy.base_model, others, packing)
        own = slice(int(packing.starts_B[row]), int(packing.starts_B[row]) + length)
        assert torch.equal(before[own], after[own])
        assert not torch.equal(before, after)


def test_a_model_in_which_packed_rows_see_each_other_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that loses the packing on its way to attention."""
    policy = load_policy(tiny_model, torch.float32)
    check_rows_are_alone(policy)
    attend = packing_module._attention

    def forgetful(module: nn.Module, *args: object, packing: Packing, **kwargs: object) -> object:
        return attend(module, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setitem(packing_module.AttentionInterface._global_mapping, PACKED_ATTENTION, forgetful)
    with pytest.raises(ValueError, match="see each other"):
        check_rows_are_alone(policy)


def test_attention_with_more_than_it_can_do_is_refused() -> None:
    heads = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="attention with s_aux"):
        packing_module._attention(nn.Identity(), heads, heads, heads, None, s_aux=torch.zeros(1))
