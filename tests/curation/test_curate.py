"""A curation through the real command's functions: what goes in, what is left out and why, and what a recipe then reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

from rlpost.config import DatasetData, RecipeError
from rlpost.curation.plan import load_curation
from rlpost.curation.run import curate
from rlpost.data.sources import load_dataset_prompts
from tests.data.test_sources import ByteTokenizer, write_jsonl

RECIPES = Path(__file__).parents[2] / "recipes" / "data"
STORY = (
    "A farmer has {} cows and sells three of them to his neighbour, who pays {} coins for each cow and keeps all of them until"
    " the next summer, when both go to the market of the town together and find out that nobody buys any cows there; "
)
MATH = {
    "kept": (STORY.format(12, 40) + "how many coins does the farmer get in the end?", "120"),
    "copy": (STORY.format(12, 40).upper() + "how  many coins does the farmer get in the end?", "7"),
    "near": (STORY.format(12, 40) + "how many coins does the farmer get altogether?", "120"),
    "variant": (STORY.format(12, 40) + "how many cows does the farmer have in the end?", "9"),
    "contaminated": ("Long ago there was a king, and one day a ship sails north for six hours at nine knots.", "54"),
    "parts": ("Let $f(x) = x^2$. (a) Find $f(2)$. (b) Find $f(3)$.", "4, 9"),
    "empty": ("What is the sum of the first nine odd numbers?", None),
    "unusable": ("What is the sum of the first eight odd numbers?", "}64{"),
    "other": ("What is the sum of the first seven odd numbers?", "\\frac{98}{2}"),
}
EVALUATION = "A ship sails north for six hours at nine knots. How far does it get?"


def curated(tmp_path: Path, text: str, *overrides: str) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Directory, card, and what was left out by id."""
    (tmp_path / "curation.toml").write_text(text)
    output = tmp_path / "out"
    assert curate(load_curation(tmp_path / "curation.toml", overrides), output, Console(quiet=True)) == 0
    lines = [json.loads(line) for line in (output / "left_out.jsonl").read_text().splitlines()]
    return output, json.loads((output / "card.json").read_text()), {line["id"]: line for line in lines}


def math_toml(tmp_path: Path) -> str:
    rows = [{"id": name, "problem": problem, "answer": answer} for name, (problem, answer) in MATH.items()]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    again = write_jsonl(tmp_path / "again.jsonl", rows[:1])
    evaluation = write_jsonl(tmp_path / "evaluation.jsonl", [{"task_id": "q1", "text": EVALUATION}])
    source = 'path = "{}"\nprompt = "{{problem}}"\nanswer = "answer"\n'
    return (
        f'name = "small"\ntask = "math"\n[source.a]\n{source.format(first)}[source.b]\n{source.format(again)}'
        f'[against.ships]\npath = "{evaluation}"\nprompt = "{{text}}"\n'
    )


def test_every_math_problem_is_kept_or_left_out_with_its_reason(tmp_path: Path) -> None:
    output, card, left_out = curated(tmp_path, math_toml(tmp_path))
    assert {name: line["filter"] for name, line in left_out.items()} == {
        "a/parts": "multi_part",
        "a/empty": "empty",
        "a/contaminated": "contaminated",
        "a/copy": "same_text",
        "b/kept": "same_text",
        "a/near": "near_duplicate",
        "a/unusable": "unusable",
    }
    assert left_out["a/contaminated"]["detail"] == "ships/q1: a ship sails north for six hours at nine"
    assert left_out["a/near"]["detail"].startswith("a/kept: ") and left_out["b/kept"]["detail"] == "a/kept"
    data = DatasetData(
        source="dataset", path=str(output / "data.parquet"), task="math", prompt="{problem}", answer="answer"
    )
    prompts = load_dataset_prompts(data, ByteTokenizer())
    assert [(p.id, p.reference["answer"]) for p in prompts] == [
        ("a/kept", "120"), ("a/variant", "9"), ("a/other", "\\frac{98}{2}"),
    ]  # fmt: skip
    assert bytes(prompts[0].token_ids).decode() == MATH["kept"][0]
    for source in ("a", "b"):
        taken = sum(item["left_out"][source] for item in card["filters"])
        assert card["rows"][source] == taken + card["kept"][source]
    assert sum(card["words"].values()) == 3
    text = (output / "card.md").read_text()
    assert "| near_duplicate | 1 | 0 | 1 |" in text and "a ship sails north" in text


def test_adapters_name_columns_and_their_reasons_are_kept(tmp_path: Path) -> None:
    valid = {"problem_is_valid": "Yes", "solution_is_valid": "Yes", "question_type": "math-word-problem"}
    rows = [
        {"problem": "What is the sum of the first seven odd numbers?", "answer": "49", **valid},
        {"problem": "What is the sum of the first eight odd numbers?", "answer": "notfound", **valid},
        {"problem": EVALUATION, "answer": "54", **valid},
    ]
    path, against = (
        write_jsonl(tmp_path / "n.jsonl", rows),
        write_jsonl(tmp_path / "m.jsonl", [{"problem": EVALUATION}]),
    )
    toml = (
        f'name = "small"\ntask = "math"\n[source.n]\nadapter = "numinamath"\npath = "{path}"\nprompt = "{{problem}}"\n'
        f'[against.m]\nadapter = "math500"\npath = "{against}"\nprompt = "{{problem}}"\n'
    )
    _, card, left_out = curated(tmp_path, toml)
    assert {name: (line["filter"], line["detail"][:10]) for name, line in left_out.items()} == {
        "n/1": ("empty", "without: n"), "n/2": ("contaminated", "m/0: a shi"),
    }  # fmt: skip
    assert left_out["n/1"]["detail"] == "without: no_answer" and card["kept"] == {"n": 1}


def test_filters_that_are_skipped_take_nothing(tmp_path: Path) -> None:
    skip = 'filters.skip=["multi_part","contaminated","same_text","near_duplicate"]'
    _, card, left_out = curated(tmp_path, math_toml(tmp_path), skip)
    assert set(left_out) == {"a/empty", "a/unusable"}
    assert not {"multi_part", "contaminated"} & {item["name"] for item in card["filters"]}


DOUBLED = "def double(x):\n    if x < 0:\n        return -1\n    return x + x"
CODE = {
    "strong": (
        "Double a number.",
        DOUBLED,
        [f"assert double({x}) == {y}" for x, y in ((-1, -1), (0, 0), (7, 14))],
        "u/1",
    ),
    "weak": ("Give back the double of any number.", DOUBLED, ["assert double(0) == 0"], "u/2"),
    "wrong": ("Give twice a number.", "def double(x):\n    return x", ["assert double(2) == 4"], "u/3"),
    "bare": ("Make it twice the number.", None, ["assert double(2) == 4"], "u/4"),
    "moved": ("Double the number that is given.", DOUBLED, ["assert double(2) == 4"], "u/1"),
}


def test_code_needs_a_solution_that_passes_and_tests_that_notice_mistakes(tmp_path: Path) -> None:
    """double(0) == 0 alone holds for x - x, for a constant 0, and whatever the first branch does. The other tests stand at the
    bound on both sides, and leave none of the mutants alive."""
    rows = [
        {"id": name, "text": text, "code": code, "test_list": tests, "link": link}
        for name, (text, code, tests, link) in CODE.items()
    ]
    path = write_jsonl(tmp_path / "code.jsonl", rows)
    toml = (
        f'name = "small"\ntask = "code"\n[source.a]\npath = "{path}"\nprompt = "{{text}}"\ntests = "test_list"\n'
        'solution = "code"\nurl = "link"\n'
    )
    output, card, left_out = curated(tmp_path, toml)
    assert {name: line["filter"] for name, line in left_out.items()} == {
        "a/weak": "weak_tests", "a/wrong": "wrong_gold", "a/bare": "no_solution", "a/moved": "same_url",
    }  # fmt: skip
    assert " mutants pass (" in left_out["a/weak"]["detail"] and card["mutants"]["problems"] == "2"
    (kept,) = pyarrow.parquet.read_table(output / "data.parquet").to_pylist()
    assert kept["id"] == "a/strong" and kept["mutants"] > 8 and kept["survivors"] == 0
    assert kept["tests"] == CODE["strong"][2] and kept["entry_point"] == "double" and kept["solution"] == DOUBLED


def test_scripts_keep_their_inputs_and_outputs_and_are_curated_apart_from_functions(tmp_path: Path) -> None:
    """Seven mutants: n + 2, - 1, 3 n, 1 n, + 2, + 0, and no print."""
    script: dict[str, Any] = {
        "text": "Print twice a number and one more.",
        "code": "n = int(input())\nprint(n * 2 + 1)",
    }
    script["tests"] = [{"input": f"{n}\n", "output": f"{2 * n + 1}\n"} for n in (0, 3, -2)]
    scripts = write_jsonl(tmp_path / "scripts.jsonl", [script])
    functions = write_jsonl(tmp_path / "functions.jsonl", [script | {"tests": ["assert f(2) == 4"]}])
    source = 'path = "{}"\nprompt = "{{text}}"\ntests = "tests"\nsolution = "code"\n'
    toml = f'name = "small"\ntask = "code"\n[source.a]\n{source.format(scripts)}'
    with pytest.raises(RecipeError, match=r"source \['a'\] has tests of inputs .* \['b'\] has snippets"):
        curated(tmp_path, f"{toml}[source.b]\n{source.format(functions)}")
    output, _, left_out = curated(tmp_path, toml)
    (kept,) = pyarrow.parquet.read_table(output / "data.parquet").to_pylist()
    assert not left_out and kept["tests"] == script["tests"] and kept["entry_point"] is None
    assert (kept["mutants"], kept["survivors"]) == (7, 0)


def test_what_has_no_meaning_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    text = math_toml(tmp_path)
    for override, message in (
        ("filters.ngrams=9", r"filters.ngrams: no such key; did you mean 'ngram'\?"),
        ('filters.skip=["prove"]', r"filters.skip names \['prove'\]"),
        ('filters.skip=["unusable"]', r"filters.skip names .*can be skipped: \['too_short'"),
        ("filters.mutants=3", "filters: mutants has no meaning for task = 'math'"),
        ("source.a.chat=true", "chat: no policy reads these prompts yet"),
        ("source.a.task=code", "source.a.*tests"),
        ("source.b.answr=x", r"source.b.answr: no such key; did you mean 'answer'\?"),
        ("source.b.answer=gold", r"source.b: .*no column \['gold'\]"),
        ("against.ships.prompt='{words}'", r"against.ships: .*no column \['words'\]"),
    ):
        with pytest.raises(RecipeError, match=message):
            curated(tmp_path, text, override)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="exists"):
        curated(tmp_path, text)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_curation_that_ships_is_valid(path: Path) -> None:
    config = load_curation(path)
    assert config.name == path.stem and config.source and config.against
