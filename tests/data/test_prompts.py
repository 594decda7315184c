"""Prompts by ordinal: made from their rows on access, in an order that seed and data fix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlpost.data.prompts import MixedPrompts, Prompts, ShuffledPrompts
from rlpost.data.sources import load_dataset_prompts
from rlpost.types import Prompt
from tests.data.test_sources import ByteTokenizer, math_data, write_jsonl

PROMPTS = [Prompt(id=str(i), token_ids=(i,), task="math", reference={}) for i in range(5)]

LETTERS = [Prompt(id=c, token_ids=(9,), task="code", reference={}) for c in "abc"]


def shuffled(prompts: list[Prompt] = PROMPTS, seed: int = 3) -> ShuffledPrompts:
    return ShuffledPrompts(Prompts.listed(prompts), seed=seed)


def test_every_epoch_holds_each_prompt_once_in_an_order_of_its_own() -> None:
    source = shuffled()
    epochs = [[source[5 * e + i].id for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [shuffled()[i].id for i in (17, 2, 11)] == [epochs[3][2], epochs[0][2], epochs[2][1]]


def test_the_order_of_a_seed_is_the_one_it_has_always_been() -> None:
    """A change here breaks every resume: runs that were begun go on in another order."""
    source = shuffled()
    assert ["".join(source[5 * e + i].id for i in range(5)) for e in range(3)] == ["04132", "02134", "40312"]


def test_the_fingerprint_changes_with_data_order_and_what_is_left_out() -> None:
    listed = Prompts.listed(PROMPTS)
    rejected = [listed.without(np.arange(5) == i, "no") for i in (1, 2)]
    prints = [
        shuffled().fingerprint,
        shuffled(seed=4).fingerprint,
        shuffled(PROMPTS[:4]).fingerprint,
        shuffled([*PROMPTS[1:], PROMPTS[0]]).fingerprint,
        *(ShuffledPrompts(prompts, seed=3).fingerprint for prompts in rejected),
    ]
    assert len(set(prints)) == len(prints) and shuffled().fingerprint == prints[0]
    assert [p.id for p in rejected[0]] == list("0234") and rejected[0].left_out == {"no": 1}


def test_a_prompt_made_on_access_is_the_one_that_was_checked(tmp_path: Path) -> None:
    """Row 1 is too long, so prompt 1 is row 2; a problem is the same one under any template and tokenizer."""
    rows = [{"question": q, "answer": a} for q, a in (("1+1?", "2"), ("x" * 50, "3"), ("1+2?", "3"), ("1+3?", "4"))]
    config = math_data(write_jsonl(tmp_path / "d.jsonl", rows), max_prompt_tokens=30, max_prompts=2)
    prompts = load_dataset_prompts(config, ByteTokenizer())
    assert [p.id for p in prompts] == [prompts[0].id, prompts[1].id] == ["d.jsonl/0", "d.jsonl/2"]
    assert (bytes(prompts[1].token_ids), prompts[1].reference) == (b"Q: 1+2?\n", {"answer": "3"})
    assert prompts.left_out == {"prompt_too_long": 1}
    assert prompts.fingerprint == load_dataset_prompts(config, ByteTokenizer()).fingerprint
    chat = load_dataset_prompts(config.model_copy(update={"chat": True}), ByteTokenizer())
    assert chat.fingerprint != prompts.fingerprint and [p.problem for p in chat] == [p.problem for p in prompts]
    assert len({p.problem for p in prompts}) == 2 and [int(p.problem or "", 16) for p in chat] == list(chat.problems_P)


def test_a_mix_holds_its_shares_in_every_beginning_and_each_source_in_its_own_order() -> None:
    def mixed() -> MixedPrompts:
        return MixedPrompts([shuffled(PROMPTS), shuffled(LETTERS)], [0.7, 0.3])

    ids = [mixed()[0].id, *(p.id for p in map(mixed().__getitem__, range(1, 200)))]
    for end in range(1, 201):
        assert abs(sum(i.isdigit() for i in ids[:end]) - 0.7 * end) < 1
    assert [i for i in ids if i.isdigit()] == [shuffled(PROMPTS)[n].id for n in range(140)]
    assert [i for i in ids if i.isalpha()] == [shuffled(LETTERS)[n].id for n in range(60)]
    assert mixed()[133].id == ids[133], "whatever was asked for before"
    other = MixedPrompts([shuffled(PROMPTS), shuffled(LETTERS)], [0.6, 0.4])
    assert mixed().fingerprint == mixed().fingerprint != other.fingerprint


def retiring() -> ShuffledPrompts:
    return ShuffledPrompts(Prompts.listed(PROMPTS), seed=3, retire_above=0.75)


def test_who_has_become_easy_leaves_when_the_next_epoch_begins() -> None:
    """Epoch 0 is 0 4 1 3 2; then 4 and 2 are too easy, 1 is at the limit, and 0 is so only until it is judged again."""
    source, plain = retiring(), shuffled()
    assert source[3].id == "3"
    source.observe(1, 0.76)
    source.observe(2, 0.75)
    source.observe(0, 1.0)
    source.observe(0, 0.5)
    source.observe(4, 1.0)
    assert len(source) == 5 and [source[i].id for i in range(5)] == list("04132"), "the epoch under way stays as it is"
    rest = [source[i].id for i in range(5, 8)]
    assert rest == [p.id for p in map(plain.__getitem__, range(5, 10)) if p.id in "013"] and len(source) == 3
    source.observe(5 + rest.index("1"), 1.0)
    assert sorted(source[i].id for i in (8, 9)) == ["0", "3"] and source[3].id == "3" and source[11].id in "03"
    source.observe(10, 1.0)
    source.observe(4, 1.0)  # late, and gone already: one of two leaves
    assert source[12].id == source[11].id and len(source) == 1
    source.observe(12, 1.0)
    with pytest.raises(RuntimeError, match=r"every prompt that is left .* retire_above = 0.75"):
        source[13]


def test_a_source_that_is_restored_goes_on_as_the_one_that_was_saved() -> None:
    """Also for ordinals of the epoch before, and with what had become easy of the epoch under way."""
    whole = MixedPrompts([retiring(), retiring()], [0.5, 0.5])
    whole.observe(2, 1.0)
    assert whole[13].id and whole[10].id and len(whole) == 9
    whole.observe(11, 1.0)
    state = json.loads(json.dumps(whole.state))
    resumed = MixedPrompts([retiring(), retiring()], [0.5, 0.5])
    resumed.restore(state)
    assert [resumed[i].id for i in range(30)] == [whole[i].id for i in range(30)] and len(resumed) == len(whole) == 8
