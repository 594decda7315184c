"""Well-known data sets by name: where each lies, and how its rows become columns that a recipe can name.

Pure: names and rows in, keys and columns out. `rlpost.config` fills a table in from `defaults_of`, `rlpost.data.sources`
puts what an adapter makes of a row over the row.
"""

from __future__ import annotations

import base64
import difflib
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]

MATH_INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."
SCRIPT_INSTRUCTION = (
    "Write a Python program that solves this: it reads standard input and prints the answer to standard output. Put all of"
    " it in one ```python block."
)
STARTER_INSTRUCTION = (
    "Solve this in Python, beginning with the code below and keeping its names. Put all of the program in one ```python"
    " block."
)
FUNCTION_INSTRUCTION = "Write `{name}` in Python, so that it solves this. Put all of it in one ```python block."
TESTS_INSTRUCTION = "Write a Python function that passes these tests. Put all of it in one ```python block."
COMPLETE_INSTRUCTION = (
    "Complete this Python code, and repeat what is given with it. Put all of it in one ```python block."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What a recipe would have to say about a data set."""

    source: Literal["dataset", "pairs"]
    defaults: Mapping[str, Any]
    """Values of the table's keys, for those the recipe does not give."""
    reads: tuple[str, ...] = ()
    """Columns of the data set that `columns` looks at."""
    makes: tuple[str, ...] = ()
    """Columns that `columns` adds or puts in the place of the data set's."""
    columns: Callable[[Row], Row] | None = None
    """From a row to the columns `makes`, or to {"left_out": reason} for a row of a known kind that no prompt can be made
    of. Raises ValueError for a row that is not as documented."""


def defaults_of(name: str, source: str) -> Mapping[str, Any]:
    """The keys that the adapter gives to a table with this `source`.

    Raises:
        ValueError: when there is no such adapter for it, naming the nearest one.
    """
    known = sorted(key for key, adapter in ADAPTERS.items() if adapter.source == source)
    if name in known:
        return ADAPTERS[name].defaults
    if name in ADAPTERS:
        raise ValueError(f'adapter = "{name}" is for source = "{ADAPTERS[name].source}", and this is "{source}"')
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    raise ValueError(f'no adapter = "{name}": {hint}those for source = "{source}" are {known}')


def _left_out(reason: str) -> Row:
    return {"left_out": reason}


# -- math --------------------------------------------------------------------------------------------------------------


def _answers(
    path: str,
    *,
    problem: str = "problem",
    reads: tuple[str, ...] = (),
    columns: Callable[[Row], Row] | None = None,
    **keys: Any,
) -> Adapter:
    """A data set with its problems in one column, and its answers in one or in what `columns` reads."""
    prompt = f"{{{problem}}}\n\n{MATH_INSTRUCTION}"
    return Adapter(
        source="dataset",
        defaults={"path": path, "task": "math", "prompt": prompt, "answer": "answer"} | keys,
        reads=reads,
        makes=("answer",) if columns else (),
        columns=columns,
    )


def _math(row: Row) -> Row:
    """MATH (Hendrycks et al. 2021): problem, level, type, solution; the answer is what the solution puts in its last box.

    Left out: the few whose solution boxes nothing, or two things with an "or" between.
    """
    from reward.extraction import final_answer

    solution = row["solution"] or ""
    answer = final_answer(solution) if "\\boxed" in solution or "\\fbox" in solution else None
    return {"answer": answer} if answer else _left_out("no_answer")


def _numinamath(row: Row) -> Row:
    """NuminaMath-1.5: problem, solution, answer, problem_type, question_type, problem_is_valid, solution_is_valid, source,
    synthetic.

    Left out: proofs, rows whose answer was not found, rows whose problem or solution its authors do not call valid, answers
    that cannot be compared (longer than an answer can be, braces that do not close). Multiple-choice questions are kept:
    their answer is a letter.
    """
    from reward import check_reference

    answer = (row["answer"] or "").strip()
    if row["question_type"] == "proof" or answer == "proof":
        return _left_out("proof")
    if answer in ("", "notfound"):
        return _left_out("no_answer")
    if (row["problem_is_valid"], row["solution_is_valid"]) != ("Yes", "Yes"):
        return _left_out("not_valid")
    try:
        check_reference("math", {"answer": answer})
    except ValueError:
        return _left_out("answer_unusable")
    return {"answer": answer}


# -- code --------------------------------------------------------------------------------------------------------------


def _humaneval(row: Row) -> Row:
    """HumanEval: task_id, prompt (imports, signature, docstring), canonical_solution (the body), test (a function
    `check(candidate)` that nothing calls), entry_point."""
    return {
        "id": row["task_id"],
        "instruction": COMPLETE_INSTRUCTION,
        "tests": [f"{row['test']}\ncheck({row['entry_point']})\n"],
        "entry_point": row["entry_point"],
        "solution": row["prompt"] + row["canonical_solution"],
    }


def _apps(row: Row) -> Row:
    """APPS and TACO: question, starter_code, and two JSON texts: solutions, a list of Python programs, and input_output,
    {"inputs", "outputs"} of scripts, or of calls of its "fn_name".

    A script's input or output may be a list of lines. A call's inputs are lists of arguments; its outputs are values, or
    each the only one of a list: where all outputs are lists of one, they are taken for the latter, since those that
    return such lists always are rarer (the gold of one that does is rejected). Only the first solution is used; some are
    wrong, so give `max_rejected_golds`.

    Left out: rows without tests (about a tenth of APPS) or with tests that the verifier cannot use: no JSON, a NaN, an input
    of more than a million characters.
    """
    try:
        given = json.loads(row["input_output"] or "{}")
        solutions = json.loads(row["solutions"] or "[]")
    except ValueError:  # no JSON, or an integer of more digits than Python reads
        return _left_out("tests_unusable")
    inputs, outputs = given.get("inputs") or [], given.get("outputs") or []
    if len(inputs) != len(outputs):
        return _left_out("tests_unusable")
    name, starter = given.get("fn_name"), row["starter_code"] or ""
    solution = solutions[0] if solutions else None
    if not name:
        tests = [_test(_lines(text), _lines(output)) for text, output in zip(inputs, outputs, strict=True)]
        return _program(tests, solution=solution)
    if not all(isinstance(arguments, list) for arguments in inputs):
        return _left_out("tests_unusable")
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    tests = [
        _test("\n".join(map(json.dumps, arguments)), json.dumps(output))
        for arguments, output in zip(inputs, outputs, strict=True)
    ]
    return _program(
        tests, entry_point=_entry_point(name, starter or solution or ""), starter=starter, solution=solution
    )


def _code_contests(row: Row) -> Row:
    """CodeContests: name, description; public_tests, private_tests and generated_tests, each {"input": [...], "output":
    [...]}; solutions, {"language": [...], "solution": [...]}, of which 3 is Python 3; input_file and output_file, empty
    for problems on standard input and output.

    All tests of the three kinds are kept, often some hundred: `verifier.code.deadline_s` is for all of them. Problems
    whose answer is not unique are not marked in the data, and cannot be told from the others.

    Left out: problems on files, without tests, or with tests that the verifier cannot use.
    """
    if row["input_file"] or row["output_file"]:
        return _left_out("not_on_standard_input")
    kinds = [row[f"{kind}_tests"] for kind in ("public", "private", "generated")]
    tests = [_test(*pair) for kind in kinds for pair in zip(kind["input"], kind["output"], strict=True)]
    programs = zip(row["solutions"]["language"], row["solutions"]["solution"], strict=True)
    solution = next((program for language, program in programs if language == 3), None)
    return {"id": row["name"], **_program(tests, solution=solution)}


def _livecodebench(row: Row) -> Row:
    """LiveCodeBench: question_content, starter_code, question_id; public_test_cases, a JSON text of {input, output,
    testtype}; private_test_cases, the same text, or base64 of zlib of a pickle of it; metadata, a JSON text, with
    func_name where testtype is "functional". It has no solutions.

    Left out: problems with tests that the verifier cannot use: an input of more than a million characters.
    """
    tests = [
        _test(test["input"], test["output"])
        for text in (row["public_test_cases"], _unpickled(row["private_test_cases"]))
        for test in json.loads(text)
    ]
    starter, name = row["starter_code"] or "", json.loads(row["metadata"] or "{}").get("func_name")
    entry_point = _entry_point(name, starter) if name else None
    return {"id": row["question_id"], **_program(tests, entry_point=entry_point, starter=starter)}


class _TextUnpickler(pickle.Unpickler):
    """Unpickles what needs no code: a pickle that names any class or function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and a text needs no such thing")


def _unpickled(text: str) -> str:
    if text.lstrip().startswith("["):
        return text
    try:
        packed = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases is neither JSON nor a packed text: {error}") from error
    if not isinstance(packed, str):
        raise ValueError(f"private_test_cases holds a packed {type(packed).__name__}, not a text")
    return packed


def _test(given: Any, output: Any) -> Mapping[str, Any]:
    return {"input": given, "output": output}


def _lines(text: Any) -> Any:
    return "\n".join(map(str, text)) if isinstance(text, list) else text


def _entry_point(name: str, code: str) -> str:
    """`name`, as a method where the code that it is to be found in begins LeetCode's class."""
    return f"Solution.{name}" if re.search(r"^class Solution\b", code, re.MULTILINE) else name


def _program(
    tests: Sequence[Mapping[str, Any]],
    *,
    entry_point: str | None = None,
    starter: str = "",
    solution: str | None = None,
) -> Row:
    """The columns of a problem that is judged by inputs and outputs."""
    from reward import check_reference

    if not tests:
        return _left_out("no_tests")
    try:
        check_reference("code", {"tests": tests, "entry_point": entry_point})
    except ValueError:
        return _left_out("tests_unusable")
    if not entry_point:
        instruction = SCRIPT_INSTRUCTION
    elif starter:
        instruction = f"{STARTER_INSTRUCTION}\n```python\n{starter}\n```"
    else:
        instruction = FUNCTION_INSTRUCTION.format(name=entry_point)
    return {"instruction": instruction, "tests": tests, "entry_point": entry_point, "solution": solution}


# -- preferences -------------------------------------------------------------------------------------------------------


def _ultrafeedback(row: Row) -> Row:
    """UltraFeedback, binarized: prompt, and chosen and rejected as messages of {content, role}: the prompt as the user's and
    one response.

    Left out: longer dialogues, or such as do not begin alike.
    """
    (*asked, chosen), (*asked_too, rejected) = row["chosen"], row["rejected"]
    if [message["role"] for message in (*asked, chosen, rejected)] != ["user", "assistant", "assistant"]:
        return _left_out("not_one_turn")
    if asked != asked_too:
        return _left_out("prompts_differ")
    return {"prompt": asked[0]["content"], "chosen": chosen["content"], "rejected": rejected["content"]}


def _hh(row: Row) -> Row:
    """HH-RLHF: chosen and rejected, each a whole dialogue of turns "\\n\\nHuman: " and "\\n\\nAssistant: "; all but the last
    turn is the prompt.

    Left out: pairs that differ in more than that turn.
    """
    asked, turn, chosen = row["chosen"].rpartition("\n\nAssistant:")
    rejected = row["rejected"].removeprefix(asked + turn)
    if not turn or rejected == row["rejected"] or "\n\nHuman:" in rejected:
        return _left_out("differ_before_the_last_turn")
    return {"prompt": (asked + turn).strip(), "chosen": chosen.strip(), "rejected": rejected.strip()}


_SPEAKERS = {"system": "System", "human": "Human", "gpt": "Assistant"}


def _dpo_en(row: Row) -> Row:
    """The DPO sets of LLaMA-Factory: conversations, a list of {from, value} by system, human and gpt; chosen and rejected, one
    such message each. The prompt is the conversation as text, in the turns of HH-RLHF."""
    turns = [f"{_SPEAKERS[turn['from']]}: {turn['value']}" for turn in row["conversations"]]
    return {
        "prompt": "\n\n".join([*turns, "Assistant:"]),
        "chosen": row["chosen"]["value"],
        "rejected": row["rejected"]["value"],
    }


# -- the table ---------------------------------------------------------------------------------------------------------

_APPS_COLUMNS = ("question", "starter_code", "solutions", "input_output")
_MBPP = {"path": "google-research-datasets/mbpp", "task": "code", "tests": "test_list", "solution": "code"}


def _tested(
    prompt: str, *, reads: tuple[str, ...], columns: Callable[[Row], Row], ids: tuple[str, ...] = (), **keys: Any
) -> Adapter:
    """Problems whose tests, and what goes with them, `columns` makes."""
    made = {name: name for name in ("tests", "entry_point", "solution")}
    return Adapter(
        source="dataset",
        defaults={"task": "code", "prompt": prompt} | made | keys,
        reads=reads,
        makes=(*ids, "instruction", *made),
        columns=columns,
    )


def _pairs(path: str, *, reads: tuple[str, ...], columns: Callable[[Row], Row], **keys: Any) -> Adapter:
    made = {name: name for name in ("chosen", "rejected")}
    return Adapter(
        source="pairs",
        defaults={"path": path, "prompt": "{prompt}"} | made | keys,
        reads=reads,
        makes=("prompt", *made),
        columns=columns,
    )


ADAPTERS: Mapping[str, Adapter] = {
    "gsm8k": _answers("openai/gsm8k", config="main", problem="question", answer_after="####"),
    "math": _answers("DigitalLearningGmbH/MATH-lighteval", reads=("solution",), columns=_math),
    "math500": _answers("HuggingFaceH4/MATH-500", split="test"),
    "deepscaler": _answers("agentica-org/DeepScaleR-Preview-Dataset"),
    "acereason_math": _answers("nvidia/AceReason-Math"),
    "numinamath": _answers(
        "AI-MO/NuminaMath-1.5",
        reads=("answer", "question_type", "problem_is_valid", "solution_is_valid"),
        columns=_numinamath,
    ),
    "aime24": _answers("HuggingFaceH4/aime_2024"),
    "aime25": _answers("math-ai/aime25", split="test"),
    "amc23": _answers("math-ai/amc23", split="test", problem="question"),
    "mbpp": Adapter(
        source="dataset",
        defaults=_MBPP
        | {"config": "full", "prompt": f"{{text}}\n\n{TESTS_INSTRUCTION}\n{{test_list}}", "setup": "test_setup_code"},
    ),
    "mbpp_sanitized": Adapter(
        source="dataset",
        defaults=_MBPP
        | {
            "config": "sanitized",
            "prompt": f"{{prompt}}\n\n{TESTS_INSTRUCTION}\n{{test_list}}",
            "setup": "test_imports",
        },
    ),
    "humaneval": _tested(
        "{instruction}\n```python\n{prompt}```",
        path="openai/openai_humaneval",
        split="test",
        reads=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        columns=_humaneval,
        ids=("id",),
    ),
    "apps": _tested(
        "{question}\n\n{instruction}",
        path="hf://datasets/codeparrot/apps/train.jsonl",
        reads=_APPS_COLUMNS,
        columns=_apps,
    ),
    "taco": _tested(
        "{question}\n\n{instruction}",
        path="hf://datasets/BAAI/TACO/ALL/train-*.parquet",
        reads=_APPS_COLUMNS,
        columns=_apps,
    ),
    "code_contests": _tested(
        "{description}\n\n{instruction}",
        path="deepmind/code_contests",
        reads=(
            *("name", "description", "public_tests", "private_tests", "generated_tests"),
            *("solutions", "input_file", "output_file"),
        ),
        columns=_code_contests,
        ids=("id",),
    ),
    "livecodebench": _tested(
        "{question_content}\n\n{instruction}",
        path="hf://datasets/livecodebench/code_generation_lite/test6.jsonl",
        reads=(
            *("question_id", "question_content", "starter_code"),
            *("public_test_cases", "private_test_cases", "metadata"),
        ),
        columns=_livecodebench,
        ids=("id",),
    ),
    "ultrafeedback": _pairs(
        "HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        reads=("chosen", "rejected"),
        columns=_ultrafeedback,
    ),
    "hh": _pairs("Anthropic/hh-rlhf", reads=("chosen", "rejected"), columns=_hh),
    "dpo_en": _pairs(
        "llamafactory/DPO-En-Zh-20k", config="en", reads=("conversations", "chosen", "rejected"), columns=_dpo_en
    ),
}
