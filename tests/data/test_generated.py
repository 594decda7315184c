"""Generated problems: right references, demonstrations wrong exactly where they say, splits that never meet."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest

from rlpost.data.generated import FAMILIES, SLIP_SHARES, Problem, problems

TASKS = {"arithmetic": "math", "chains": "math", "repeated_chains": "math", "functions": "code"}


def take(family: str, split: Any, seed: int, num_problems: int) -> list[Problem]:
    return list(islice(problems(family, split=split, seed=seed), num_problems))


def is_right(problem: Problem, response: str) -> bool:
    """Judged independently of the package: the boxed answer compared, the function run."""
    if problem.task == "math":
        return re.findall(r"\\boxed\{(\d+)\}", response) == [problem.reference["answer"]]
    code = re.fullmatch(r"```python\n(.*)\n```", response, re.DOTALL)
    assert code
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    try:
        for test in problem.reference["tests"]:
            exec(test, scope)
    except AssertionError:
        return False
    return True


def test_the_answer_of_an_arithmetic_problem_is_what_python_computes():
    for problem in take("arithmetic", "train", 0, 500):
        expression = problem.prompt.removeprefix("Compute ").removesuffix(".\n")
        assert problem.reference["answer"] == str(eval(expression))


def test_the_tests_of_a_function_problem_accept_its_specification_and_nothing_near_it():
    """Every near miss is told apart: another comparison, forgotten parentheses, another sign, constant or collector.

    By hand: "at least 12, add 3, times 4; sum" of [11, 12, 13] is (15 + 16) * 4 = 124; x>12 gives 64, x+3*4 gives 49.
    """
    symbols = {"above": ">", "below": "<", "at least": ">=", "at most": "<="}
    wraps = {"list": "[{}]", "sum": "sum({})"}
    pattern = re.compile(
        r"Write f\(xs\): for the numbers of xs ([a-z ]+) (\d+), (add|subtract) (\d), times (\d);"
        r" return the ([a-z ]+)\.\n"
    )
    for problem in take("functions", "train", 0, 300):
        parts = pattern.fullmatch(problem.prompt)
        assert parts
        bound, limit, verb, shift, scale, collector = parts.groups()
        sign = "+" if verb == "add" else "-"
        wrap = {**wraps, "sorted list": "sorted({})"}[collector]

        def right(
            symbol: str, expression: str, constant: int | str = limit, wrap: str = wrap, problem: Problem = problem
        ) -> bool:
            body = wrap.format(f"{expression} for x in xs if x{symbol}{constant}")
            return is_right(problem, f"```python\ndef f(xs):\n    return {body}\n```")

        expression = f"(x{sign}{shift})*{scale}"
        assert right(symbols[bound], expression)
        assert not any(right(symbol, expression) for symbol in symbols.values() if symbol != symbols[bound])
        assert not right(symbols[bound], f"x{sign}{shift}*{scale}")
        assert not right(symbols[bound], f"(x{'-' if sign == '+' else '+'}{shift})*{scale}")
        assert not right(symbols[bound], expression, int(limit) + 1)
        assert not right(symbols[bound], expression, wrap="sum({})" if collector != "sum" else "[{}]")


@pytest.mark.parametrize(
    ("family", "word", "share"),
    [
        ("arithmetic", "+", SLIP_SHARES["+"]),
        ("arithmetic", "-", SLIP_SHARES["-"]),
        ("chains", "+", SLIP_SHARES["chain"]),
        ("repeated_chains", "+", SLIP_SHARES["chain"]),
        ("functions", " above | below ", SLIP_SHARES["strict"]),
        ("functions", " at least | at most ", SLIP_SHARES["inclusive"]),
    ],
)
def test_demonstrations_slip_as_often_as_announced(family: str, word: str, share: float):
    """4 standard errors of a share of 1,000 are 0.06."""
    pattern = re.escape(word) if len(word) == 1 else word
    chosen = (problem for problem in problems(family, split="train", seed=3) if re.search(pattern, problem.prompt))
    wrong = [not is_right(problem, problem.demonstration) for problem in islice(chosen, 1000)]
    assert sum(wrong) / len(wrong) == pytest.approx(share, abs=0.06)


def test_a_worked_sum_names_the_carry_and_a_slip_does_not_take_it():
    """347+28: 7+8=15, so write 5 and carry 1; 4+2+1=7 makes 375. The slip adds no carry: 4+2+0=6 makes 365."""
    seen = {p.demonstration for p in islice(problems("arithmetic", split="train", seed=0), 30_000) if "+" in p.prompt}
    family = [text for text in seen if text.startswith("7+8=5, carry 1\n4+2")]
    endings = {re.sub(r"\\boxed\{\d", r"\\boxed{H", text.partition("\n")[2]) for text in family}
    assert endings == {"4+2+1=7\n\\boxed{H75}", "4+2+0=6\n\\boxed{H65}"}


def test_a_chain_is_worked_in_steps_of_one_or_two_and_a_slip_loses_one_carry_for_good():
    """By hand, 7+5+9+4+8: "12+9+4+8", "21+4+8", "25+8", "33", or "21+4+8", "33"; with its second carry lost in steps of one
    "12+9+4+8", "11+4+8", "15+8", "23"."""
    seen = {(1, False): 0, (1, True): 0, (2, False): 0, (2, True): 0}
    for problem in take("chains", "train", 0, 500):
        numbers = [int(n) for n in problem.prompt.removeprefix("Compute ").removesuffix(".\n").split("+")]
        *lines, boxed = problem.demonstration.split("\n")
        answer, sums = int(problem.reference["answer"]), [eval(line) for line in lines]
        assert answer == sum(numbers)
        pace = {-(-(len(numbers) - 1) // pace): pace for pace in (1, 2)}[len(lines)]
        rests = [numbers[1 + pace * (i + 1) :] for i in range(len(lines))]
        assert [line.split("+")[1:] for line in lines] == [[str(n) for n in rest] for rest in rests]
        assert boxed == f"\\boxed{{{sums[-1]}}}" and sums == sorted(sums, reverse=True)
        assert set(sums) <= {answer, answer - 10}
        seen[pace, sums[-1] != answer] += 1
    assert min(seen.values()) > 90  # of 125 each, 4 standard errors of a quarter are 39


def test_half_of_the_repeated_chains_are_written_twice_slip_and_all():
    """By hand, 7+5+9+4+8 once or twice "12+9+4+8", "21+4+8", "25+8", "33"."""
    seen = {(times, right): 0 for times in (1, 2) for right in (True, False)}
    for problem in take("repeated_chains", "train", 0, 500):
        *lines, boxed = problem.demonstration.split("\n")
        num_lines = problem.prompt.count("+")
        once = lines[:num_lines]
        assert [line.count("+") for line in once] == list(range(num_lines - 1, -1, -1))
        assert lines == once * (len(lines) // num_lines) and boxed == f"\\boxed{{{once[-1]}}}"
        seen[len(lines) // num_lines, once[-1] == problem.reference["answer"]] += 1
    assert min(seen.values()) > 90  # of 125 each, 4 standard errors of a quarter are 39


@pytest.mark.parametrize("family", FAMILIES)
def test_no_problem_is_in_both_splits_whatever_the_seeds(family: str):
    """The digest in the id decides, read as a fraction: 0x19999999 / 2^32 = 0.1 is the border."""
    train = [p for seed in range(3) for p in take(family, "train", seed, 2000)]
    heldout = [p for seed in range(3) for p in take(family, "heldout", seed, 2000)]
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert min(p.id for p in train) >= f"{family}/19999999" > max(p.id for p in heldout)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_plenty_of_problems_and_hardly_a_repeat(family: str):
    """Of n equally likely problems, 10,000 draws show n (1 - exp(-10,000 / n)): 9,187 of 58,320, 9,607 of 124,416."""
    assert len({p.id for p in take(family, "train", 0, 10_000)}) > 9_000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_problems_and_another_seed_others(family: str):
    assert take(family, "train", 5, 50) == take(family, "train", 5, 50)
    assert take(family, "train", 5, 50) != take(family, "train", 6, 50)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_problem_has_one_prompt_and_one_reference_whatever_the_seed_it_came_from(family: str):
    by_id = {p.id: p for p in take(family, "heldout", 0, 4000)}
    again = [p for p in take(family, "heldout", 1, 4000) if p.id in by_id]
    assert len(again) > 100
    for problem in again:
        first = by_id[problem.id]
        assert (first.prompt, first.task, first.reference) == (problem.prompt, TASKS[family], problem.reference)


def test_prompts_end_in_a_newline_and_tell_nothing_of_the_reference():
    keys = {"math": {"answer"}, "code": {"tests", "setup", "entry_point"}}
    for family in FAMILIES:
        for problem in take(family, "train", 0, 200):
            assert problem.prompt.endswith("\n") and problem.prompt.count("\n") == 1
            assert not problem.demonstration.startswith("\n")
            assert problem.reference.keys() == keys[TASKS[family]]


def test_an_unknown_family_or_split_is_refused_at_once_by_name():
    with pytest.raises(ValueError, match=r"'geometry'.*'arithmetic', 'chains', 'functions', 'repeated_chains'"):
        problems("geometry", split="train", seed=0)
    with pytest.raises(ValueError, match=r"'test'.*heldout"):
        problems("arithmetic", split="test", seed=0)  # type: ignore[arg-type]
