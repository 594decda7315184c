"""Sets of real numbers written as intervals, unions or inequalities, compared by where their ends are.

A set is a membership test over a tree; two sets are equal when they agree at every end of either and between every two
neighbouring ends, which is exact because nothing changes in between.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

from mpmath import mp

from reward.child import values
from reward.child.tree import Node
from reward.child.values import Undecided

_MAX_ENDS = 60
_ORDER = ("<", ">", "<=", ">=", "!=", "=")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


class Regionless(Exception):
    """Not a set of real numbers whose ends can be found."""


def is_region(node: Node) -> bool:
    """Whether a tree reads as a set of reals and as nothing else."""
    return node.head in ("interval", "union", "intersection", "difference", "field", "rel")


def same_region(left: Node, right: Node) -> bool:
    """Raise Regionless unless both are sets of reals with ends that have values."""
    names = _names(left) | _names(right)
    # "x > 3" and "(3, oo)", or the same symbol on both sides; "x > 3" and "y > 3" differ.
    if len({name.lower() for name in names}) > 1:
        if _names(left) and _names(right) and len(_names(left)) == len(_names(right)) == 1:
            return False
        raise Regionless("several symbols")
    mp.dps = values.LOW_DIGITS
    left, right = _without_bars(left), _without_bars(right)
    ends = _sorted([*_ends(left), *_ends(right)])
    if len(ends) > _MAX_ENDS:
        raise Regionless("too many ends")
    probes: list[Any] = list(ends)
    probes += [(a + b) / 2 for a, b in itertools.pairwise(ends)]
    probes += [ends[0] - 1, ends[-1] + 1] if ends else [Fraction(0)]
    left, right = _with_comma_read(left, probes), _with_comma_read(right, probes)
    return all(_contains(left, probe) == _contains(right, probe) for probe in probes)


def _with_comma_read(node: Node, probes: list[Any]) -> Node:
    """A list of conditions with commas holds all at once if that is possible ("x > 1, x < 3"), else one or another."""
    if node.head != "list" or node.data != ",":
        return node
    jointly = node._replace(data="and")
    conditions = all(item.head == "rel" for item in node.args)
    return jointly if conditions and any(_contains(jointly, probe) for probe in probes) else node._replace(data="or")


def _without_bars(node: Node) -> Node:
    """`|u| < c` as `-c < u < c`, and `|u| > c` as `u < -c or u > c`."""
    if node.head == "list":
        return node._replace(args=tuple(map(_without_bars, node.args)))
    if node.head != "rel" or len(node.data) != 1:
        return node
    (left, right), operator = node.args, node.data[0]
    if right.head == "fn" and right.data == "abs":
        left, right, operator = right, left, _FLIPPED.get(operator, operator)
    if left.head != "fn" or left.data != "abs" or values.symbols(right):
        return node
    inner, minus = left.args[0], Node("neg", (right,))
    if operator in ("<", "<="):
        return Node("rel", (minus, inner, right), (operator, operator))
    if operator in (">", ">="):
        outer = (Node("rel", (inner, minus), (_FLIPPED[operator],)), Node("rel", (inner, right), (operator,)))
        return Node("list", outer, "or")
    return node


def _names(node: Node) -> frozenset[str]:
    if node.head == "rel":
        return values.symbols(node)
    found: frozenset[str] = frozenset()
    if node.head in ("list", "union", "intersection", "difference"):
        for argument in node.args:
            found |= _names(argument)
    return found


def _sorted(ends: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for end in sorted(ends, key=values._inexact):
        if not kept or not _close(kept[-1], end):
            kept.append(end)
    return kept


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = values._inexact(a), values._inexact(b)
    return bool(abs(a - b) <= max(abs(a), abs(b), mp.mpf(10) ** -20) * mp.mpf(10) ** -30)


def _sign_of_infinity(node: Node) -> int:
    if node.head == "neg":
        return -_sign_of_infinity(node.args[0])
    return int(node == Node("const", (), "inf"))


def _real(node: Node) -> Any:
    try:
        value = values.evaluate(node, {})
    except Undecided as error:
        raise Regionless(str(error)) from error
    if not isinstance(value, Fraction) and mp.im(value) != 0:
        raise Regionless("an end that is not real")
    return value


def _linear_root(node: Node) -> tuple[Any, bool]:
    """(where an expression of one symbol is zero, whether it grows). Raise Regionless unless it is linear."""
    names = sorted(values.symbols(node))
    if len(names) != 1:
        raise Regionless("not one symbol")
    try:
        at = [values.evaluate(node, {names[0]: Fraction(x)}) for x in (0, 1, 2, -3)]
    except Undecided as error:
        raise Regionless(str(error)) from error
    if any(not isinstance(value, Fraction) and mp.im(value) != 0 for value in at):
        raise Regionless("not real")
    slope = at[1] - at[0] if isinstance(at[0], Fraction) == isinstance(at[1], Fraction) else _plus(at[1], at[0])
    if (
        _close(slope, Fraction(0))
        or not _close(at[2], _line(at[0], slope, 2))
        or not _close(at[3], _line(at[0], slope, -3))
    ):
        raise Regionless("not linear")
    if isinstance(at[0], Fraction) and isinstance(slope, Fraction):
        return -at[0] / slope, slope > 0
    return -values._inexact(at[0]) / values._inexact(slope), slope > 0


def _plus(a: Any, b: Any) -> Any:
    return values._inexact(a) - values._inexact(b)


def _line(start: Any, slope: Any, x: int) -> Any:
    if isinstance(start, Fraction) and isinstance(slope, Fraction):
        return start + slope * x
    return values._inexact(start) + values._inexact(slope) * x


def _steps(relation: Node) -> list[tuple[Any, str]]:
    """A chain of inequalities as [(end, operator of the symbol against the end)]."""
    found = []
    for index, operator in enumerate(relation.data):
        if operator not in _ORDER:
            raise Regionless(operator)
        left, right = relation.args[index], relation.args[index + 1]
        if _sign_of_infinity(left) or _sign_of_infinity(right):
            continue
        root, grows = _linear_root(Node("add", (left, Node("neg", (right,)))))
        found.append((root, operator if grows else _FLIPPED[operator]))
    return found


def _ends(node: Node) -> list[Any]:
    match node.head:
        case "interval" | "tuple":
            if len(node.args) != 2:
                raise Regionless("not an interval")
            ends = [_real(end) for end in node.args if not _sign_of_infinity(end)]
            if len(ends) == 2 and not _satisfies(ends[0], "<=", ends[1]):
                raise Regionless("ends in the wrong order")
            return ends
        case "set":
            return [_real(member) for member in node.args]
        case "union" | "intersection" | "difference":
            return [end for argument in node.args for end in _ends(argument)]
        case "field" if node.data == "R":
            return []
        case "list":
            if not all(is_region(item) or (item.head == "tuple" and node.data == "or") for item in node.args):
                raise Regionless("a list")
            return [end for item in node.args for end in _ends(item)]
        case "rel" if node.data[-1] in ("in", "notin") and len(node.args) == 2 and node.args[0].head == "sym":
            return _ends(node.args[1])
        case "rel":
            return [end for end, _ in _steps(node)]
    raise Regionless(node.head)


def _contains(node: Node, x: Any) -> bool:
    match node.head:
        case "interval" | "tuple":
            kind = node.data or "()"
            return _after(node.args[0], x, closed=kind[0] == "[") and _before(node.args[1], x, closed=kind[1] == "]")
        case "set":
            return any(_close(_real(member), x) for member in node.args)
        case "union":
            return any(_contains(argument, x) for argument in node.args)
        case "intersection":
            return all(_contains(argument, x) for argument in node.args)
        case "difference":
            return _contains(node.args[0], x) and not _contains(node.args[1], x)
        case "field":
            return True
        case "list":
            if node.data == "or":
                return any(_contains(item, x) for item in node.args)
            return all(_contains(item, x) for item in node.args)
        case "rel" if node.data[-1] in ("in", "notin"):
            return _contains(node.args[1], x) == (node.data[-1] == "in")
    return all(_satisfies(x, operator, end) for end, operator in _steps(node))


def _after(end: Node, x: Any, *, closed: bool) -> bool:
    if sign := _sign_of_infinity(end):
        return sign < 0
    return _satisfies(x, ">=" if closed else ">", _real(end))


def _before(end: Node, x: Any, *, closed: bool) -> bool:
    if sign := _sign_of_infinity(end):
        return sign > 0
    return _satisfies(x, "<=" if closed else "<", _real(end))


def _satisfies(x: Any, operator: str, end: Any) -> bool:
    if _close(x, end):
        return operator in ("<=", ">=", "=")
    if operator == "!=":
        return True
    less = values._inexact(x) < values._inexact(end)
    return less if operator in ("<", "<=") else operator in (">", ">=") and not less
