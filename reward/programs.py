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

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from reward.assertions import plan_assertions
from reward.child import wire
from reward.comparison import FLOAT_TOLERANCE
from reward.plans import Case, JsonValue, TestPlan, no_handle, parse
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
        parse(source, f"reference[{name!r}]")
    if all(isinstance(test, Mapping) for test in tests):
        return _plan_inputs(
            tuple((test.get("input"), test.get("output")) for test in tests),
            reference.get("entry_point"),
            reference.get("float_tolerance"),
        )
    for index, test in enumerate(tests):
        if not isinstance(test, str):
            raise ValueError(f"reference['tests'][{index}] must be a Python snippet, got {type(test).__name__}")
    return plan_assertions(tuple(tests), setup, prelude, reference.get("entry_point"), compare_in_parent)


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
    trees = [wire.encode(argument, no_handle) for argument in arguments]
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
