"""Equality of any two trees: lists, sets, tuples, intervals, matrices, ratios, and through them relations and scalars."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from reward.child.regions import Regionless, same_region
from reward.child.relations import (
    COLLECTIONS,
    has_named_values,
    is_inequality,
    same_named_values,
    same_relation,
    spread,
    without_name,
)
from reward.child.scalars import all_of, same_scalar
from reward.child.tree import Node, number
from reward.child.wording import word_key

_MAX_ITEMS = 60


def same(left: Node, right: Node) -> bool | None:
    if left == right:
        return True
    left, right = without_name(left, right), without_name(right, left)
    if left.head == "rel" or right.head == "rel":
        return same_relation(left, right, same)
    left, right = _with_factor_inside(left), _with_factor_inside(right)
    if has_named_values(left) or has_named_values(right):
        return same_named_values(left, right, same)
    left, right = spread(left), spread(right)
    if left.head == right.head == "field":
        return left.data == right.data
    for head in ("matrix", "ratio", "based", "phrase"):
        if left.head == head or right.head == head:
            return _SPECIAL[head](left, right)
    if _needs_region(left) or _needs_region(right):
        try:
            return same_region(left, right)
        except Regionless:
            return _same_intervals(left, right)
    if left.head in COLLECTIONS or right.head in COLLECTIONS:
        return _same_collection(left, right)
    return same_scalar(left, right)


def _needs_region(node: Node) -> bool:
    return node.head in ("interval", "union", "intersection", "difference", "field") or (
        node.head == "list" and any(_needs_region(item) or is_inequality(item) for item in node.args)
    )


def _same_intervals(left: Node, right: Node) -> bool | None:
    """Intervals with symbols at their ends: end by end."""
    if left.head == right.head and left.data == right.data and len(left.args) == len(right.args):
        return all_of(same(a, b) for a, b in zip(left.args, right.args, strict=True))
    if left.head == right.head == "interval":
        return False
    return None if left.head == right.head else False


def _same_matrix(left: Node, right: Node) -> bool | None:
    def rows(node: Node) -> tuple[tuple[Node, ...], ...] | None:
        return node.args if node.head == "matrix" else None

    a, b = rows(left), rows(right)
    if a is not None and b is not None:
        if (len(a), len(a[0])) != (len(b), len(b[0])):
            return False
        return all_of(same(x, y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))
    matrix, other = (a, right) if a is not None else (b, left)
    assert matrix is not None
    if other.head in ("tuple", "interval", "list") and all(row.head in ("tuple", "interval") for row in other.args):
        if {len(row.args) for row in other.args} != {len(matrix[0])}:
            return False
        return _same_matrix(Node("matrix", matrix), Node("matrix", tuple(row.args for row in other.args)))
    if other.head not in ("tuple", "interval", "list") or 1 not in (len(matrix), len(matrix[0])):
        return None if _mentions_matrix(other) else False
    cells = [cell for row in matrix for cell in row]
    if other.head == "interval" and other.data != "[]":
        return False
    return len(cells) == len(other.args) and all_of(same(x, y) for x, y in zip(cells, other.args, strict=True))


def _mentions_matrix(node: Node) -> bool:
    return node.head == "matrix" or any(isinstance(part, Node) and _mentions_matrix(part) for part in node.args)


def _with_factor_inside(node: Node) -> Node:
    """A multiple of a matrix as the matrix of multiples."""
    if node.head == "neg" and node.args[0].head == "matrix":
        node = Node("mul", (Node("neg", (number("1"),)), node.args[0]))
    if node.head == "mul" and "matrix" in (node.args[0].head, node.args[1].head):
        factor, matrix = node.args if node.args[1].head == "matrix" else reversed(node.args)
        if factor.head != "matrix":
            return Node("matrix", tuple(tuple(Node("mul", (factor, cell)) for cell in row) for row in matrix.args))
    return node


def _same_ratio(left: Node, right: Node) -> bool | None:
    if left.head == right.head:
        if len(left.args) != len(right.args):
            return False
        first, other = left.args[0], right.args[0]
        return all_of(
            same_scalar(Node("mul", (a, other)), Node("mul", (b, first)))
            for a, b in zip(left.args[1:], right.args[1:], strict=True)
        )
    ratio = left if left.head == "ratio" else right
    return same_scalar(left, right) if len(ratio.args) == 2 else False


def _same_based(left: Node, right: Node) -> bool | None:
    """Two numerals with bases by value; with and without a base by their digits, as problems that name the base are answered."""
    if left.head == right.head:
        return left.data[0] == right.data[0]
    based, other = (left, right) if left.head == "based" else (right, left)
    if other.head == "num":
        return other.data[1].lstrip("0") == based.data[1]
    return same_scalar(left, right) if based.data[2] == 10 else False


def _same_phrase(left: Node, right: Node) -> bool | None:
    return left.head == right.head and word_key(left.data) == word_key(right.data)


_SPECIAL: dict[str, Callable[[Node, Node], bool | None]] = {
    "matrix": _same_matrix,
    "ratio": _same_ratio,
    "based": _same_based,
    "phrase": _same_phrase,
}


def _same_collection(left: Node, right: Node) -> bool | None:
    if left.head not in COLLECTIONS or right.head not in COLLECTIONS:
        collection, single = (left, right) if left.head in COLLECTIONS else (right, left)
        if collection.head == "list" and collection.data == "," and _is_decimal_comma(collection):
            return same_scalar(_decimal_comma(collection), single)
        return collection.head == "set" and len(collection.args) == 1 and same(collection.args[0], single)
    left, right = _as_list(left, right), _as_list(right, left)
    if "tuple" in (left.head, right.head):
        if "set" in (left.head, right.head) or len(left.args) != len(right.args):
            return False
        return all_of(same(a, b) for a, b in zip(left.args, right.args, strict=True))
    if max(len(left.args), len(right.args)) > _MAX_ITEMS:
        return None
    as_sets = "set" in (left.head, right.head)
    a, b = (_distinct(left.args), _distinct(right.args)) if as_sets else (list(left.args), list(right.args))
    if len(a) != len(b):
        return False
    return _matched(a, b)


def _as_list(node: Node, other: Node) -> Node:
    """`[1, 2, 3]` is a list of values next to a set or a list of values, and otherwise keeps its order."""
    return Node("list", node.args, ",") if node.data == "[]" and other.head in ("set", "list") else node


def _is_decimal_comma(node: Node) -> bool:
    return (
        len(node.args) == 2
        and all(x.head == "num" and x.data[1].isdigit() for x in node.args)
        and node.args[0].data[1] == "0"
    )


def _decimal_comma(node: Node) -> Node:
    text = f"{node.args[0].data[1]}.{node.args[1].data[1]}"
    return Node("num", (), (Fraction(text), text))


def _distinct(items: tuple[Node, ...]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _matched(left: list[Node], right: list[Node]) -> bool | None:
    """Whether the items can be paired; equality is transitive but for roundings, so the first match is as good as any."""
    rest = list(right)
    for item in left:
        verdicts = [same(item, other) for other in rest]
        if True not in verdicts:
            return None if None in verdicts else False
        del rest[verdicts.index(True)]
    return True
