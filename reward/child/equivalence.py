"""Whether two answers say the same, decided from their readings. Symmetric, and conservative: None where it is not certain."""

from __future__ import annotations

import dataclasses
import re

from reward.child import special, units
from reward.child.reading import Reading, read
from reward.child.regions import is_region
from reward.child.structures import same
from reward.child.tree import Node
from reward.child.wording import word_key

_SPACED_UNIT = re.compile(r"[\d.]+ (?:[mgshLNJWV]|m\^\{?[23]\}?)")


def equivalent(gold: str, answer: str) -> bool | None:
    """True, False, or None where neither is certain."""
    left, right = read(gold), read(answer)
    if left.plain == right.plain:
        return True
    for compare in (_as_choices, _as_times, _as_dates):
        if (verdict := compare(gold, answer)) is not None:
            return verdict
    if (verdict := _as_words(left, right)) is not None:
        return verdict
    if left.node is None or right.node is None:
        return None
    left, right = _unit_letter(left, right), _unit_letter(right, left)
    if left.node is None or right.node is None:
        return None
    if left.parameter and right.parameter and left.parameter != right.parameter:
        assert right.node is not None
        right = dataclasses.replace(right, node=_renamed(right.node, right.parameter, left.parameter))
    kinds = _dimension(left), _dimension(right)
    if None not in kinds and kinds[0] != kinds[1]:
        return False
    if left.dimension and right.dimension and left.factor != right.factor:
        return same(_scaled(left), _scaled(right))
    assert left.node is not None and right.node is not None
    return same(left.node, right.node)


def _dimension(side: Reading) -> str | None:
    """What a quantity is measured in, None for a number or for words that name no unit."""
    head = side.node.head if side.node is not None else ""
    return side.dimension or (head if head in ("percent", "degree") and not side.unit else None)


def _unit_letter(side: Reading, other: Reading) -> Reading:
    """`5 m` and `5 m^2` next to an answer in a known unit, or to a number, are metres, not a symbol times five."""
    node = side.node
    if side.unit or node is None or node.head != "mul" or node.args[0].head != "num":
        return side
    symbol, power = node.args[1], 1
    if symbol.head == "pow" and symbol.args[1].head == "num":
        symbol, power = symbol.args[0], symbol.args[1].data[0]
    beside_a_number = other.node is not None and other.node.head == "num" and _SPACED_UNIT.fullmatch(side.plain)
    if symbol.head != "sym" or (other.dimension is None and not beside_a_number):
        return side
    unit = symbol.data if power == 1 else f"{symbol.data}^{power}"
    dimension, factor = units.known_unit(unit)
    if dimension is None:
        return side
    return dataclasses.replace(side, node=node.args[0], unit=unit, dimension=dimension, factor=factor)


def _renamed(node: Node, old: str, new: str) -> Node:
    if node.head == "sym":
        return node._replace(data=new if node.data == old else node.data)
    return node._replace(args=tuple(_renamed(part, old, new) if isinstance(part, Node) else part for part in node.args))


def _scaled(side: Reading) -> Node:
    assert side.node is not None
    return Node("mul", (side.node, Node("num", (), (side.factor, "1"))))


# -- answers that are not mathematics


def _as_choices(gold: str, answer: str) -> bool | None:
    left, right = special.choice(gold), special.choice(answer)
    if left is None or right is None:
        return None
    if left[1] and right[1]:
        return left[0] == right[0] and equivalent(left[1], right[1])
    return left[0] == right[0]


def _as_times(gold: str, answer: str) -> bool | None:
    left, right = special.clock_time(gold), special.clock_time(answer)
    if left is None or right is None:
        return None
    if left[1] == right[1] or left[2] or right[2]:
        return left[0] == right[0]
    return (left[0] - right[0]) % 43200 == 0


def _as_dates(gold: str, answer: str) -> bool | None:
    left, right = special.calendar_date(gold), special.calendar_date(answer)
    return None if left is None or right is None else left == right


def _as_words(left: Reading, right: Reading) -> bool | None:
    if left.words is not None and right.words is not None:
        if word_key(left.words) == word_key(right.words):
            return True
        # Short runs of letters may be products of symbols.
        return None if left.node is not None and right.node is not None else False
    for words, own, node in ((left.words, left.node, right.node), (right.words, right.node, left.node)):
        if words is None or node is None or (own is not None and own.head in ("num", "const")):
            continue
        key = word_key(words)
        if key == "none" and node == Node("set"):
            return True
        if key == "real line" and (is_region(node) or node.head == "tuple"):
            return same(node, Node("field", (), "R"))
        if len(words) > 4 or " " in words:
            return False
    return None
