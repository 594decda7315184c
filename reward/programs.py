"""Code responses: where the program is, and how each test is put to it without showing it what is expected.

Three ways, chosen from the (trusted) source of a problem's tests alone:

- literal: `assert f(2) == 4` and its like. The candidate's process evaluates `f(2)`; the parent compares the value.
- judged: any other shape. The test runs whole in a clean process (child/judge.py) in which the names that only the
  candidate defines are proxies; the values come from the candidate's process, all else from the judge's own.
- stdio: {"input", "output"}. The program is a script; the parent compares what it wrote.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import re
import symtable
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward.child import wire

MAX_PROGRAM_CHARS = 60_000
_PYTHON_TAGS = ("python", "py", "python3", "python3.11", "")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w.+#-]*)[^\n]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Case:
    """One question to the candidate and what the parent expects: equality with a value, or truth."""

    source: str
    """An expression that only calls the candidate's names; no part of the expected value is in it."""
    request: bytes
    expected: str | bool
    """`wire.canonical` of the expected value, or the truth that a bare `assert f(x)` or `assert not f(x)` asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TestPlan:
    """How a problem's tests are run; exactly one of `cases`, `snippets`, `scripts` is not empty."""

    cases: tuple[tuple[Case, ...], ...] = ()
    """For each test, the cases which must all hold."""
    snippets: tuple[str, ...] = ()
    scripts: tuple[tuple[str, str], ...] = ()
    """For each test, standard input and expected standard output."""
    prelude: str = ""
    candidate_setup: str = ""
    judge_setup: str = ""
    remote: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def num_tests(self) -> int:
        return len(self.cases) + len(self.snippets) + len(self.scripts)


def extract_program(response: str) -> tuple[str, bool] | None:
    """The program of a response and whether it stood in a fence; None if there is none.

    The last fenced block that is Python by its tag or has no tag, else the last of any tag, after the thinking part. A
    fence that is never closed runs to the end. Without a fence, the whole text: whether it is Python the child will say.
    """
    before, end, after = response.rpartition("</think>")
    if not end and "<think>" in response:
        return None
    text = after if end else before + after
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            blocks.append((opening[2].lower(), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[2].lower(), text[opening.end() + 1 :]))
    tagged = [body for tag, body in blocks if tag and tag in _PYTHON_TAGS]
    untagged = [body for tag, body in blocks if not tag]
    program = (tagged or untagged or [body for _, body in blocks] or [text])[-1]
    return (program, bool(blocks)) if program.strip() and len(program) <= MAX_PROGRAM_CHARS else None


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
        for index, test in enumerate(tests):
            if not (isinstance(test.get("input"), str) and isinstance(test.get("output"), str)):
                raise ValueError(f"reference['tests'][{index}] must have texts 'input' and 'output'")
        return TestPlan(scripts=tuple((test["input"], test["output"]) for test in tests))
    for index, test in enumerate(tests):
        if not isinstance(test, str):
            raise ValueError(f"reference['tests'][{index}] must be a Python snippet, got {type(test).__name__}")
    return _plan(tuple(tests), setup, prelude, reference.get("entry_point"), compare_in_parent)


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
            return TestPlan(cases=tuple(case for case in cases if case), candidate_setup=imports + candidate_setup)
    return TestPlan(
        snippets=tests,
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
