"""What a problem's tests become: questions to a program, and what the parent or the judge compares the answers with."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from reward.child import wire


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


def parse(source: str, where: str) -> ast.Module:
    """The syntax tree of trusted source. Raise ValueError naming the place."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{where} is not Python: {error}: {source[:80]!r}") from error


def no_handle(value: Any) -> list[Any]:
    """For `wire.encode` of what must have an encoding."""
    raise wire.WireError(f"no encoding for {type(value).__name__}")
