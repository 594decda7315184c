"""Tests that are Python snippets: which of their names are the program's, and which of them are literal comparisons."""

from __future__ import annotations

import ast
import builtins
import functools
import json
import symtable
import sys
from collections.abc import Mapping, Sequence

from reward.child import wire
from reward.plans import Case, TestPlan, no_handle, parse
from reward.suspicion import squeeze


@functools.lru_cache(maxsize=4096)
def plan_assertions(
    tests: tuple[str, ...], setup: str, prelude: str, entry_point: str | None, compare_in_parent: bool
) -> TestPlan:
    """The plan of tests that are Python snippets; see `programs.plan_reference`."""
    trees = [parse(test, f"reference['tests'][{index}]") for index, test in enumerate(tests)]
    # The entry point is the candidate's even where it is named like a builtin or a module.
    standard = sys.stdlib_module_names - {entry_point}
    known = (_assigned(prelude) | set(dir(builtins))) - {entry_point}
    free_setup = _globals(setup) - _assigned(setup) - known - standard
    # A setup that builds the candidate's own objects runs there, and its names are the candidate's.
    candidate_setup, judge_setup = (setup, "") if free_setup else ("", setup)
    known |= _assigned(judge_setup)
    used: set[str] = _globals(judge_setup)
    for index, (test, tree) in enumerate(zip(tests, trees, strict=True)):
        names = _globals(test) - _assigned(test)
        if not names - known - standard:
            raise ValueError(f"reference['tests'][{index}] calls nothing that a program could define: {test[:80]!r}")
        if not any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(tree)):
            raise ValueError(f"reference['tests'][{index}] asserts nothing: {test[:80]!r}")
        _refuse_uncalled_check(tree, index)
        used |= names
    free = used - known
    modules = free & standard
    remote = free - modules
    only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in parse(judge_setup, "").body)
    if compare_in_parent and only_imports:
        cases = [_cases(tree, remote) for tree in trees]
        if all(case is not None for case in cases):
            imports = "".join(f"import {name}\n" for name in sorted(modules)) + judge_setup
            return TestPlan(
                cases=tuple(case for case in cases if case),
                candidate_setup=imports + candidate_setup,
                expected_texts=_literals(trees),
            )
    if candidate_setup and compare_in_parent:
        raise ValueError(
            f"reference['setup'] uses names that only a program defines ({sorted(free_setup)}), so it runs in the program's"
            " process; the tests must then be `assert call == literal`, whose right side it cannot touch"
        )
    return TestPlan(
        snippets=tests,
        expected_texts=_literals(trees),
        prelude=prelude,
        candidate_setup=candidate_setup,
        judge_setup=judge_setup,
        remote=tuple(sorted(remote)),
        modules=tuple(sorted(modules)),
    )


def _cases(tree: ast.Module, remote: set[str]) -> tuple[Case, ...] | None:
    """The cases of a test made of literal assertions, HumanEval's check(candidate) included; None for other shapes."""
    names, asserts = dict.fromkeys(remote), tree.body
    aliases: dict[str, str] = {}
    if not all(isinstance(node, ast.Assert) for node in asserts):
        check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
        call = tree.body[-1]
        if check is None or not _is_call_of_check(call) or check.args.defaults or len(check.args.args) != 1:
            return None
        if any(not isinstance(node, ast.FunctionDef | ast.Assign) for node in tree.body[:-1]):
            return None
        asserts = check.body
        aliases = {check.args.args[0].arg: call.value.args[0].id}  # type: ignore[attr-defined]
    cases: list[Case] = []
    for node in asserts:
        if not isinstance(node, ast.Assert):
            return None
        if isinstance(node.test, ast.Constant) and node.test.value:
            continue
        case = _case(_Renamer(aliases).visit(node.test), set(names))
        if case is None:
            return None
        cases.append(case)
    return tuple(cases) or None


def _case(test: ast.expr, remote: set[str]) -> Case | None:
    expected: str | bool = True
    call = test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        expected, call = False, test.operand
    elif isinstance(test, ast.Compare):
        if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
            return None
        call = test.left
        try:
            tree = wire.encode(ast.literal_eval(test.comparators[0]), no_handle)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, wire.WireError):
            return None
        expected = wire.canonical(tree)
    if not _asks_only(call, remote):
        return None
    source = ast.unparse(call)
    return Case(source, json.dumps(["eval", source]).encode(), expected)


def _asks_only(call: ast.expr, remote: set[str]) -> bool:
    """Whether the value of this expression is by its outermost call what the candidate's code returns."""
    if not isinstance(call, ast.Call):
        return False
    function = call.func
    while isinstance(function, ast.Attribute | ast.Call):
        function = function.value if isinstance(function, ast.Attribute) else function.func
    # A comparison among the arguments could hold a part of the expected value.
    forbidden = ast.Compare | ast.Lambda | ast.NamedExpr | ast.Await | ast.BoolOp
    has_forbidden = any(isinstance(node, forbidden) for node in ast.walk(call))
    return isinstance(function, ast.Name) and function.id in remote and not has_forbidden


def _literals(trees: Sequence[ast.Module]) -> tuple[str, ...]:
    """What the tests compare with, where it is a literal, as a program would spell it."""
    sides = [
        side
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
    ]
    kinds = ast.Constant | ast.List | ast.Tuple | ast.Dict | ast.Set | ast.UnaryOp
    return tuple(squeeze(ast.unparse(side)) for side in sides if isinstance(side, kinds))


class _Renamer(ast.NodeTransformer):
    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.copy_location(ast.Name(self._aliases.get(node.id, node.id), node.ctx), node)


def _is_call_of_check(node: ast.stmt) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "check"
        and len(call.args) == 1
        and isinstance(call.args[0], ast.Name)
    )


def _refuse_uncalled_check(tree: ast.Module, index: int) -> None:
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if "check" in defined - called:
        raise ValueError(f"reference['tests'][{index}] defines check() and never calls it; add `check(entry_point)`")


def _globals(source: str) -> set[str]:
    """Names that a module refers to as globals, at any depth."""
    found: set[str] = set()
    tables = [symtable.symtable(source, "<tests>", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found


def _assigned(source: str) -> set[str]:
    """Names that a module binds at its top level."""
    table = symtable.symtable(source, "<tests>", "exec")
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
