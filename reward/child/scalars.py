"""Equality of two numbers or expressions.

Numbers are compared exactly; expressions with symbols at several rational points, which for polynomials and rational
functions is exact arithmetic (R. DeMillo, R. Lipton 1978; J. Schwartz 1980), and for the rest agreement to 40 digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from mpmath import mp

from reward.child import values
from reward.child.tree import Node
from reward.child.values import Undecided

MIN_DIGITS = 6
"""Significant digits from which a decimal counts as the rounding of an exact value."""
_POSITIVE = (Fraction(137, 101), Fraction(211, 337), Fraction(409, 149))
_OTHER = (Fraction(-83, 131), Fraction(-271, 97))
_STRIDE = Fraction(29, 113)


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """True if all are, False if one is, else None."""
    unsure = False
    for verdict in verdicts:
        if verdict is False:
            return False
        unsure |= verdict is None
    return None if unsure else True


def same_scalar(left: Node, right: Node) -> bool | None:
    """Equality of two numbers or expressions; a number and its percent are equal when one of them has no percent sign."""
    if _infinite(left) or _infinite(right):
        return _infinite(left) == _infinite(right) if _infinite(left) and _infinite(right) else False
    if (left.head == "percent") != (right.head == "percent"):
        percent, plain = (left, right) if left.head == "percent" else (right, left)
        if same_expression(percent.args[0], plain):
            return True
    return same_expression(left, right)


def _infinite(node: Node) -> int:
    if node.head in ("neg", "pm"):
        return -_infinite(node.args[0])
    return int(node == Node("const", (), "inf"))


def same_expression(left: Node, right: Node) -> bool | None:
    names = values.symbols(left) | values.symbols(right)
    if not names:
        verdict = values.same_value(left, right, {})
        return True if verdict is False and _rounded(left, right) else verdict
    verdict = _same_everywhere(left, right, sorted(names))
    if verdict is False and values.symbols(left) != values.symbols(right):
        lower_left, lower_right = _lower(left), _lower(right)
        if (
            lower_left is not None
            and lower_right is not None
            and values.symbols(lower_left) == values.symbols(lower_right)
        ):
            return _same_everywhere(lower_left, lower_right, sorted(values.symbols(lower_left)))
    return verdict


def _lower(node: Node) -> Node | None:
    """The expression with symbols in lower case, None if two of them would become one."""
    names = values.symbols(node)
    if len({name.lower() for name in names}) < len(names):
        return None

    def lower(part: Node) -> Node:
        if part.head == "sym":
            return Node("sym", (), part.data.lower())
        return part._replace(args=tuple(lower(x) if isinstance(x, Node) else x for x in part.args))

    return lower(node)


def _same_everywhere(left: Node, right: Node, names: list[str]) -> bool | None:
    agreed = 0
    for index, point in enumerate(_points(names)):
        verdict = values.same_value(left, right, point, only_real=index >= len(_POSITIVE))
        if verdict is False:
            return False
        agreed += verdict is True
    return True if agreed >= 2 else None


def proportional(left: Node, right: Node, *, signed: bool) -> bool | None:
    """Whether one expression is a constant (signed: positive constant) times the other."""
    names = sorted(values.symbols(left) | values.symbols(right))
    if not names or values.symbols(left) != values.symbols(right):
        return False
    quotient = Node("div", (left, right))
    point = _points(names)[0]
    try:
        factor = values.evaluate(quotient, point)
        if factor == 0 or (signed and factor <= 0):
            return False
    except (Undecided, TypeError):
        return None
    if isinstance(factor, Fraction):
        constant = Node("num", (), (factor, ""))
        return same_expression(left, Node("mul", (right, constant)))
    at_first = Node("div", (_at(left, point), _at(right, point)))
    return same_expression(left, Node("mul", (right, at_first)))


def _at(node: Node, point: dict[str, Fraction]) -> Node:
    if node.head == "sym":
        return Node("num", (), (point[node.data], ""))
    return node._replace(args=tuple(_at(x, point) if isinstance(x, Node) else x for x in node.args))


def _points(names: list[str]) -> list[dict[str, Fraction]]:
    return [
        {name: start + (_STRIDE * place if start > 0 else -_STRIDE * place) for place, name in enumerate(names)}
        for start in (*_POSITIVE, *_OTHER)
    ]


def _rounded(left: Node, right: Node) -> bool:
    """Whether one side is a decimal that rounds the other to at least MIN_DIGITS digits (decimals, where that is finite)."""
    a, b = _decimal(left), _decimal(right)
    x, y = values.number_of(left), values.number_of(right)
    if x is None or y is None or (a is None and b is None) or x == 0 or y == 0:
        return False
    gap = abs(values._inexact(x) - values._inexact(y))
    if max(side[1] for side in (a, b) if side is not None) >= 15 and gap <= abs(values._inexact(x)) * mp.mpf(10) ** -13:
        return True  # 0.30000000000000004
    candidates = [side for side in (a, b) if side is not None]
    coarse = min(candidates, key=lambda side: side[1])
    fine = y if coarse is a else x
    if isinstance(fine, Fraction) and fine.denominator == 1:
        return False
    digits = coarse[2] if isinstance(fine, Fraction) and _terminates(fine) else coarse[1]
    return digits >= MIN_DIGITS and bool(gap * 2 <= values._inexact(coarse[0]))


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """(unit of the last place, significant digits, digits after the point) of a decimal literal, else None."""
    if node.head == "neg":
        return _decimal(node.args[0])
    if node.head == "num" and "." in node.data[1]:
        whole, _, places = node.data[1].partition(".")
        return Fraction(1, 10 ** len(places)), len((whole + places).lstrip("0")), len(places)
    if node.head == "mul" and node.args[1].head == "pow" and (inner := _decimal(node.args[0])):
        scale = values.number_of(node.args[1])
        if isinstance(scale, Fraction) and node.args[1].args[0].head == "num" and node.args[1].args[0].data[0] == 10:
            return inner[0] * scale, inner[1], inner[2]
    return None
