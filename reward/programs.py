"""Code responses: where the program is, and how each test is put to it without showing it what is expected."""

from __future__ import annotations

import ast
import builtins
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward.answers import after_thinking

MAX_PROGRAM_CHARS = 100_000
_FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TestPlan:
    """How a problem's tests are run.

    `calls[i] == expected[i]` are compared by the parent: the candidate's process evaluates the left side only. Tests of
    any other shape run whole in a clean judge process, where the candidate's functions are proxies by name.
    """

    calls: tuple[str, ...]
    expected: tuple[Any, ...]
    judged: tuple[str, ...]
    proxies: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def num_tests(self) -> int:
        return len(self.calls) + len(self.judged)


def extract_program(response: str) -> str | None:
    """The last fenced block after the thinking part, or the whole text if there is no fence and it is Python."""
    response = after_thinking(response)
    blocks = _FENCE.findall(response)
    program = blocks[-1] if blocks else response
    if not program.strip() or len(program) > MAX_PROGRAM_CHARS or (not blocks and "```" in response):
        return None
    return program if blocks or _parses(program) else None


def _parses(program: str) -> bool:
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)


def check_code_reference(reference: Mapping[str, Any]) -> None:
    """Raises ValueError when the tests of a problem cannot be run."""
    tests = reference.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError("reference['tests'] must be a list of Python snippets with at least one entry")
    for test in tests:
        if not isinstance(test, str):
            raise ValueError(
                f"a test must be a Python snippet, got {type(test).__name__}: stdin/stdout tests are not supported"
            )
        try:
            ast.parse(test)
        except SyntaxError as error:
            raise ValueError(f"test {test[:80]!r} is not Python: {error}") from error
    plan_tests(tuple(tests), reference.get("setup") or "", reference.get("entry_point"))


@functools.lru_cache(maxsize=4096)
def plan_tests(tests: tuple[str, ...], setup: str, entry_point: str | None = None) -> TestPlan:
    """Sort tests by how they are run; see `TestPlan`.

    In judged tests only `entry_point` is the candidate's, where the problem names one: a test's own helpers must not be.
    """
    calls: list[str] = []
    expected: list[Any] = []
    judged: list[str] = []
    for test in tests:
        comparison = _call_and_literal(test)
        if comparison is None:
            judged.append(test)
        else:
            calls.append(comparison[0])
            expected.append(comparison[1])
    free = _free_names(judged, setup)
    modules = {name for name in free if name in sys.stdlib_module_names} - {entry_point}
    return TestPlan(tuple(calls), tuple(expected), tuple(judged), tuple(sorted(free - modules)), tuple(sorted(modules)))


def _call_and_literal(test: str) -> tuple[str, Any] | None:
    """("f(2)", 4) for "assert f(2) == 4"; None for any other shape."""
    tree = ast.parse(test)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Assert):
        return None
    comparison = tree.body[0].test
    if not isinstance(comparison, ast.Compare) or len(comparison.ops) != 1 or not isinstance(comparison.ops[0], ast.Eq):
        return None
    try:
        value = ast.literal_eval(comparison.comparators[0])
    except (ValueError, TypeError, SyntaxError):
        return None
    return ast.unparse(comparison.left), value


def _free_names(sources: Sequence[str], setup: str) -> set[str]:
    """Names the tests use and nothing but the candidate defines."""
    used: set[str] = set()
    defined: set[str] = set(dir(builtins))
    for node in (node for source in (*sources, setup) for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return used - defined
