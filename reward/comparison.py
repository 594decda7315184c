"""Comparisons that allow what a problem allows: the format and the last digits of a floating point number.

The returned side is hostile: recursion follows the expected side only, and text becomes a number only where it is short.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from reward.child import wire

FLOAT_TOLERANCE = 1e-6
"""Absolute or relative, where a problem states none."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_MAX_NUMBER_CHARS = 400


def same_json(tree: Any, expected: Any, tolerance: float) -> bool:
    """Whether a returned value (a tree of `wire.encode`) is the expected JSON value.

    Tuples and deques count as lists. A number is compared within `tolerance` where the expected one is a float, exactly
    where it is an integer (2.0 is 2). Raise WireError for a malformed tree.
    """
    if expected is None or isinstance(expected, str):
        return tree == expected and isinstance(tree, type(expected))
    if isinstance(expected, float):
        returned = _number(tree)
        return returned is not None and _close(returned, expected, tolerance)
    if isinstance(expected, int):
        return wire.canonical(tree) == f"n{int(expected):x}"
    match tree:
        case ["l" | "t" | "q", list(items)] if isinstance(expected, list):
            return len(items) == len(expected) and all(
                same_json(item, wanted, tolerance) for item, wanted in zip(items, expected, strict=True)
            )
        case ["d", list(pairs)] if isinstance(expected, Mapping):
            values = {
                pair[0]: pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str
            }
            return len(pairs) == len(expected) and all(
                key in values and same_json(values[key], wanted, tolerance) for key, wanted in expected.items()
            )
    return False


def same_output(written: str, expected: str, tolerance: float | None) -> bool:
    """Whether a program wrote what was expected, blind to white space at the ends of lines and its amount within.

    Args:
        tolerance: None compares a token as a number, within FLOAT_TOLERANCE, only where the expected token is written with
            a decimal point; a number, also where only the program's is; 0 compares text.
    """
    lines, wanted_lines = written.rstrip().splitlines(), expected.rstrip().splitlines()
    return len(lines) == len(wanted_lines) and all(
        _same_tokens(line.split(), wanted.split(), tolerance) for line, wanted in zip(lines, wanted_lines, strict=True)
    )


def _same_tokens(tokens: Sequence[str], wanted: Sequence[str], tolerance: float | None) -> bool:
    return len(tokens) == len(wanted) and all(
        token == want or _same_decimal(token, want, tolerance) for token, want in zip(tokens, wanted, strict=True)
    )


def _same_decimal(token: str, want: str, tolerance: float | None) -> bool:
    if tolerance == 0 or not ("." in want or (tolerance is not None and "." in token)):
        return False
    if max(len(token), len(want)) > _MAX_NUMBER_CHARS or not (_NUMBER.fullmatch(token) and _NUMBER.fullmatch(want)):
        return False
    return _close(float(token), float(want), FLOAT_TOLERANCE if tolerance is None else tolerance)


def _close(number: float, expected: float, tolerance: float) -> bool:
    # An infinite `number` is close to nothing; NaN compares false.
    return abs(number - expected) <= tolerance * max(1.0, abs(expected))


def _number(tree: Any) -> float | None:
    """The value of a tree that is a number of moderate size."""
    if isinstance(tree, int):
        return float(tree)
    try:
        match tree:
            case ["f", str(digits)]:
                return float.fromhex(digits)
            case ["i", str(digits)]:
                return float(int(digits, 16))
            case ["F", str(numerator), str(denominator)] if len(numerator) + len(denominator) <= _MAX_NUMBER_CHARS:
                return float(Fraction(int(numerator, 16), int(denominator, 16)))
            case ["D", str(digits)] if len(digits) <= _MAX_NUMBER_CHARS and _NUMBER.fullmatch(digits):
                return float(digits)
    except (ValueError, ArithmeticError):
        return None
    return None
