"""Which final answers are the same, or not the same, for certain: by text and exact numbers. No evaluation of text.

Everything here runs in the trusted process on hostile text, so every step is linear in its length or works on a bounded
piece of it.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

_MAX_NUMBER_CHARS = 100
_MAX_TUPLE_CHARS = 300
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_REMOVED = re.compile(
    r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[!,;: ]|~|\\\$|\$|\^\{?\\circ\}?|\\\(|\\\)|\\\[|\\\]"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}|(-?\d+)/(\d+)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z \-']*")
_ROOT = r"(?:\\sqrt\{(\d+)\}|\\sqrt(\d))"
_SURD = re.compile(
    rf"(-?)(?:(\d*)(?:{_ROOT}|(\\pi))(?:/(\d+))?|\\frac\{{(-?\d*)(?:{_ROOT}|(\\pi))\}}\{{(\d+)\}}|\\frac\{{(\d+)\}}\{{(\d+)\}}(?:{_ROOT}|(\\pi)))"
)
_PAIR = re.compile(r"\(([^()\[\],;]+(?:,[^()\[\],;]+)+)\)")


class Exact(NamedTuple):
    """`rational` for kind "", `rational` times pi for kind "pi", and the root of |`rational`| with its sign for kind "root"."""

    kind: str
    rational: Fraction


def normalize(answer: str) -> str:
    """The answer without what never changes its value: delimiters, spacing, text wrappers, a full stop at the end."""
    answer = _TEXT.sub(r"\1", answer.strip())
    answer = answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\u2212", "-").replace("{,}", ",")
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _REMOVED.sub("", answer))
    # Space between two digits has a meaning (a mixed number, a list); elsewhere it has none.
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer.strip())
    return answer[:-1] if answer.endswith(".") else answer


def exact_number(text: str) -> Fraction | None:
    """The value of a plainly written number, already normalized: integer, decimal, fraction; None for anything else."""
    if len(text) > _MAX_NUMBER_CHARS or not text.isascii():
        return None
    if match := _FRACTION.fullmatch(text):
        sign = -1 if match[1] else 1
        numerator, denominator = int(match[2] or match[4]), int(match[3] or match[5])
        return sign * Fraction(numerator, denominator) if denominator else None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def exact_value(text: str) -> Exact | None:
    """`exact_number`, and rational multiples of pi or of the square root of an integer; None for anything else."""
    if (number := exact_number(text)) is not None:
        return Exact("", number)
    if len(text) > _MAX_NUMBER_CHARS or not text.isascii() or (match := _SURD.fullmatch(text)) is None:
        return None
    sign, f1, r1, s1, pi1, d1, f2, r2, s2, pi2, d2, f3, d3, r3, s3, pi3 = match.groups()
    above, below, radicand = f1 or f2 or f3 or "1", d1 or d2 or d3 or "1", r1 or s1 or r2 or s2 or r3 or s3
    factor = Fraction(int(above + "1" if above == "-" else above), int(below)) if int(below) else None
    if factor is None:
        return None
    factor = -factor if sign else factor
    if pi1 or pi2 or pi3:
        return Exact("pi", factor) if factor else Exact("", factor)
    root = math.isqrt(int(radicand))
    if root * root == int(radicand):
        return Exact("", factor * root)
    return Exact("root", abs(factor) * factor * int(radicand)) if factor else Exact("", factor)


def same_for_certain(gold: str, answer: str) -> bool | None:
    """True or False where plain comparison decides it, None where mathematics is needed. Symmetric.

    Two plainly written numbers are equal or they are not, in exact arithmetic, up to one freedom: next to a number
    without a percent sign, 50% is 1/2 and is also 50, because problems that ask "what percentage" are answered both ways.
    """
    left, right = normalize(gold), normalize(answer)
    if left == right:
        return True
    if "%" in gold + answer and "circ" in gold + answer:
        return None
    tuples = _PAIR.fullmatch(left[:_MAX_TUPLE_CHARS]), _PAIR.fullmatch(right[:_MAX_TUPLE_CHARS])
    if tuples[0] and tuples[1]:
        return _same_tuples(tuples[0][1].split(","), tuples[1][1].split(","))
    left_bare, right_bare = left.removesuffix("%").removesuffix("\\"), right.removesuffix("%").removesuffix("\\")
    left_value, right_value = exact_value(left_bare), exact_value(right_bare)
    if left_value is None or right_value is None:
        both_words = _WORDS.fullmatch(left) and _WORDS.fullmatch(right)
        return True if both_words and left.casefold() == right.casefold() and len(left) > 3 else None
    if (left_bare == left) == (right_bare == right):
        return _same_values(left_value, right_value)
    percent, plain = (right_value, left_value) if left_bare == left else (left_value, right_value)
    if percent.kind or plain.kind:
        return None
    return plain.rational in (percent.rational, percent.rational / 100)


def _same_tuples(left: list[str], right: list[str]) -> bool | None:
    values = [(exact_value(a), exact_value(b)) for a, b in zip(left, right, strict=False)]
    verdicts = [_same_values(a, b) if a is not None and b is not None else None for a, b in values]
    if False in verdicts:
        return False
    return None if None in verdicts or len(left) != len(right) else True


def _same_values(left: Exact, right: Exact) -> bool | None:
    """None for numbers so close that one may be a rounding of the other: how close is enough is for `judge` to say."""
    if left.kind == right.kind:
        close = abs(left.rational - right.rational) * 10_000 <= max(abs(left.rational), abs(right.rational))
        return left.rational == right.rational if left.rational == right.rational or not close else None
    # Of different kinds, so not equal; but a decimal may round a multiple of pi or a root.
    rational = left if left.kind == "" else right
    return False if (left.kind and right.kind) or rational.rational.denominator == 1 else None
