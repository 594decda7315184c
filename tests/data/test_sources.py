"""What becomes of rows, and data that is refused at the door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlpost.config import DatasetData, GeneratedData, RecipeError, VerifierConfig
from rlpost.data.prompts import Prompts
from rlpost.data.sources import check_golds, load_dataset_prompts, load_generated
from rlpost.types import Prompt


class ByteTokenizer:
    eos_token_id: int | None = 0
    bos_token_id: int | None = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> list[int]:
        return list(f"<user>{conversation[0]['content']}<assistant>".encode())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def math_data(path: Path, **changes: Any) -> DatasetData:
    fields = {"source": "dataset", "path": str(path), "task": "math", "prompt": "Q: {question}\n", "answer": "answer"}
    return DatasetData(**(fields | changes))  # type: ignore[arg-type]


def test_columns_become_prompt_and_reference(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "1+1? {x}", "answer": "thus #### 2", "id": "a"}])
    (prompt,) = load_dataset_prompts(math_data(path, answer_after="####"), ByteTokenizer())
    assert bytes(prompt.token_ids) == b"Q: 1+1? {x}\n" and prompt.reference == {"answer": "2"} and prompt.id == "a"
    (chat,) = load_dataset_prompts(math_data(path, chat=True), ByteTokenizer())
    assert bytes(chat.token_ids).startswith(b"<user>Q: 1+1?")


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no data file at .*none.jsonl"):
        load_dataset_prompts(math_data(tmp_path / "none.jsonl"), ByteTokenizer())
    path = write_jsonl(tmp_path / "d.jsonl", [{"problem": "1+1?", "answer": "2"}])
    with pytest.raises(RecipeError, match=r"no column \['question'\]; it has \['answer', 'problem'\]"):
        load_dataset_prompts(math_data(path), ByteTokenizer())


def test_files_that_cannot_be_read_and_values_that_are_missing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("")
    with pytest.raises(RecipeError, match=r"d.jsonl has no rows"):
        load_dataset_prompts(math_data(path), ByteTokenizer())
    path.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+2?",\n')
    with pytest.raises(RecipeError, match=r"d.jsonl could not be read: .*JSON"):
        load_dataset_prompts(math_data(path), ByteTokenizer())
    write_jsonl(path, [{"question": "1+1?", "answer": "2"}, {"question": None, "answer": None}])
    with pytest.raises(RecipeError, match=r"d.jsonl, row 1 has no value in \['answer', 'question'\]"):
        load_dataset_prompts(math_data(path), ByteTokenizer())


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "x" * n, "answer": "2"} for n in (5, 50)])
    assert len(load_dataset_prompts(math_data(path, max_prompt_tokens=20), ByteTokenizer())) == 1
    with pytest.raises(RecipeError, match=r"'prompt_too_long': 2}. max_prompt_tokens = 3"):
        load_dataset_prompts(math_data(path, max_prompt_tokens=3), ByteTokenizer())


def code_prompt(solution: str) -> Prompt:
    reference = {"tests": ["assert f(2) == 4"], "setup": "", "entry_point": "f", "reference_solution": solution}
    return Prompt(id=solution[:20], token_ids=(1,), task="code", reference=reference)


def test_golds_their_own_verifier_rejects_are_refused_or_left_out_as_the_recipe_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In batches of two: the third prompt's verdict must reach the third."""
    monkeypatch.setattr("rlpost.data.sources.GOLDS_AT_ONCE", 2)
    good, bad = code_prompt("def f(x):\n    return 2 * x"), code_prompt("def f(x):\n    return x")
    prompts = Prompts.listed([good, good, bad])
    with pytest.raises(RecipeError, match=r"1 of 3 gold answers are rejected by their own verifier \(def f"):
        check_golds(prompts, max_rejected=0.3, verifier=VerifierConfig())
    checked = check_golds(prompts, max_rejected=0.34, verifier=VerifierConfig())
    assert list(checked) == [good, good] and checked.left_out == {"gold_rejected": 1}


def test_generated_prompts_are_distinct_and_families_take_turns() -> None:
    data = GeneratedData(source="generated", families=("arithmetic", "functions"), num_prompts=200)
    prompts = load_generated(data, ByteTokenizer(), seed=1)
    assert len({p.id for p in prompts}) == 200
    assert [p.task for p in prompts[:4]] == ["math", "code", "math", "code"]
    assert all(p.demonstration_ids and p.demonstration_ids[-1] == 0 for p in prompts)
    with pytest.raises(RecipeError, match="choose from"):
        load_generated(GeneratedData(source="generated", families=("poetry",)), ByteTokenizer(), seed=1)


@pytest.mark.data
def test_every_gold_of_gsm8k_and_mbpp_is_accepted_by_its_own_verifier(data_dir: Path) -> None:
    gsm8k = math_data(data_dir / "gsm8k_test.jsonl.gz", prompt="{problem}")
    prompts = load_dataset_prompts(gsm8k, ByteTokenizer())
    assert len(check_golds(prompts, max_rejected=0.0, verifier=VerifierConfig())) == 1319
    mbpp = DatasetData(
        source="dataset",
        path=str(data_dir / "mbpp_sanitized.jsonl.gz"),
        task="code",
        prompt="{prompt}",
        tests="tests",
        setup="setup",
        solution="reference_solution",
        max_prompts=100,
    )
    prompts = load_dataset_prompts(mbpp, ByteTokenizer())
    assert len(check_golds(prompts, max_rejected=0.0, verifier=VerifierConfig())) == 100
