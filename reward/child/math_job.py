"""Mathematical equivalence by math-verify, in a child process that is thrown away afterwards."""

from __future__ import annotations

import logging
from typing import Any

# The samples touch the parsers and the comparisons that most answers need, so that every fork finds them warm.
_SAMPLES = ((r"\frac{1}{2}", "0.5"), (r"x^2+2x+1", r"(x+1)^2"), (r"\{1,2\}", r"\{2,1\}"), (r"[0,\infty)", r"x\ge 0"),
            (r"\sqrt{12}+\pi", r"2\sqrt{3}+\pi"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), ("x=5", "5"))  # fmt: skip


def warm_up() -> None:
    logging.disable(logging.CRITICAL)
    for gold, answer in _SAMPLES:
        compare(gold, answer)


def compare(gold: str, answer: str) -> dict[str, Any]:
    """Whether the two answers are equivalent, in either direction (math-verify by itself is not symmetric).

    Returns:
        {"equal": bool, "gold_parsed": bool, "answer_parsed": bool}.
    """
    # Its own time limits use SIGALRM and threads; the parent kills this process instead.
    from math_verify import parse, verify

    gold_values = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    answer_values = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    equal = bool(gold_values) and bool(answer_values)
    equal = equal and (
        bool(verify(gold_values, answer_values, timeout_seconds=None))
        or bool(verify(answer_values, gold_values, timeout_seconds=None))
    )
    return {"equal": equal, "gold_parsed": bool(gold_values), "answer_parsed": bool(answer_values)}
