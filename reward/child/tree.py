"""The tree an answer is read into: what its nodes are, and the numerals at its leaves."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

_MAX_DIGITS = 400


class Unreadable(Exception):
    """The text is not an answer the grammar knows."""


class Node(NamedTuple):
    """An expression or a structure of expressions; `data` holds what is not a child (a value, a name, an operator)."""

    head: str
    args: tuple[Any, ...] = ()
    data: Any = None


def number(text: str) -> Node:
    """A literal with its exact value and the text that shows how precisely it was stated."""
    if len(text) > _MAX_DIGITS:
        raise Unreadable("a number of more digits than an answer has")
    return Node("num", (), (Fraction(text), text))


def repeating(text: str) -> Node:
    """A decimal whose last digits repeat for ever: 0.1\\overline{6} or 0.1(6)."""
    match = re.fullmatch(r"(\d*)\.(\d*)\D+(\d+)\D", text)
    if match is None or len(text) > _MAX_DIGITS:
        raise Unreadable("a repeating decimal")
    start, period = match[2], match[3]
    whole = Fraction(f"{match[1] or 0}.{start or 0}")
    value = whole + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
    return Node("num", (), (value, "repeating"))


def based(digits: str, base: int) -> Node:
    """A numeral with its base. Raise Unreadable for a digit the base does not have."""
    if not 2 <= base <= 36 or len(digits) > _MAX_DIGITS:
        raise Unreadable(f"base {base}")
    try:
        return Node("based", (), (int(digits, base), digits.lstrip("0").upper(), base))
    except ValueError as error:
        raise Unreadable(f"{digits} in base {base}") from error
