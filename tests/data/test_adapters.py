"""Adapters: rows as each data set has them, and what the real verifier says of the prompts that come of them.

A row here is made by hand in the documented shape; where real rows lie in the data folder, they are put in that shape.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward import Outcome, RewardPool, gold_response
from rlpost.config import DatasetData, PairData, RecipeError, VerifierConfig
from rlpost.data.adapters import ADAPTERS
from rlpost.data.pairs import load_pairs
from rlpost.data.prompts import Prompts
from rlpost.data.sources import AdaptedRows, check_golds, load_dataset_prompts, read_rows
from rlpost.types import Prompt
from tests.data.test_sources import ByteTokenizer, write_jsonl
from tests.reward.test_contests import SCRIPTS
from tests.reward.test_golds import read

DOUBLE = "def double(x):\n    return 2 * x"
ADD_SCRIPT = "a, b = map(int, input().split())\nprint(a + b)"
STARTER = "class Solution:\n    def addUp(self, nums: List[int], k: int) -> List[int]:\n        "
METHOD = f"{STARTER}return [n + k for n in nums]"


def packed(tests: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


def apps(
    question: str = "Add up.", *, starter: str = "", solutions: Sequence[str] = (), **given: Any
) -> dict[str, Any]:
    row = {"problem_id": 7, "question": question, "difficulty": "interview", "url": "u", "starter_code": starter}
    return row | {"solutions": json.dumps(solutions) if solutions else "", "input_output": json.dumps(given)}


def taco(**changes: Any) -> dict[str, Any]:
    row = apps(solutions=[ADD_SCRIPT], inputs=[["1 2", ""], ["3 4"]], outputs=[["3"], ["7"]])
    return row | {"tags": "['Sorting']", "source": "s", "time_limit": "1.0 seconds"} | changes


def livecodebench(*, private: str, starter: str = "", name: str | None = None, **public: str) -> dict[str, Any]:
    test = public | {"testtype": "functional" if name else "stdin"}
    row = {"question_title": "t", "question_content": "Add up.", "platform": "leetcode", "question_id": "abc301_a"}
    row |= {"contest_date": "2025-01-04T00:00:00", "starter_code": starter, "public_test_cases": json.dumps([test])}
    return row | {"private_test_cases": private, "metadata": json.dumps({"func_name": name} if name else {})}


def code_contests(**changes: Any) -> dict[str, Any]:
    row = {"name": "1_A. Sum", "description": "Add up.", "input_file": "", "output_file": "", "cf_rating": 800}
    row |= {f"{kind}_tests": {"input": [f"{n} 1\n"], "output": [f"{n + 1}\n"]} for n, kind in enumerate(KINDS)}
    return row | {"solutions": {"language": [2, 1, 3], "solution": ["int main;", "print 3", ADD_SCRIPT]}} | changes


KINDS = ("public", "private", "generated")
NUMINA = {"problem_type": "Algebra", "question_type": "math-word-problem", "source": "olympiads", "synthetic": False}
NUMINA |= {
    "problem": "Half of 6?",
    "solution": "3",
    "answer": "3",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
}

# Adapter, row, a right response, a wrong one.
MATH: list[tuple[str, dict[str, Any], str, str]] = [
    ("gsm8k", {"question": "5 and 7?", "answer": "5 + 7 = <<5+7=12>>12\n#### 12"}, "#### 12", r"\boxed{5}"),
    (
        "math",
        {
            "problem": "p",
            "level": "Level 2",
            "type": "Algebra",
            "solution": r"Not \boxed{7}, but $\boxed{\frac{1}{2}}$.",
        },
        r"\boxed{0.5}",
        r"\boxed{7}",
    ),
    ("math500", {"problem": "p", "solution": "", "answer": r"\frac12", "unique_id": "a"}, r"\boxed{1/2}", r"\boxed{2}"),
    ("deepscaler", {"problem": "p", "answer": "(3, 4)", "solution": ""}, r"\boxed{(3,4)}", r"\boxed{(4,3)}"),
    ("acereason_math", {"problem": "p", "answer": "17"}, r"\boxed{17}", r"\boxed{71}"),
    ("numinamath", NUMINA, r"\boxed{3}", r"\boxed{6}"),
    ("aime24", {"id": 60, "problem": "p", "answer": "033", "url": "u", "year": "2024"}, r"\boxed{33}", r"\boxed{3}"),
    ("aime25", {"id": "0", "problem": "p", "answer": "70"}, r"\boxed{70}", r"\boxed{7}"),
    ("amc23", {"id": 0, "question": "p", "answer": 27.0, "url": "u"}, r"\boxed{27}", r"\boxed{28}"),
]
CODE: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "mbpp",
        {
            "task_id": 601,
            "text": "Double it.",
            "code": DOUBLE,
            "test_list": ["assert double(2) == 4", "assert double(three) == 6"],
            "test_setup_code": "three = 3",
            "challenge_test_list": [],
        },
        DOUBLE,
        DOUBLE.replace("2 * x", "x + 2"),
    ),
    (
        "mbpp_sanitized",
        {
            "source_file": "s",
            "task_id": 2,
            "prompt": "Double it.",
            "code": DOUBLE,
            "test_imports": ["import math", "import re"],
            "test_list": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1.0)"],
        },
        DOUBLE,
        DOUBLE.replace("2 * x", "x + 2"),
    ),
    (
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x):\n    """ Twice x. """\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n",
        },
        DOUBLE,
        DOUBLE.replace("2 * x", "4"),
    ),
    ("apps", apps(solutions=[ADD_SCRIPT], inputs=["1 2\n", ["3 4"]], outputs=["3\n", [7]]), ADD_SCRIPT, "print(3)"),
    (
        "apps",  # outputs that each stand in a list
        apps(solutions=[DOUBLE], starter="def double(x):\n\t", fn_name="double", inputs=[[2], [3]], outputs=[[4], [6]]),
        DOUBLE,
        DOUBLE.replace("2 * x", "[2 * x]"),
    ),
    (
        "apps",  # outputs that are lists
        apps(
            solutions=[METHOD], starter=STARTER, fn_name="addUp", inputs=[[[1, 2], 3], [[4], 3]], outputs=[[4, 5], [7]]
        ),
        METHOD,
        METHOD.replace("n + k", "n"),
    ),
    ("taco", taco(), ADD_SCRIPT, "print(3)"),
    ("code_contests", code_contests(), ADD_SCRIPT, "print(int(input()[0]) % 2 + 1)"),
    (
        "livecodebench",
        livecodebench(input="1 2\n", output="3\n", private=packed(json.dumps([{"input": "3 4\n", "output": "7\n"}]))),
        ADD_SCRIPT,
        "print(3)",
    ),
    (
        "livecodebench",
        livecodebench(
            starter=STARTER,
            name="addUp",
            input="[1, 2]\n3",
            output="[4, 5]",
            private=json.dumps([{"input": "[4]\n3", "output": "[7]", "testtype": "functional"}]),
        ),
        METHOD,
        METHOD.replace("n + k", "n + 3 if len(nums) > 1 else n"),
    ),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool() as shared:
        yield shared


def dataset(adapter: str, path: Path, **changes: Any) -> DatasetData:
    return DatasetData(
        **{"source": "dataset", "adapter": adapter, "path": str(path), "max_prompt_tokens": 9999} | changes
    )  # type: ignore[arg-type]


def pairs(adapter: str, path: Path) -> PairData:
    fields = {"source": "pairs", "adapter": adapter, "path": str(path), "max_prompt_tokens": 9999}
    return PairData(**fields)  # type: ignore[arg-type]


def prompts_of(adapter: str, rows: list[dict[str, Any]], folder: Path) -> tuple[list[Prompt], Mapping[str, int]]:
    prompts = load_dataset_prompts(dataset(adapter, write_jsonl(folder / "d.jsonl", rows)), ByteTokenizer())
    return list(prompts), prompts.left_out


def outcomes(pool: RewardPool, prompt: Prompt, *responses: str) -> list[Outcome]:
    return [v.outcome for v in pool.score_many([(prompt.task, r, prompt.reference) for r in responses])]


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


@pytest.mark.parametrize(("adapter", "row", "right", "wrong"), MATH, ids=[case[0] for case in MATH])
def test_a_math_row_is_judged_by_its_answer(
    tmp_path: Path, pool: RewardPool, adapter: str, row: dict[str, Any], right: str, wrong: str
) -> None:
    (prompt,), _ = prompts_of(adapter, [row], tmp_path)
    gold = gold_response("math", prompt.reference)
    assert outcomes(pool, prompt, gold, right, wrong) == [Outcome.CORRECT, Outcome.CORRECT, Outcome.WRONG]
    text = bytes(prompt.token_ids).decode()
    assert text.startswith(row.get("problem") or row["question"]) and text.endswith("in \\boxed{}.")


@pytest.mark.parametrize(("adapter", "row", "right", "wrong"), CODE, ids=[case[0] for case in CODE])
def test_a_code_row_is_judged_by_its_tests(
    tmp_path: Path, pool: RewardPool, adapter: str, row: dict[str, Any], right: str, wrong: str
) -> None:
    (prompt,), _ = prompts_of(adapter, [row], tmp_path)
    assert outcomes(pool, prompt, fenced(right), fenced(wrong)) == [Outcome.CORRECT, Outcome.WRONG]
    if adapter != "livecodebench":  # it has no solutions
        assert outcomes(pool, prompt, gold_response("code", prompt.reference)) == [Outcome.CORRECT]
    text = bytes(prompt.token_ids).decode()
    assert "```python" in text and row.get("starter_code", "") in text


@pytest.mark.parametrize(("adapter", "row"), [case[:2] for case in MATH + CODE], ids=[case[0] for case in MATH + CODE])
def test_an_adapter_reads_and_makes_what_it_says(adapter: str, row: dict[str, Any]) -> None:
    read, made, columns = ADAPTERS[adapter].reads, ADAPTERS[adapter].makes, ADAPTERS[adapter].columns
    assert set(columns({name: row[name] for name in read}) if columns else ()) == set(made)


def test_a_column_that_is_a_list_has_an_item_a_line(tmp_path: Path) -> None:
    (row,) = (row for adapter, row, *_ in CODE if adapter == "mbpp_sanitized")
    (prompt,), _ = prompts_of("mbpp_sanitized", [row], tmp_path)
    assert bytes(prompt.token_ids).decode().endswith("\n" + "\n".join(row["test_list"]))
    assert prompt.reference["setup"] == "import math\nimport re"


def test_all_tests_of_a_problem_are_kept(tmp_path: Path) -> None:
    (prompt,), _ = prompts_of("code_contests", [code_contests()], tmp_path)
    assert [test["input"] for test in prompt.reference["tests"]] == ["0 1\n", "1 1\n", "2 1\n"]
    assert prompt.id == "1_A. Sum"


def test_rows_of_kinds_that_no_prompt_can_be_made_of_are_counted(tmp_path: Path) -> None:
    untested = [apps() | {"input_output": ""}, apps(inputs=[], outputs=[])]
    unusable = [
        apps(inputs=["1" * 1_000_001], outputs=["1"]),
        apps(fn_name="f", inputs=[[1]], outputs=[float("nan")]),
        apps(inputs=["1", "2"], outputs=["1"]),
        apps(inputs=[1], outputs=["1"]),
        apps() | {"input_output": '{"inputs": ['},
        apps(fn_name="f", inputs=[[1]], outputs=[1])
        | {"input_output": f'{{"inputs": [[1]], "outputs": [{"9" * 5000}]}}'},
    ]
    kept = apps(inputs=["1"], outputs=["1"])
    prompts, left_out = prompts_of("apps", [*untested, kept, *unusable], tmp_path)
    assert len(prompts) == 1 and prompts[0].id == "d.jsonl/2"
    assert left_out == {"no_tests": 2, "tests_unusable": 6}

    on_file = code_contests(input_file="a.in")
    prompts, left_out = prompts_of("code_contests", [on_file, code_contests()], tmp_path)
    assert len(prompts) == 1 and left_out == {"not_on_standard_input": 1}

    rows = [{"problem": "p", "solution": s} for s in ("no box: 3", r"\boxed{1} or \boxed{2}", r"\boxed{3}")]
    prompts, left_out = prompts_of("math", rows, tmp_path)
    assert [p.reference["answer"] for p in prompts] == ["3"] and left_out == {"no_answer": 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question_type": "proof", "answer": "proof"}, "proof"),
        ({"answer": "notfound"}, "no_answer"),
        ({"answer": ""}, "no_answer"),
        ({"problem_is_valid": "Incomplete"}, "not_valid"),
        ({"solution_is_valid": "No"}, "not_valid"),
        ({"answer": r"\frac{1}{2"}, "answer_unusable"),
        ({"answer": "9" * 1001}, "answer_unusable"),
    ],
)
def test_numinamath_without_what_cannot_be_judged(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    prompts, left_out = prompts_of("numinamath", [NUMINA, NUMINA | changes], tmp_path)
    assert len(prompts) == 1 and left_out == {reason: 1}


class Mischief:
    def __reduce__(self) -> Any:
        return os.mkdir, ("mischief",)


@pytest.mark.parametrize(
    ("private", "message"),
    [
        (packed(Mischief()), r"it names posix.mkdir"),
        (packed([1]), r"a packed list, not a text"),
        ("no base64!", r"neither JSON nor a packed text"),
        (base64.b64encode(b"not compressed").decode(), r"neither JSON nor a packed text"),
    ],
)
def test_packed_tests_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    row = livecodebench(input="1 2", output="3", private=private)
    with pytest.raises(RecipeError, match=rf"d.jsonl, row 0 is not what adapter = 'livecodebench' knows.*{message}"):
        prompts_of("livecodebench", [row], tmp_path)
    assert not (tmp_path / "mischief").exists()


def test_a_row_of_another_shape_is_named(tmp_path: Path) -> None:
    rows = [apps(inputs=["1"], outputs=["1"]), apps() | {"input_output": "[1]"}]
    with pytest.raises(RecipeError, match=r"d.jsonl, row 1 is not what adapter = 'apps' knows: AttributeError"):
        prompts_of("apps", rows, tmp_path)
    with pytest.raises(
        RecipeError, match=r"no column \['solution'\], which adapter = 'math' reads; .* Leave adapter out"
    ):
        prompts_of("math", [{"problem": "p", "answer": "2"}], tmp_path)


class Rows(list[dict[str, Any]]):
    column_names = ("solution",)


def test_a_row_is_adapted_when_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    rows = AdaptedRows(
        Rows([{"solution": None, "problem": 3}, {"solution": r"\boxed{2}"}]), ADAPTERS["math"], MATH_DATA
    )
    assert len(rows) == 2 and rows.column_names == ["solution", "answer"]
    assert rows[1] == {"solution": r"\boxed{2}", "answer": "2"}
    assert [row.get("left_out") for row in rows] == ["no_answer", None]
    broken = AdaptedRows(Rows([{}, {"solution": "3"}]), ADAPTERS["math"], MATH_DATA)
    assert broken[1] == {"solution": "3", "answer": None, "left_out": "no_answer"}
    with pytest.raises(RecipeError, match="row 0"):
        broken[0]


MATH_DATA = DatasetData(source="dataset", adapter="math")  # type: ignore[call-arg]


# -- in a recipe


def test_an_adapter_gives_what_the_recipe_does_not() -> None:
    data = DatasetData(source="dataset", adapter="gsm8k", split="test", prompt="{question}?")  # type: ignore[call-arg]
    assert (data.path, data.config, data.answer, data.answer_after) == ("openai/gsm8k", "main", "answer", "####")
    assert (data.split, data.prompt) == ("test", "{question}?")
    assert DatasetData.model_validate(data.model_dump()) == data


def test_an_unknown_adapter_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r'no adapter = "deepscalar": did you mean "deepscaler"\? those .*acereason_math'
    ):
        DatasetData(source="dataset", adapter="deepscalar")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r'"hh" is for source = "pairs", and this is "dataset"'):
        DatasetData(source="dataset", adapter="hh")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_makes_a_whole_table_and_has_a_line_in_the_docs(name: str) -> None:
    adapter = ADAPTERS[name]
    table = {"source": adapter.source, "adapter": name}
    data = DatasetData(**table) if adapter.source == "dataset" else PairData(**table)  # type: ignore[arg-type]
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert f"| `{name}` | `{data.path.removeprefix('hf://datasets/')}`" in docs


def test_files_on_the_hub_are_read_by_their_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*names: Any, **keys: Any) -> Rows:
        asked.append((names, keys))
        return Rows()

    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for adapter in ("livecodebench", "taco", "gsm8k"):
        with pytest.raises(RecipeError, match="has no column"):
            read_rows(DatasetData(source="dataset", adapter=adapter), columns=())  # type: ignore[call-arg]
    lite = "hf://datasets/livecodebench/code_generation_lite/test6.jsonl"
    assert asked == [
        (("json",), {"data_files": lite, "split": "train"}),
        (("parquet",), {"data_files": "hf://datasets/BAAI/TACO/ALL/train-*.parquet", "split": "train"}),
        (("openai/gsm8k", "main"), {"split": "train"}),
    ]


# -- preferences


def test_preference_rows_become_pairs(tmp_path: Path) -> None:
    def messages(*texts: str) -> list[dict[str, str]]:
        return [{"content": t, "role": ("user", "assistant")[i % 2]} for i, t in enumerate(texts)]

    feedback = [
        {"prompt": "p", "prompt_id": "i", "chosen": messages("p", "good"), "rejected": messages("p", "bad")},
        {"prompt": "p", "prompt_id": "j", "chosen": messages("p", "a", "q", "b"), "rejected": messages("p", "bad")},
        {"prompt": "p", "prompt_id": "k", "chosen": messages("p", "good"), "rejected": messages("q", "bad")},
    ]
    asked = "\n\nHuman: Hi\n\nAssistant: Hi.\n\nHuman: So?\n\nAssistant:"
    dialogues = [
        {"chosen": f"{asked} Well.", "rejected": f"{asked} What?"},
        {"chosen": f"{asked} Well.", "rejected": "\n\nHuman: Hi\n\nAssistant: Ho."},
        {"chosen": f"{asked} Well.", "rejected": f"{asked} What?\n\nHuman: Ah\n\nAssistant: Oh."},
    ]
    ranked = [
        {
            "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go."},
        }
    ]
    expected = {
        "ultrafeedback": (feedback, ("p", "good", "bad"), {"not_one_turn": 1, "prompts_differ": 1}),
        "hh": (dialogues, (asked.strip(), "Well.", "What?"), {"differ_before_the_last_turn": 2}),
        "dpo_en": (ranked, ("System: Be kind.\n\nHuman: Hi\n\nAssistant:", "Hello.", "Go."), {}),
    }
    for adapter, (rows, texts, left_out) in expected.items():
        path = write_jsonl(tmp_path / f"{adapter}.jsonl", rows)
        (pair,), reasons = load_pairs(pairs(adapter, path), ByteTokenizer(), max_response_tokens=99)
        assert pair.demonstration_ids and pair.rejected_ids and reasons == left_out
        ids = (pair.token_ids, pair.demonstration_ids[:-1], pair.rejected_ids[:-1])
        assert tuple(bytes(part).decode() for part in ids) == texts


# -- real rows


@pytest.mark.data
def test_real_math_rows(data_dir: Path) -> None:
    """Files that have the columns of the data set, or two of its columns under other names."""
    for adapter, name, count, changes in (
        ("gsm8k", "gsm8k_test", 1319, {"prompt": "{problem}", "answer": "solution"}),
        ("math500", "math500", 500, {}),
        ("aime24", "aime2024", 30, {}),
        ("amc23", "amc2023", 40, {"prompt": "{problem}"}),
    ):
        prompts = load_dataset_prompts(dataset(adapter, data_dir / f"{name}.jsonl.gz", **changes), ByteTokenizer())
        answers = [record["answer"] for record in read(data_dir, name)]
        assert [prompt.reference["answer"].replace(",", "") for prompt in prompts] == [
            a.replace(",", "") for a in answers
        ]
        assert len(answers) == count


@pytest.mark.data
def test_answers_read_from_the_solutions_of_math(data_dir: Path) -> None:
    """MATH-500 has both: the answers are those in the boxes, where not two of them are joined by an "or"."""
    rows = read_rows(dataset("math", data_dir / "math500.jsonl.gz"), columns=("answer",))
    records = read(data_dir, "math500")
    differ = [r["id"] for r, row in zip(records, rows, strict=True) if row["answer"] != r["answer"]]
    assert differ == ["math/test/number_theory/459"]


@pytest.mark.data
def test_golds_of_real_code_rows(tmp_path: Path, data_dir: Path) -> None:
    """Put back into the columns of the data sets, from those of the folder."""

    named = {"prompt": "text", "reference_solution": "code", "tests": "test_list", "setup": "test_setup_code"}
    contests = {r["id"].rpartition("/")[2]: r for r in read(data_dir, "code_contests_stdio")}
    rows = {
        "mbpp": [{named.get(k, k): v for k, v in r.items()} for r in read(data_dir, "mbpp")[::120]],
        "humaneval": [whole_function(r) for r in read(data_dir, "humaneval")[::30]],
        "code_contests": [as_contest(contests[number], SCRIPTS[number][0]) for number in ("13", "100", "154")],
    }
    prompts = [prompt for adapter in rows for prompt in prompts_of(adapter, rows[adapter], tmp_path)[0]]
    assert [len(rows[adapter]) for adapter in rows] == [9, 6, 3] and len(prompts) == 18
    assert len(check_golds(Prompts.listed(prompts), max_rejected=0.0, verifier=VerifierConfig())) == 18


def whole_function(record: dict[str, Any]) -> dict[str, Any]:
    """A row of HumanEval: the file has the prompt in the solution, and the call of `check` in the test."""
    prompt, call = record["prompt"], f"\ncheck({record['entry_point']})\n"
    assert record["reference_solution"].startswith(prompt) and record["tests"][0].endswith(call)
    return {
        "task_id": record["id"],
        "prompt": prompt,
        "entry_point": record["entry_point"],
        "canonical_solution": record["reference_solution"].removeprefix(prompt),
        "test": record["tests"][0].removesuffix(call),
    }


def as_contest(record: dict[str, Any], program: str) -> dict[str, Any]:
    tests = {key: [test[key] for test in record["tests"]] for key in ("input", "output")}
    none: dict[str, list[str]] = {"input": [], "output": []}
    changes = {"public_tests": tests, "private_tests": none, "generated_tests": none}
    solutions = {"language": [2, 3], "solution": ["int main;", program]}
    return code_contests(name=record["id"], description=record["prompt"], solutions=solutions, **changes)


@pytest.mark.data
def test_real_dialogues_are_split_where_they_differ(tmp_path: Path, data_dir: Path) -> None:
    """Joined as HH-RLHF has them. In two, the chosen response holds a turn of its own: nobody can tell where it begins."""
    records = read(data_dir, "preference_hh_harmless")
    joined = [{k: f"\n\n{r['prompt']} {r[k]}" for k in ("chosen", "rejected")} for r in records]
    rows = read_rows(pairs("hh", write_jsonl(tmp_path / "hh.jsonl", joined)), columns=("chosen", "rejected"))
    kept = [(row, record) for row, record in zip(rows, records, strict=True) if not row.get("left_out")]
    assert len(kept) >= len(records) - 5
    assert all(row[key] == record[key] for row, record in kept for key in ("prompt", "chosen", "rejected"))
