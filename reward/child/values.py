"""Values of expression trees: exact rational arithmetic as far as it goes, then mpmath at a stated precision.

A value is a Fraction, or an mpf or mpc. Sizes are bounded before anything is computed, and a sum in which one term is too
small to leave a trace raises Undecided instead of losing it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import mp

from reward.child.tables import TRIGONOMETRIC, words
from reward.child.tree import Node

_MAX_BITS = 100_000
_MAX_FACTORIAL = 5000
Value = Any
"""Fraction | mpmath.mpf | mpmath.mpc"""


class Undecided(Exception):
    """No value, or none that can be trusted."""


def symbols(node: Node) -> frozenset[str]:
    """Names without a fixed value."""
    if node.head == "sym":
        return frozenset((node.data,))
    found: frozenset[str] = frozenset()
    for argument in node.args:
        found |= symbols(argument) if isinstance(argument, Node) else frozenset().union(*map(symbols, argument))
    return found


def evaluate(node: Node, point: Mapping[str, Fraction], angle: bool = False) -> Value:
    """The value of an expression where its symbols have the values of `point`. Raise Undecided where there is none.

    angle: whether the expression is the argument of a trigonometric function, where degrees are radians.
    """
    head = node.head
    if head == "num":
        return node.data[0]
    if head == "sym":
        if node.data not in point:
            raise Undecided(node.data)
        return point[node.data]
    if head == "const":
        return _constant(node.data)
    if head == "based":
        return Fraction(node.data[0])
    if head == "neg":
        return -evaluate(node.args[0], point, angle)
    if head == "add":
        return _sum([evaluate(term, point, angle) for term in node.args])
    if head == "mul":
        return _product(evaluate(node.args[0], point, angle), evaluate(node.args[1], point, angle))
    if head == "div":
        return _quotient(evaluate(node.args[0], point, angle), evaluate(node.args[1], point, angle))
    if head == "ratio" and len(node.args) == 2:
        return _quotient(evaluate(node.args[0], point), evaluate(node.args[1], point))
    if head == "pow":
        return _power(evaluate(node.args[0], point), evaluate(node.args[1], point))
    if head == "percent":
        return evaluate(node.args[0], point) / 100
    if head == "degree":
        value = evaluate(node.args[0], point)
        return _inexact(value) * mp.pi / 180 if angle else value
    if head == "fn":
        if node.data == "det":
            return _determinant(node.args[0], point)
        trigonometric = node.data in TRIGONOMETRIC
        return _call(node.data, [evaluate(argument, point, trigonometric) for argument in node.args])
    raise Undecided(head)


def _inexact(value: Value) -> Value:
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _constant(name: str) -> Value:
    if name == "pi":
        return +mp.pi
    if name == "e":
        return +mp.e
    if name == "i":
        return mp.mpc(0, 1)
    raise Undecided(name)


def _sum(terms: list[Value]) -> Value:
    exact = sum((term for term in terms if isinstance(term, Fraction)), Fraction(0))
    inexact = [term for term in terms if not isinstance(term, Fraction)]
    if not inexact:
        return exact
    if exact:
        inexact.append(_inexact(exact))
    sizes = [mp.mag(term) for term in inexact if term != 0]
    if sizes and max(sizes) - min(sizes) > mp.prec // 2:
        raise Undecided("a term too small to be seen")
    return mp.fsum(inexact)


def _product(left: Value, right: Value) -> Value:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return _bounded(left) * _bounded(right)
    return _inexact(left) * _inexact(right)


def _quotient(left: Value, right: Value) -> Value:
    if right == 0:
        raise Undecided("division by zero")
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return _bounded(left) / _bounded(right)
    return _inexact(left) / _inexact(right)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Undecided("a number of too many digits")
    return value


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if base == 0:
            if exponent > 0:
                return Fraction(0)
            raise Undecided("zero to a power that is not positive")
        if base == 1:
            return base
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent.numerator) <= _MAX_BITS:
                return base**exponent.numerator
        elif base > 0 and exponent.denominator <= 12 and abs(exponent.numerator) <= 1000:
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return _power(root, Fraction(exponent.numerator))
    left, right = _inexact(base), _inexact(exponent)
    if left == 0:
        raise Undecided("zero to a power that is not exact")
    if mp.mag(right) > 60 or (left != 1 and mp.mag(right) + mp.mag(mp.log(left)) > 60):
        raise Undecided("an exponent out of bounds")
    return _real(mp.power(left, right))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    parts = []
    for part in (value.numerator, value.denominator):
        if part.bit_length() > 4000:
            return None
        root = _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _integer_root(value: int, degree: int) -> int:
    if degree == 2:
        return math.isqrt(value)
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def _real(value: Value) -> Value:
    return value.real if isinstance(value, mpmath.mpc) and value.imag == 0 else value


def _determinant(matrix: Node, point: Mapping[str, Fraction]) -> Value:
    if len(matrix.args) != len(matrix.args[0]) or len(matrix.args) > 4:
        raise Undecided("a determinant")
    rows = [[evaluate(cell, point) for cell in row] for row in matrix.args]
    return _minor(rows)


def _minor(rows: list[list[Value]]) -> Value:
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for column, cell in enumerate(rows[0]):
        rest = [row[:column] + row[column + 1 :] for row in rows[1:]]
        terms.append(_product(cell, _minor(rest)) * (-1 if column % 2 else 1))
    return _sum(terms)


def _call(name: str, arguments: list[Value]) -> Value:
    if name == "root":
        return _root(*arguments)
    exact = _exact_call(name, arguments)
    if exact is not None:
        return exact
    values = [_inexact(argument) for argument in arguments]
    if any(mp.mag(value) > 1000 for value in values if value != 0):
        raise Undecided("an argument out of bounds")
    function = _MPMATH.get((name, len(values)))
    if function is None:
        raise Undecided(name)
    try:
        result = _real(function(*values))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError, mp.NoConvergence) as error:
        raise Undecided(f"{name}: {error}") from error
    if not mp.isfinite(result) or (name in _POLES and result != 0 and mp.mag(result) > mp.prec // 2):
        raise Undecided(f"{name} at a pole")
    return result


def _root(value: Value, degree: Value) -> Value:
    """The principal root, and the real one of a negative number for an odd degree."""
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 0 < degree.numerator <= 1000:
        return _power(value, _quotient(Fraction(1), degree))
    odd = degree.numerator % 2 == 1
    if odd and not isinstance(value, mpmath.mpc) and value < 0:
        return -_power(-value, 1 / degree)
    return _power(value, 1 / degree)


def _exact_call(name: str, arguments: list[Value]) -> Value | None:
    if not all(isinstance(argument, Fraction) for argument in arguments):
        return None
    first = arguments[0]
    if name == "abs" and len(arguments) == 1:
        return abs(first)
    if name in ("floor", "ceil") and len(arguments) == 1:
        return Fraction(math.floor(first) if name == "floor" else math.ceil(first))
    if name in ("max", "min") and arguments:
        return max(arguments) if name == "max" else min(arguments)
    integers = [argument.numerator for argument in arguments if argument.denominator == 1]
    if len(integers) < len(arguments):
        return None
    if name == "factorial" and 0 <= integers[0] <= _MAX_FACTORIAL:
        return Fraction(math.factorial(integers[0]))
    if name == "binom" and len(integers) == 2 and integers[1] >= 0 and 0 <= integers[0] <= _MAX_FACTORIAL:
        return Fraction(math.comb(*integers))
    if name == "gcd" and len(integers) > 1:
        return Fraction(math.gcd(*integers))
    if name == "lcm" and len(integers) > 1:
        return Fraction(math.lcm(*integers))
    return None


def _log(value: Any, base: Any = 10) -> Any:
    return mp.log(value) / mp.log(base)


_POLES = words("tan cot sec csc gamma Gamma factorial")
_OF_MPMATH = words(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch asin acos atan acot asec acsc asinh acosh atanh exp factorial erf"
)
_ONE_ARGUMENT: dict[str, Any] = {name: getattr(mp, name) for name in _OF_MPMATH} | {
    "ln": mp.log, "log": _log, "lg": _log, "gamma": mp.gamma, "Gamma": mp.gamma, "abs": mp.fabs, "sqrt": mp.sqrt,
    "cbrt": mp.cbrt, "Re": mp.re, "re": mp.re, "Im": mp.im, "im": mp.im, "arg": mp.arg, "floor": mp.floor, "ceil": mp.ceil,
    "sgn": mp.sign,
}  # fmt: skip
_MPMATH = {(name, 1): function for name, function in _ONE_ARGUMENT.items()}
_MPMATH |= {("log", 2): _log, ("binom", 2): mp.binomial, ("max", 2): max, ("min", 2): min}


# -- equality of values

LOW_DIGITS, HIGH_DIGITS = 60, 240


def same_value(left: Node, right: Node, point: Mapping[str, Fraction], *, only_real: bool = False) -> bool | None:
    """Whether two expressions are equal at a point, None where they cannot be compared there.

    Rational values are compared exactly. Others agree when they do to 40 digits, and are both zero when their difference
    shrinks with the precision; a difference that is neither plain nor vanishing is looked at with more digits.
    """
    try:
        mp.dps = LOW_DIGITS
        a, b = evaluate(left, point), evaluate(right, point)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        if only_real and (isinstance(a, mpmath.mpc) or isinstance(b, mpmath.mpc)):
            return None
        a, b = _inexact(a), _inexact(b)
        size, gap = max(abs(a), abs(b)), abs(a - b)
        if gap <= size * mp.mpf(10) ** -40:
            return True
        if gap > size / 10**6 and size > mp.mpf(10) ** -20:
            return False
    except Undecided:
        size = gap = None
    try:
        mp.dps = HIGH_DIGITS
        a, b = _inexact(evaluate(left, point)), _inexact(evaluate(right, point))
        closer, larger = abs(a - b), max(abs(a), abs(b))
        if closer <= larger * mp.mpf(10) ** -150:
            return True
        if gap is None or size is None:
            return False if closer > larger * mp.mpf(10) ** -120 else None
        return bool(closer <= gap * mp.mpf(10) ** -(HIGH_DIGITS - LOW_DIGITS) * 10**20)
    except Undecided:
        return None


def number_of(node: Node) -> Value | None:
    """The value of an expression without symbols, at low precision; None where it has none."""
    try:
        mp.dps = LOW_DIGITS
        return evaluate(node, {})
    except Undecided:
        return None
