"""How each test of a problem is put to a program without showing it what is expected.

Four ways, chosen from the (trusted) tests alone:

- literal: `assert f(2) == 4` and its like. The candidate's process evaluates `f(2)`; the parent compares the value.
- judged: any other shape. The test runs whole in a clean process (child/judge.py) in which the names that only the
  candidate defines are proxies; the values come from the candidate's process, all else from the judge's own.
- call: {"input", "output"} and an entry point, `f` or `Class.method`. The input has one JSON value a line, which are the
  arguments; the parent compares the returned value with the output, a JSON value. A class is made anew for each test.
- stdio: {"input", "output"} and no entry point. The program is a script; the parent compares what it wrote.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import symtable
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward.child import wire
from reward.comparison import FLOAT_TOLERANCE
from reward.suspicion import squeeze

MAX_STDIN_CHARS = 1_000_000
STARTER_NAMES = """
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, groupby, pairwise, permutations, product, zip_longest
from math import ceil, comb, floor, gcd, inf, isqrt, lcm, log2, sqrt
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, Union
"""
"""What programs for call tests may use without importing it: starter code names types and helpers it does not import."""


@dataclass(frozen=True, slots=True)
class JsonValue:
    """An expected value of a call test; floats are compared within the tolerance."""

    value: Any
    tolerance: float


@dataclass(frozen=True, slots=True)
class Case:
    """One question to the candidate and what the parent expects: equality with a value, or truth."""

    source: str
    """What is asked, for a person: only calls of the candidate's names; no part of the expected value is in it."""
    request: bytes
    expected: str | bool | JsonValue
    """`wire.canonical` of the expected value, or the truth that a bare `assert f(x)` or `assert not f(x)` asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestPlan:
    """How a problem's tests are run; exactly one of `cases`, `snippets`, `scripts` is not empty."""

    cases: tuple[tuple[Case, ...], ...] = ()
    """For each test, the cases which must all hold."""
    snippets: tuple[str, ...] = ()
    scripts: tuple[tuple[str, str], ...] = ()
    """For each test, standard input and expected standard output."""
    tolerance: float | None = None
    """Of `scripts`; see `comparison.same_output`."""
    expected_texts: tuple[str, ...] = ()
    """Expected values as a program would spell them, squeezed; see `suspicion.flags`."""
    provided: str = ""
    """Source that runs in the candidate's process before the program."""
    prelude: str = ""
    candidate_setup: str = ""
    judge_setup: str = ""
    remote: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def num_tests(self) -> int:
        return len(self.cases) + len(self.snippets) + len(self.scripts)


def plan_reference(reference: Mapping[str, Any], *, compare_in_parent: bool = True) -> TestPlan:
    """The plan of a problem, cached by content. Raise ValueError naming what is wrong with the reference.

    Args:
        compare_in_parent: False sends literal assertions to the judge as well: a second path to the same verdict.
    """
    tests = reference.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"reference['tests'] must be a list with at least one test, got {str(tests)[:80]!r}")
    setup, prelude = reference.get("setup") or "", reference.get("prelude") or ""
    for name, source in (("setup", setup), ("prelude", prelude)):
        if not isinstance(source, str):
            raise ValueError(f"reference[{name!r}] must be Python source, got {type(source).__name__}")
        _parse(source, f"reference[{name!r}]")
    if all(isinstance(test, Mapping) for test in tests):
        return _plan_inputs(
            tuple((test.get("input"), test.get("output")) for test in tests),
            reference.get("entry_point"),
            reference.get("float_tolerance"),
        )
    for index, test in enumerate(tests):
        if not isinstance(test, str):
            raise ValueError(f"reference['tests'][{index}] must be a Python snippet, got {type(test).__name__}")
    return _plan(tuple(tests), setup, prelude, reference.get("entry_point"), compare_in_parent)


@functools.lru_cache(maxsize=1024)
def _plan_inputs(tests: tuple[tuple[str, str], ...], entry_point: str | None, tolerance: float | None) -> TestPlan:
    for index, (given, output) in enumerate(tests):
        if not (isinstance(given, str) and isinstance(output, str)):
            raise ValueError(f"reference['tests'][{index}] must have texts 'input' and 'output'")
        if len(given) > MAX_STDIN_CHARS:
            raise ValueError(
                f"reference['tests'][{index}] has {len(given)} characters of input; limit {MAX_STDIN_CHARS}"
            )
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
        raise ValueError(f"reference['float_tolerance'] must be a number in [0, 1), got {tolerance!r}")
    texts = tuple(squeeze(output) for _, output in tests)
    if not entry_point:
        return TestPlan(scripts=tests, tolerance=tolerance, expected_texts=texts)
    if not all(name.isidentifier() for name in entry_point.split(".")) or entry_point.count(".") > 1:
        raise ValueError(f"reference['entry_point'] must be a function or Class.method, got {entry_point!r}")
    cases = tuple(
        (_call(given, output, entry_point, FLOAT_TOLERANCE if tolerance is None else tolerance, index),)
        for index, (given, output) in enumerate(tests)
    )
    return TestPlan(cases=cases, provided=STARTER_NAMES, expected_texts=texts)


def _call(given: str, output: str, entry_point: str, tolerance: float, index: int) -> Case:
    where = f"reference['tests'][{index}]"
    arguments = [_json(line, f"{where}['input']") for line in given.splitlines() if line.strip()]
    trees = [wire.encode(argument, _no_handle) for argument in arguments]
    owner, _, name = entry_point.rpartition(".")
    request = ["method", owner, name, trees] if owner else ["call", name, trees, {}]
    source = f"{entry_point}({', '.join(map(repr, arguments))})"
    return Case(source, json.dumps(request).encode(), JsonValue(_json(output, f"{where}['output']"), tolerance))


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} equals nothing")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not one JSON value: {error}: {text[:80]!r}") from error


@functools.lru_cache(maxsize=4096)
def _plan(
    tests: tuple[str, ...], setup: str, prelude: str, entry_point: str | None, compare_in_parent: bool
) -> TestPlan:
    trees = [_parse(test, f"reference['tests'][{index}]") for index, test in enumerate(tests)]
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
    only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in _parse(judge_setup, "").body)
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
            tree = wire.encode(ast.literal_eval(test.comparators[0]), _no_handle)
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


def _parse(source: str, where: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where} is not Python: {error}: {source[:80]!r}") from error


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


def _no_handle(value: Any) -> list[Any]:
    raise wire.WireError(f"no encoding for {type(value).__name__}")
