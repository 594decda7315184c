"""Wrong programs made from right ones, and whether their tests really fail, found out without this package."""

from __future__ import annotations

import ast
import copy
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitXor: ast.BitOr, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip


def mutants(source: str, *, limit: int, seed: int) -> list[str]:
    """At most `limit` programs that differ from `source` in one place, drawn from all there are."""
    tree = ast.parse(source)
    changes = [(index, name) for index, node in enumerate(ast.walk(tree)) for name in _changes(node)]
    chosen = random.Random(seed).sample(changes, min(limit, len(changes)))
    return [_mutate(tree, index, name) for index, name in chosen]


def _changes(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare():
            yield "flip"
        case ast.Constant(value=value) if type(value) is int:
            yield from ("plus one", "minus one")
        case ast.Constant(value=value) if type(value) is bool:
            yield "not"
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _SWAPPED:
            yield "swap"
        case ast.BoolOp():
            yield "and or"
        case ast.Return(value=value) if value is not None:
            yield "return nothing"
        case ast.If() | ast.While() | ast.IfExp():
            yield "negate"


def _mutate(tree: ast.Module, index: int, name: str) -> str:
    changed = copy.deepcopy(tree)
    node: Any = list(ast.walk(changed))[index]
    match name:
        case "flip":
            node.ops[0] = _FLIPPED[type(node.ops[0])]()
        case "plus one":
            node.value += 1
        case "minus one":
            node.value -= 1
        case "not":
            node.value = not node.value
        case "swap":
            node.op = _SWAPPED[type(node.op)]()
        case "and or":
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case "return nothing":
            node.value = None
        case "negate":
            node.test = ast.UnaryOp(ast.Not(), node.test)
    return ast.unparse(ast.fix_missing_locations(changed))


def passes(program: str, record: Mapping[str, Any], *, limit_s: float) -> bool | None:
    """Whether program, setup and tests run through in a plain interpreter of their own; None where time runs out."""
    source = "\n\n".join([program, record["setup"] or "", *record["tests"], "import os\nos._exit(77)"])
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", source],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)),
        )
    except subprocess.TimeoutExpired:
        return None
    return result.returncode == 77
