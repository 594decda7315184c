"""Where a response states its answer, and that finding it costs the trusted process nothing."""

from __future__ import annotations

import time

import pytest

from reward.extraction import final_answer

STATED = [
    # Boxes.
    (r"so \boxed{12}", "12"),
    (r"first \boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed 7", "7"),
    (r"\fbox{3}", "3"),
    (r"\boxed{1} and then #### 2", "1"),
    (r"\boxed{3}. So the answer is \boxed{3}", "3"),
    (r"\boxed{\text{(B) } 5}", r"\text{(B) } 5"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),
    (r"$x=\boxed{1}$ and $y=\boxed{2}$", "1, 2"),
    (r"$\boxed{1}$, $\boxed{2}$", "1, 2"),
    (r"\boxed{4}, or equivalently \boxed{4.0}", "4.0"),
    (r"\boxed{4} or \boxed{5}", None),
    (r"either \boxed{4} or maybe \boxed{5}", None),
    (r"\boxed{1} or rather \boxed{\frac{1}{2", None),
    (r"\boxed{}", None),
    (r"\boxed{?}", None),
    ("\\boxed{" + "9" * 5000 + "}", None),
    # Thinking.
    (r"<think>\boxed{1}</think> It is \boxed{2}", "2"),
    (r"<think>\boxed{5}", None),
    (r"<think>\boxed{5}</think> Well.", None),
    (r"<think>hm \boxed{4}</think><answer>5</answer>", "5"),
    (r"<think>hm</think><answer>\boxed{5}</answer>", "5"),
    # Tags and phrases.
    ("<answer>8</answer>", "8"),
    ("<answer>The answer is 5.</answer>", "5"),
    ("5 + 5 = 10\n#### 10", "10"),
    ("#### 1\n#### 1,234", "1,234"),
    ("The answer is 42.", "42"),
    ("**Final answer:** 3.14. Done.", "3.14"),
    ("The answer is 5 because 2+3=5.", "5"),
    ("The answer is $5$ because 2+3=5.", "5"),
    (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    ("**Final Answer**\n\n$$x = 3$$", "x = 3"),
    ("### Final Answer\n42", "42"),
    ("The correct option is (C).", "(C)"),
    ("**Answer:** 12 apples", "12 apples"),
    (r"Answer: $\frac{3}{4}$ cm", r"\frac{3}{4} cm"),
    ("The answer is 3:30 p.m.", "3:30 p.m."),
    ("the answer is $x=1$ and $y=2$.", "$x=1$ and $y=2$"),
    ("The answer is 4 or the answer is 5.", None),
    ("The answer is", None),
    ("My answer: I don't know", None),
    # One expression alone.
    (r"\frac{1}{2}", r"\frac{1}{2}"),
    ("42", "42"),
    (r"\[ x = 2 \]", "x = 2"),
    ("Thus the total is $72$.", "72"),
    ("... we get x = 5\n\nTherefore, the area is\n$$25\\pi$$", r"25\pi"),
    ("Hence we have $a=3$, so $b = 4$.", None),
    ("$5$ apples and $6$ pears", None),
    # Numbers that nobody called the answer.
    ("It is 12, clearly.", None),
    ("I think there are 5 apples.", None),
    ("Let me compute. 5+5=10, 10+10=20, 20+20=40, 40+40", None),
    ("1. First\n2. Second", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "answer"), STATED)
def test_the_last_stated_answer_counts(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


MEGABYTE = 1_000_000
HEAVY = {
    "a megabyte of boxes": r"\boxed{" * (MEGABYTE // 7),
    "a megabyte of closed boxes": r"\boxed{1} or " * (MEGABYTE // 13),
    "a megabyte of answers": "answer is " * (MEGABYTE // 10),
    "a megabyte of blanks": "answer" + " " * MEGABYTE,
    "a megabyte of hashes": "#" * MEGABYTE,
    "a megabyte of digits": r"\boxed{" + "9" * MEGABYTE + "}",
    "a megabyte of backslashes": r"\boxed{" + "\\" * MEGABYTE + "}",
    "a megabyte of tags": "<answer>" * (MEGABYTE // 8),
    "a megabyte of closed tags": "<answer>1</answer>" * (MEGABYTE // 18),
    "a megabyte of dollars": "$ $" * (MEGABYTE // 3),
    "a megabyte of line ends": "answer:\n" * (MEGABYTE // 8),
    "a megabyte of thoughts": "<think></think>" * (MEGABYTE // 15),
    "a megabyte of joined boxes": r"\boxed{1}, " * (MEGABYTE // 11),
    "a megabyte of one word": "a" * MEGABYTE,
}


@pytest.mark.parametrize("response", HEAVY.values(), ids=HEAVY.keys())
def test_hostile_text_costs_the_trusted_process_nothing(response: str) -> None:
    """Linear work on a megabyte takes milliseconds; anything quadratic takes minutes."""
    start = time.process_time()
    final_answer(response)
    assert time.process_time() - start < 0.5
