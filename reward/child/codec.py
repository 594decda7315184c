"""Plain Python values as JSON with type tags, so that no object of a candidate ever crosses a process boundary.

A value is a list whose first entry is its tag. Only exact built-in types (and a few of the standard library) have a tag:
a subclass of int or str, which could carry its own __eq__, becomes opaque, and an opaque value equals nothing.
Integers and floats travel as hexadecimal text: exact, and free of the digit limit of int().
"""

from __future__ import annotations

import collections
import decimal
import fractions
import itertools
from typing import Any

MAX_DEPTH = 100
MAX_NODES = 200_000

_SEQUENCE_TAGS = {list: "l", tuple: "t", set: "S", frozenset: "F", collections.deque: "D"}
_DICT_TYPES = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_ITERATOR_TYPES = (
    type(iter([])), type(iter(())), type(iter({})), type(iter(set())), type(iter("")), type(iter(range(0))),
    type(reversed([])), type(_ for _ in ()), map, filter, zip, enumerate, type({}.values()), type({}.items()),
    itertools.chain, itertools.islice, itertools.accumulate, itertools.combinations, itertools.permutations,
    itertools.product,
)  # fmt: skip
_KEYS_TYPE = type({}.keys())


class TooLargeError(ValueError):
    """A value has more than MAX_NODES parts or more than MAX_DEPTH levels."""


def encode(value: Any) -> list[Any]:
    """Returns the tagged form of `value`; raises TooLargeError past the limits."""
    return _encode(value, MAX_DEPTH, [MAX_NODES])


def _encode(value: Any, depth: int, budget: list[int]) -> list[Any]:
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        raise TooLargeError(f"value of more than {MAX_NODES} parts or {MAX_DEPTH} levels")
    kind = type(value)
    if value is None:
        return ["n"]
    if kind is bool:
        return ["b", int(value)]
    if kind is int:
        return ["i", hex(value)]
    if kind is float:
        return ["f", value.hex()]
    if kind is str:
        return ["s", value]
    if kind in _SEQUENCE_TAGS:
        return [_SEQUENCE_TAGS[kind], [_encode(part, depth - 1, budget) for part in value]]
    if kind in _DICT_TYPES:
        pairs = [[_encode(k, depth - 1, budget), _encode(v, depth - 1, budget)] for k, v in dict.items(value)]
        return ["d", pairs]
    return _encode_rare(value, kind, depth, budget)


def _encode_rare(value: Any, kind: type, depth: int, budget: list[int]) -> list[Any]:
    if kind is bytes or kind is bytearray:
        return ["y", bytes(value).hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is fractions.Fraction:
        return ["q", hex(value.numerator), hex(value.denominator)]
    if kind is decimal.Decimal:
        return ["m", str(value)]
    if kind is range:
        return ["r", hex(value.start), hex(value.stop), hex(value.step)]
    if kind is _KEYS_TYPE:
        return ["S", [_encode(part, depth - 1, budget) for part in value]]
    if kind in _ITERATOR_TYPES:
        # islice: an endless generator stops at the node budget.
        return ["I", [_encode(part, depth - 1, budget) for part in itertools.islice(value, MAX_NODES + 1)]]
    if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        return ["t", [_encode(part, depth - 1, budget) for part in tuple.__iter__(value)]]
    return ["o", str(kind.__name__)[:80]]


class Opaque:
    """Stands for a value without a tag; equal to nothing, not even itself."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<opaque {self.type_name}>"


def decode(tagged: Any, depth: int = MAX_DEPTH) -> Any:
    """The inverse of encode. Raises ValueError, TypeError, KeyError, IndexError or OverflowError on a malformed value.

    Building a set or dict of hostile keys takes quadratic time: decode only in a process with a deadline, or values of
    bounded size.
    """
    if depth < 0:
        raise TooLargeError(f"value of more than {MAX_DEPTH} levels")
    if type(tagged) is not list or not tagged:
        raise ValueError("not a tagged value")
    tag = tagged[0]
    if tag in _SCALARS:
        return _SCALARS[tag](tagged)
    if tag == "d":
        return {decode(k, depth - 1): decode(v, depth - 1) for k, v in tagged[1]}
    return _CONTAINERS[tag](decode(part, depth - 1) for part in tagged[1])


def _int(text: Any) -> int:
    return int(text, 16)


_SCALARS: dict[str, Any] = {
    "n": lambda t: None,
    "b": lambda t: bool(t[1]),
    "i": lambda t: _int(t[1]),
    "f": lambda t: float.fromhex(t[1]),
    "s": lambda t: str(t[1]),
    "y": lambda t: bytes.fromhex(t[1]),
    "c": lambda t: complex(float.fromhex(t[1]), float.fromhex(t[2])),
    "q": lambda t: fractions.Fraction(_int(t[1]), _int(t[2])),
    "m": lambda t: decimal.Decimal(t[1]),
    "r": lambda t: range(_int(t[1]), _int(t[2]), _int(t[3])),
    "o": lambda t: Opaque(str(t[1])),
}
_CONTAINERS: dict[str, Any] = {
    "l": list, "t": tuple, "S": set, "F": frozenset, "D": collections.deque, "I": lambda parts: iter(list(parts)),
}  # fmt: skip
