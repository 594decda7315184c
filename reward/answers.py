"""Final answers of math responses: where they are stated, and which are the same for certain. No evaluation of text."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

MAX_ANSWER_CHARS = 2000
"""Longer "answers" are not answers; nothing downstream sees them."""
MAX_NUMBER_CHARS = 60
"""Longer numbers go the slow way, where a deadline holds."""
_PHRASE = re.compile(
    r"(?:^|\n)\s*####\s*(?P<hash>[^\n]+)"
    r"|(?:final\s+answer|answer)\s*(?:is|:)\s*:?\s*(?P<phrase>[^\n]+?)(?=\.?\s*(?:\n|$)|\.\s)",
    re.IGNORECASE,
)
_TEXT_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?)\\frac(\d)(\d)")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")


def final_answer(response: str) -> str | None:
    """The last stated final answer: in a box, else after "####" or "answer is"; None if none is stated.

    Only what follows the thinking part (`</think>`) counts.
    """
    response = after_thinking(response)
    answer = _last_boxed(response)
    if answer is None:
        matches = list(_PHRASE.finditer(response[-4 * MAX_ANSWER_CHARS :]))
        answer = (matches[-1]["hash"] or matches[-1]["phrase"]) if matches else None
    if answer is None or not answer.strip() or len(answer) > MAX_ANSWER_CHARS:
        return None
    return answer.strip()


def after_thinking(response: str) -> str:
    """What follows the thinking part; nothing when the response was cut off inside it."""
    before, closed, after = response.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in after else before + after


def _last_boxed(text: str) -> str | None:
    """Contents of the last \\boxed{...} or \\fbox{...}, braces balanced; "" when it was cut off before it closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    match = re.compile(r"\\(?:boxed|fbox)\s*\{").match(text, start) if start >= 0 else None
    if match is None:
        return None
    depth = 1
    for position in range(match.end(), min(len(text), match.end() + MAX_ANSWER_CHARS + 2)):
        if text[position - 1] == "\\" and text[position - 2] != "\\":
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[match.end() : position]
    return ""


def normalize(answer: str) -> str:
    """The answer without what never changes its value: math delimiters, spacing commands, trailing full stops."""
    answer = answer.strip().strip("$").removeprefix("\\(").removesuffix("\\)")
    answer = _TEXT_WRAPPERS.sub(r"\1", answer)
    for command in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\ ", "~"):
        answer = answer.replace(command, "")
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\u2212", "-")
    answer = (
        answer.replace("\\$", "").replace("$", "").replace("{,}", ",").replace("^\\circ", "").replace("^{\\circ}", "")
    )
    # Space between two digits has a meaning (a mixed number, a list); elsewhere it has none.
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer.strip()).rstrip(".")


def exact_number(answer: str) -> Fraction | None:
    """The value of a plainly written number: integer, decimal, fraction, percentage; None for anything else.

    Exact rational arithmetic: 0.1 is one tenth, and no float is involved.
    """
    text = normalize(answer)
    if len(text) > MAX_NUMBER_CHARS:
        return None
    percent = text.endswith(("\\%", "%"))
    text = text.removesuffix("%").removesuffix("\\") if percent else text
    text = text.removeprefix("+")
    if _THOUSANDS.match(text):
        text = text.replace(",", "")
    value = _plain_number(text)
    return value / 100 if percent and value is not None else value


def _plain_number(text: str) -> Fraction | None:
    if match := _FRACTION.fullmatch(text):
        sign = -1 if (match[1] or match[4]) else 1
        numerator, denominator = int(match[2] or match[5]), int(match[3] or match[6])
        return sign * Fraction(numerator, denominator) if denominator else None
    numerator_text, slash, denominator_text = text.partition("/")
    if slash and re.fullmatch(r"-?\d+", numerator_text) and re.fullmatch(r"\d+", denominator_text):
        return Fraction(int(numerator_text), int(denominator_text)) if int(denominator_text) else None
    if not re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", text):
        return None
    try:
        return Fraction(Decimal(text))
    except InvalidOperation:
        return None


def same_for_certain(gold: str, answer: str) -> bool | None:
    """True or False where plain comparison decides it, None where mathematics is needed. Symmetric.

    Two plainly written numbers are equal or they are not, up to one freedom: a percentage equals its bare number too
    ("50%" for a gold of 50), because problems that ask "what percentage" accept both.
    """
    if normalize(gold) == normalize(answer):
        return True
    left, right = exact_number(gold), exact_number(answer)
    if left is None or right is None:
        return None
    if ("%" in gold) != ("%" in answer):
        return left == right or left * 100 == right or left == right * 100
    return left == right
