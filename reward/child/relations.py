"""Relations: names of values, equations, inequalities, and when one says the same as another or as a plain value."""

from __future__ import annotations

from collections.abc import Callable

from reward.child import values
from reward.child.regions import Regionless, same_region
from reward.child.scalars import all_of, proportional
from reward.child.tree import Node

Same = Callable[[Node, Node], bool | None]
"""Equality of any two trees, which relations need for their parts."""
COLLECTIONS = ("list", "set", "tuple")


def is_name(node: Node) -> bool:
    """A symbol, `f(x)`, words, `\\angle ABC`: what the left side of "x = 5" can be without taking part in the value."""
    if node.head in ("sym", "phrase"):
        return True
    if node.head == "fn" and node.data == "abs":
        return node.args[0].head == "sym" and node.args[0].data.isupper()
    if node.head == "degree":
        return is_name(node.args[0])
    if node.head in ("tuple", "ratio"):
        return all(map(is_name, node.args))
    if node.head == "div":
        return _is_differential(node.args[0]) and _is_differential(node.args[1])
    if node.head != "mul":
        return False
    if node.data == "call":
        return True
    factors = _factors(node)
    return all(factor.head == "sym" for factor in factors) and factors[0].data in ("angle", "triangle", "m", "Delta")


def _is_differential(node: Node) -> bool:
    return node.head == "mul" and node.args[0] == Node("sym", (), "d") and node.args[1].head == "sym"


def _factors(node: Node) -> list[Node]:
    return [*_factors(node.args[0]), *_factors(node.args[1])] if node.head == "mul" else [node]


def is_definition(node: Node) -> bool:
    return node.head == "rel" and set(node.data) == {"="} and is_name(node.args[0])


def without_name(node: Node, other: Node) -> Node:
    """The value of `x = 5` or of `2 + 3 = 5` next to an answer that is not a relation."""
    if other.head == "rel" or node.head != "rel":
        return node
    if has_named_values(other):
        return node
    if node.data[-1] == "in" and len(node.args) == 2 and is_name(node.args[0]):
        return node.args[1]
    if set(node.data) != {"="}:
        return node
    if is_name(node.args[0]) or not values.symbols(node.args[0]):
        return node.args[-1]
    return node


def has_named_values(node: Node) -> bool:
    """A list such as `x = 1, y = 2` or `x = 1 or x = 2` or `n = 2, 3, 4`."""
    return node.head in ("list", "tuple", "set") and bool(node.args) and is_definition(node.args[0])


def same_named_values(left: Node, right: Node, same: Same) -> bool | None:
    a, b = _pairs(left), _pairs(right)
    if a is None or b is None:
        return None
    names_a, names_b = [name for name, _ in a], [name for name, _ in b]
    if all(names_a) and all(names_b) and len(set(names_a)) == len(names_a) > 1:
        if sorted(map(str, names_a)) != sorted(map(str, names_b)):
            return False
        lookup = dict(b)
        return all_of(same(value, lookup[name]) for name, value in a)
    values_a, values_b = [value for _, value in a], [value for _, value in b]
    one_name = len(set(filter(None, names_a))) <= 1 and len(set(filter(None, names_b))) <= 1
    folded_a, folded_b = ({str(name).casefold() for name in names if name} for names in (names_a, names_b))
    if one_name and folded_a and folded_b and folded_a != folded_b:
        return False
    if "set" in (left.head, right.head) and not one_name:
        return False
    if one_name and "tuple" not in (left.head, right.head):
        return same(Node("list", tuple(values_a), ","), Node("list", tuple(values_b), ","))
    return len(a) == len(b) and all_of(same(x, y) for x, y in zip(values_a, values_b, strict=True))


def _pairs(node: Node) -> list[tuple[str | None, Node]] | None:
    if node.head == "rel" and node.data == ("in",) and is_name(node.args[0]) and node.args[1].head == "set":
        return [(_flat_name(node.args[0]), item) for item in node.args[1].args]
    if node.head == "rel" and is_definition(node):
        name, value = node.args[0], node.args[-1]
        if name.head == value.head == "tuple" and len(name.args) == len(value.args):
            return [(_flat_name(a), b) for a, b in zip(name.args, value.args, strict=True)]
        values_of_it = spread(value)
        items = values_of_it.args if values_of_it.head in ("list", "set") else (values_of_it,)
        return [(_flat_name(node.args[0]), item) for item in items]
    if node.head not in COLLECTIONS:
        return [(None, item) for item in _items(spread(node))]
    found: list[tuple[str | None, Node]] = []
    for item in node.args:
        if item.head == "rel" and not is_definition(item):
            return None
        pairs = _pairs(item) if item.head == "rel" else [(None, part) for part in _items(spread(item))]
        assert pairs is not None
        found += pairs
    return found


def _items(node: Node) -> tuple[Node, ...]:
    return node.args if node.head == "list" else (node,)


def _flat_name(node: Node) -> str:
    return str(node.data) if node.head in ("sym", "phrase") else repr(node)


def same_relation(left: Node, right: Node, same: Same) -> bool | None:
    if left.head == right.head:
        equations = all(set(node.data) == {"="} for node in (left, right))
        if equations:
            return _same_equation(left, right, same)
        if len(left.data) == len(right.data) > 1 and (values.symbols(left.args[0]) or values.symbols(left.args[-1])):
            left, right = _rising(left), _rising(right)
            if left.data == right.data:
                return all_of(same(a, b) for a, b in zip(left.args, right.args, strict=True))
        if len(left.data) == len(right.data) == 1 and left.data == right.data and left.data[0] in ("in", "notin"):
            return all_of([same(a, b) for a, b in zip(left.args, right.args, strict=True)])
    elif has_named_values(left) or has_named_values(right):
        return same_named_values(left, right, same)
    elif (relation := left if left.head == "rel" else right).data[0] == "~" or "~" in relation.data:
        other = right if relation is left else left
        if len(relation.args) == 2 and is_name(relation.args[0]):
            return same(relation.args[1], other)
        verdicts = [same(operand, other) for operand in relation.args if not is_name(operand)]
        return True if True in verdicts else None if None in verdicts else False
    elif set(relation.data) == {"="}:
        return None if relation.head != "rel" else False
    try:
        return same_region(left, right)
    except Regionless:
        return _same_inequality(left, right)


def _name_first(relation: Node) -> Node:
    """`3 = x` as `x = 3`."""
    turned = len(relation.args) == 2 and relation.args[1].head == "sym" and not values.symbols(relation.args[0])
    return relation._replace(args=relation.args[::-1]) if turned else relation


def _same_equation(left: Node, right: Node, same: Same) -> bool | None:
    left, right = _name_first(left), _name_first(right)
    if is_definition(left) and is_definition(right):
        a, b = left.args[0], right.args[0]
        same_name = _flat_name(a).casefold() == _flat_name(b).casefold()
        if same_name or "sym" not in (a.head, b.head) or a.head != b.head:
            verdict = same(left.args[-1], right.args[-1])
            if verdict is not False or (same_name and not _mentions(left, a) and not _mentions(right, b)):
                return verdict
    if len(left.args) != 2 or len(right.args) != 2:
        return same(left.args[-1], right.args[-1]) if left.args[0] == right.args[0] else None
    for relation, other in ((left, right), (right, left)):
        # "2x = 10" does not state x, and "x = 5" does.
        if is_definition(relation) and not values.symbols(relation.args[-1]) and not is_definition(other):
            return False
    return proportional(_difference(left), _difference(right), signed=False)


def _mentions(relation: Node, name: Node) -> bool:
    return bool(values.symbols(name) & values.symbols(relation.args[-1]))


def _rising(relation: Node) -> Node:
    """`c > b > a` as `a < b < c`."""
    if set(relation.data) <= {">", ">="}:
        operators = tuple(_TURNED[operator] for operator in reversed(relation.data))
        return Node("rel", relation.args[::-1], operators)
    return relation


def _difference(relation: Node) -> Node:
    return Node("add", (relation.args[0], Node("neg", (relation.args[1],))))


_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def _same_inequality(left: Node, right: Node) -> bool | None:
    """Inequalities of several symbols: the same side of the same surface."""
    sides = []
    for node in (left, right):
        if node.head != "rel" or len(node.data) != 1 or node.data[0] not in (*_TURNED, "!="):
            return None if node.head == "rel" else False
        difference = _difference(node)
        if node.data[0] in (">", ">="):
            difference = Node("neg", (difference,))
        sides.append((difference, node.data[0].replace(">", "<")))
    if sides[0][1] != sides[1][1]:
        return False
    return proportional(sides[0][0], sides[1][0], signed=sides[0][1] != "!=")


def is_inequality(node: Node) -> bool:
    return node.head == "rel" and set(node.data) <= _TURNED.keys() | {"!="}


def spread(node: Node) -> Node:
    """Plus-minus as the list of both values, inside lists too."""
    if node.head == "list":
        items: list[Node] = []
        for item in node.args:
            both = spread(item)
            items += both.args if both.head == "list" else [both]
        return node._replace(args=tuple(items))
    if node.head == "set" and len(node.args) == 1 and _has_sign(node.args[0]):
        return Node("set", spread(node.args[0]).args)
    if node.head not in (*COLLECTIONS, "matrix", "interval", "rel") and _has_sign(node):
        return Node("list", (_signed(node, "\\pm"), _signed(node, "\\mp")), "or")
    return node


def _has_sign(node: Node) -> bool:
    return node.head == "pm" or any(isinstance(argument, Node) and _has_sign(argument) for argument in node.args)


def _signed(node: Node, plus: str) -> Node:
    if node.head == "pm":
        inner = _signed(node.args[0], plus)
        return inner if node.data == plus else Node("neg", (inner,))
    return node._replace(args=tuple(_signed(x, plus) if isinstance(x, Node) else x for x in node.args))
