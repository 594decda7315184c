"""Preference pairs: what becomes of a row, and which rows are left out, by reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlpost.config import PairData, RecipeError
from rlpost.data.pairs import load_pairs
from rlpost.data.prompts import Prompts
from tests.data.test_sources import ByteTokenizer, write_jsonl

BOS, EOS = "\x01", "\x00"


def pair_data(path: Path, **changes: Any) -> PairData:
    fields = {"source": "pairs", "path": str(path), "prompt": "{prompt}", "chosen": "chosen", "rejected": "rejected"}
    return PairData(**(fields | changes))  # type: ignore[arg-type]


def row(prompt: str = "p", chosen: str = "good", rejected: str = "bad") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_row_becomes_a_prompt_with_two_responses_that_end(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row()])
    (prompt,), left_out = load_pairs(pair_data(path), ByteTokenizer(), max_response_tokens=9)
    assert bytes(prompt.token_ids) == b"p" and not left_out
    assert (bytes(prompt.demonstration_ids or ()), bytes(prompt.rejected_ids or ())) == (b"good\0", b"bad\0")


def test_what_teaches_nothing_or_the_wrong_thing_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        row(),
        row(chosen=""),
        row(rejected="  "),
        row(chosen="same", rejected="same"),
        row(chosen="x" * 9),  # and its end token: 10
        row(rejected="x" * 8),  # 9 with its end token: the longest allowed
        row(prompt="x" * 7),
    ]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    config = pair_data(path, max_prompt_tokens=6)
    prompts, left_out = load_pairs(config, ByteTokenizer(), max_response_tokens=9)
    assert [p.id for p in prompts] == ["d.jsonl/0", "d.jsonl/5"]
    assert left_out == {"empty_response": 2, "equal_responses": 1, "response_too_long": 1, "prompt_too_long": 1}


def test_when_nothing_is_left_the_reasons_and_the_remedy_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row(chosen="x" * 50)] * 3)
    with pytest.raises(RecipeError, match=r"'response_too_long': 3.*max_response_tokens = 9"):
        load_pairs(pair_data(path), ByteTokenizer(), max_response_tokens=9)


def test_an_end_token_that_the_text_spells_out_is_not_doubled(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row(chosen="good" + EOS)])
    (prompt,), _ = load_pairs(pair_data(path), ByteTokenizer(), max_response_tokens=9)
    assert bytes(prompt.demonstration_ids or ()) == b"good\0"


def test_a_prompt_that_begins_twice_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row(prompt=BOS + BOS + "p")])
    with pytest.raises(RecipeError, match="two start tokens"):
        load_pairs(pair_data(path), ByteTokenizer(), max_response_tokens=9)


def test_a_missing_column_is_refused_by_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row()])
    with pytest.raises(RecipeError, match=r"no column \['better'\]; it has \['chosen', 'prompt', 'rejected'\]"):
        load_pairs(pair_data(path, chosen="better"), ByteTokenizer(), max_response_tokens=9)


def test_other_responses_are_other_data(tmp_path: Path) -> None:
    prints = set()
    for rejected in ("bad", "worse"):
        path = write_jsonl(tmp_path / "d.jsonl", [row(rejected=rejected)])
        prompts, _ = load_pairs(pair_data(path), ByteTokenizer(), max_response_tokens=9)
        prints.add(Prompts.listed(prompts).fingerprint)
    assert len(prints) == 2


@pytest.mark.data
def test_real_pairs(data_dir: Path) -> None:
    """300 pairs; those of more than 1,500 bytes are counted."""
    path = data_dir / "preference_dpo_en_demo.jsonl.gz"
    config = pair_data(path, max_prompt_tokens=10_000)
    prompts, left_out = load_pairs(config, ByteTokenizer(), max_response_tokens=1500)
    assert 50 < len(prompts) < 300 and len(prompts) + sum(left_out.values()) == 300
