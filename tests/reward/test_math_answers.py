"""Math verdicts by hand, hostile answers, and every gold against itself."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward import Outcome, RewardPool, Verdict, check_reference, gold_response
from reward.answers import exact_number, final_answer, same_for_certain


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(deadline_s=2.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{85}", "85"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"<think>\boxed{1}</think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I do not know", None),
        ("some steps\n#### 42", "42"),
        ("The answer is 7.", "7"),
        ("I counted 7 apples and 9 pears", None),
        (r"\boxed{85", None),
        (r"\boxed{}", None),
        (r"\boxed{3} and then \boxed{4", None),
        (r"<think> maybe \boxed{3}", None),
        ("", None),
        (r"\boxed{" + "9" * 3000 + "}", None),
    ],
)
def test_the_last_stated_answer_counts_and_nothing_else_does(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


SAME = [
    ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), ("1,000", "1000"), ("$18", "18"), ("50%", "0.5"),
    ("50\\%", "50"), ("-3", "-3.0"), (" 42. ", "42"), (r"\text{Monday}", "Monday"), ("0.1", "1/10"), (r"90^\circ", "90"),
]  # fmt: skip
DIFFERENT = [
    ("1/2", "0.51"), ("1000", "1001"), ("2", "-2"), ("0.1", "0.100000000000000001"), ("12", "1,2"), ("7", "70"),
    (r"\frac{2}{3}", "0.667"), ("5", "50%"),
    ("1%", "100%"), ("50%", "0.5%"), ("12", "1 2"), ("31/2", "3 1/2"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), SAME)
def test_equal_numbers_are_equal_whichever_is_the_gold(left: str, right: str) -> None:
    assert same_for_certain(left, right) is True and same_for_certain(right, left) is True


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_different_numbers_are_different_whichever_is_the_gold(left: str, right: str) -> None:
    assert same_for_certain(left, right) is not True and same_for_certain(right, left) is not True


def test_numbers_are_exact_rationals() -> None:
    assert exact_number("0.1") * 3 == exact_number("0.3")  # type: ignore[operator]
    assert exact_number("1/0") is None and exact_number(r"\frac{1}{0}") is None and exact_number("x") is None


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("2x+2", "2(x+1)", True),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("2x+2", "2x+1", False),
        (r"\sqrt{12}", r"3\sqrt{2}", False),
    ],
)
def test_mathematics_decides_where_text_cannot(pool: RewardPool, gold: str, answer: str, correct: bool) -> None:
    verdict = pool.score("math", rf"\boxed{{{answer}}}", {"answer": gold})
    assert (verdict.outcome is Outcome.CORRECT) == correct and verdict.reward == float(correct)


HOSTILE = [r"9^{9^{9^{9}}}", "9**9**9**9", "{" * 900 + "1" + "}" * 900, r"\frac{1}{" * 150 + "2" + "}" * 150, "(" * 900]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda a: a[:12])
def test_no_answer_outlives_its_deadline_from_any_thread(pool: RewardPool, answer: str) -> None:
    verdicts: list[Verdict] = []
    score = lambda: verdicts.append(pool.score("math", rf"\boxed{{{answer}}}", {"answer": "x+1"}))  # noqa: E731
    started = time.monotonic()
    thread = threading.Thread(target=score)
    thread.start()
    thread.join(15)
    assert time.monotonic() - started < 10
    assert verdicts[0].reward == 0.0 and verdicts[0].outcome is not Outcome.VERIFIER_ERROR
    # One response changes nothing for the next.
    assert pool.score("math", r"\boxed{1+x}", {"answer": "x+1"}).reward == 1.0


def test_a_megabyte_of_latex_is_no_answer_at_once(pool: RewardPool) -> None:
    started = time.monotonic()
    assert pool.score("math", r"\boxed{" + r"\frac{1}{2}+" * 90_000 + "1}", {"answer": "1"}).reward == 0.0
    assert pool.score("math", r"\boxed{" * 150_000, {"answer": "1"}).outcome is Outcome.NO_ANSWER
    assert time.monotonic() - started < 2


def test_an_unusable_reference_is_refused() -> None:
    for reference in ({}, {"answer": ""}, {"answer": 3}):
        with pytest.raises(ValueError, match="must be a text that is not empty"):
            check_reference("math", reference)
    with pytest.raises(ValueError, match="no verifier for task 'poetry'"):
        check_reference("poetry", {})


@pytest.mark.data
@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500", "aime2024", "amc2023"])
def test_every_gold_is_judged_correct_against_itself(pool: RewardPool, data_dir: Path, name: str) -> None:
    with gzip.open(data_dir / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    verdicts = pool.score_many([("math", gold_response("math", row), {"answer": row["answer"]}) for row in rows])
    assert [row["id"] for row, v in zip(rows, verdicts, strict=True) if v.outcome is not Outcome.CORRECT] == []
