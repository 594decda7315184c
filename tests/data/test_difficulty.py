"""Which problems a stage keeps, by the samples that were drawn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlpost.config import KeepConfig, RecipeError
from rlpost.data.difficulty import keep
from rlpost.data.prompts import Prompts
from rlpost.data.sources import load_dataset_prompts
from tests.data.test_sources import ByteTokenizer, math_data, write_jsonl

RIGHT_OF_16 = (0, 1, 6, 7, 16)


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    rows = [{"question": f"{i}+1?", "answer": i + 1, "id": f"p{i}"} for i in range(len(RIGHT_OF_16))]
    return load_dataset_prompts(math_data(write_jsonl(tmp_path / "d.jsonl", rows)), ByteTokenizer())


def samples_of(prompts: Prompts, model: str = "m") -> list[dict[str, Any]]:
    """Problem i has RIGHT_OF_16[i] right samples; of the wrong ones a third each says 7, says 8, and says nothing. Its
    responses have 100 i tokens."""
    return [
        {
            "model": model,
            "prompt_id": prompt.id,
            "problem": prompt.problem,
            "number": number,
            "fingerprint": f"{model}/{prompt.id}",
            "outcome": "correct" if number < right else "wrong",
            "answer": "right" if number < right else ("7", "8", None)[number % 3],
            "num_tokens": 100 * index,
        }
        for index, (prompt, right) in enumerate(zip(prompts, RIGHT_OF_16, strict=True))
        for number in range(16)
    ]


def kept(prompts: Prompts, rows: list[dict[str, Any]], path: Path, **window: Any) -> Prompts:
    samples = write_jsonl(path / "samples.jsonl", rows)
    return keep(prompts, KeepConfig(samples=str(samples), **window), stage="hard", data="math")


@pytest.mark.parametrize(
    ("window", "ids", "left_out"),
    [
        ({"solved": (0, 6 / 16)}, "p0 p1 p2", {"solved_too_often": 2}),
        ({"solved": (1 / 16, 0.4)}, "p1 p2", {"solved_too_often": 2, "solved_too_seldom": 1}),
        ({"tokens": (200, 300)}, "p2 p3", {"responses_too_short": 2, "responses_too_long": 1}),
        # Of 16 samples of which 6 are right, the wrong ones vote 4 : 3; 7 right, 3 : 3; 1 right, 5 : 5.
        ({"majority": True}, "p2 p3 p4", {"majority_wrong": 2}),
    ],
)
def test_a_window_keeps_what_lies_in_it_ends_included(
    prompts: Prompts, tmp_path: Path, window: Any, ids: str, left_out: dict[str, int]
) -> None:
    found = kept(prompts, samples_of(prompts), tmp_path, **window)
    assert " ".join(p.id for p in found) == ids and found.left_out == left_out
    assert found.fingerprint != prompts.fingerprint


def test_an_answer_that_as_many_samples_give_is_no_majority(prompts: Prompts, tmp_path: Path) -> None:
    rows = samples_of(prompts)
    for row in rows:
        if row["prompt_id"] == "p2" and row["outcome"] != "correct":
            row["answer"] = "7" if row["number"] < 12 else None  # 6 of 10
    assert "p2" not in [p.id for p in kept(prompts, rows, tmp_path, majority=True)]


def test_the_model_is_named_where_there_are_several(prompts: Prompts, tmp_path: Path) -> None:
    other = [row | {"outcome": "wrong"} for row in samples_of(prompts, "other")]
    rows = samples_of(prompts) + other
    assert len(kept(prompts, rows, tmp_path, model="m", solved=(1, 1))) == 1
    with pytest.raises(RecipeError, match=r"samples of \['m', 'other'\]: name one with keep.model"):
        kept(prompts, rows, tmp_path)
    with pytest.raises(RecipeError, match=r"no samples of keep.model = 'o'; it has \['m', 'other'\]"):
        kept(prompts, rows, tmp_path, model="o")
    with pytest.raises(RecipeError, match=r"no prompt of data 'math' is kept; .*'solved_too_seldom': 5.*keep.solved"):
        kept(prompts, rows, tmp_path, model="other", solved=(0.5, 1))


def test_samples_that_do_not_answer_for_the_data_are_refused_with_what_would(prompts: Prompts, tmp_path: Path) -> None:
    rows = samples_of(prompts)
    with pytest.raises(RecipeError, match=r"'hard': 1 of 5 .* 'math' have no samples in .*num_prompts = 5.*-o /"):
        kept(prompts, rows[16:], tmp_path)
    changed = [row | {"problem": "0"} if row["prompt_id"] == "p1" else row for row in rows]
    with pytest.raises(RecipeError, match=r"those of 'p1' are of another text or reference"):
        kept(prompts, changed, tmp_path)
    with pytest.raises(RecipeError, match=r"samples of 'p4' by other weights of 'm', or under another temperature"):
        kept(prompts, [*rows, rows[-1] | {"fingerprint": "?"}], tmp_path)
    with pytest.raises(RecipeError, match=r"line 1 is no sample with the digest of its problem"):
        kept(prompts, [{"answer": "7"}], tmp_path)
    with pytest.raises(RecipeError, match=r"no file at .*nowhere"):
        keep(prompts, KeepConfig(samples="nowhere"), stage="hard", data="math")
