"""Wrong programs made from a right one, to see whether its tests notice.

A mutant differs from the reference solution in one place. Some are no mistakes at all (a loop that begins one step early may do
nothing in it), so that good tests, too, leave a few alive: what counts is their share. "Hints on test data selection",
DeMillo, Lipton, Sayward 1978.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Change = Callable[[Any], None]
"""What is done to a node."""

_NEIGHBOURS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OTHERS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}  # fmt: skip
_RETURNED = (True, False, 0)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A program that differs from another one in one place."""

    kind: str
    source: str


def mutants(source: str, *, limit: int, seed: str, script: bool) -> list[Mutant]:
    """At most `limit` different ones, drawn from all there are.

    Args:
        script: the tests run the program as `__main__`, so what stands under that name is mutated as well, and what it prints
            matters.

    Raises:
        SyntaxError: the source is not Python.
    """
    tree = ast.parse(source)
    if not script:
        tree.body = [node for node in tree.body if not _is_main_guard(node)]
    changes = [
        (place, kind, change)
        for place, node in enumerate(ast.walk(tree))
        for kind, change in _changes(node, script=script)
    ]
    random.Random(seed).shuffle(changes)
    # Kinds take turns: constants are the most, and the least telling.
    by_kind: dict[str, list[tuple[int, str, Change]]] = {}
    for item in changes:
        by_kind.setdefault(item[1], []).append(item)
    in_turn = [item for turn in zip_longest(*by_kind.values()) for item in turn if item is not None]
    found = {ast.unparse(tree): ""}
    for place, kind, change in in_turn:
        if len(found) > limit:
            break
        changed = copy.deepcopy(tree)
        change(list(ast.walk(changed))[place])
        found.setdefault(ast.unparse(ast.fix_missing_locations(changed)), kind)
    return [Mutant(kind, text) for text, kind in found.items() if kind]


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _changes(node: ast.AST, *, script: bool) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                yield "comparison", _set_item("ops", index, _NEIGHBOURS[type(op)]())
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _OTHERS:
            yield "arithmetic", _set("op", _OTHERS[type(op)]())
        case ast.BoolOp(op=op):
            yield "logic", _set("op", ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.Constant(value=bool(value)):
            yield "constant", _set("value", not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", _set("value", value + 1)
            yield "constant", _set("value", value - 1)
        case ast.Call(func=ast.Name(id="range"), args=[*_, last]) if len(node.args) < 3:
            for op in (ast.Add(), ast.Sub()):
                yield "range", _set_item("args", -1, ast.BinOp(last, op, ast.Constant(1)))
        case ast.Return(value=ast.expr() as value):
            for constant in _RETURNED:
                if not (isinstance(value, ast.Constant) and value.value is constant):
                    yield "return", _set("value", ast.Constant(constant))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", _set("test", ast.UnaryOp(ast.Not(), test))
    for block in ("body", "orelse"):
        statements = getattr(node, block, None)
        for index, statement in enumerate(statements if isinstance(statements, list) else ()):
            if _may_go(statement, script=script):
                yield "dropped", _set_item(block, index, ast.Pass())


def _may_go(statement: ast.stmt, *, script: bool) -> bool:
    """Without an assignment a program mostly breaks at once, which any test notices."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return script or not (isinstance(statement.value.func, ast.Name) and statement.value.func.id == "print")
    return isinstance(statement, ast.AugAssign | ast.If | ast.Break | ast.Continue | ast.Delete)


def _set(field: str, value: Any) -> Change:
    return lambda node: setattr(node, field, value)


def _set_item(field: str, index: int, value: Any) -> Change:
    return lambda node: getattr(node, field).__setitem__(index, value)
