"""Right programs in many styles earn the reward; wrong ones do not; unfinished ones count what they passed."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reward import Outcome, RewardPool, TaskLimits

SQUARES = {"tests": ["assert f(2) == 4", "assert f([1, 2]) == [1, 4]", "assert f(-3) == 9"]}
STYLES = {
    "plain": "def f(x):\n    return [i * i for i in x] if isinstance(x, list) else x * x",
    "lambda": "f = lambda x: [i * i for i in x] if isinstance(x, list) else x * x",
    "class": "class F:\n    def __call__(self, x):\n        return [i ** 2 for i in x] if isinstance(x, list) else x ** 2\nf = F()",
    "dataclass": "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass N:\n    v: int\n    def sq(self) -> int: return self.v ** 2\n"
    "def f(x): return [N(i).sq() for i in x] if isinstance(x, list) else N(x).sq()",
    "recursion": "def f(x):\n    if isinstance(x, list):\n        return [] if not x else [f(x[0])] + f(x[1:])\n    return sum(abs(x) for _ in range(abs(x)))",
    "prints": "def f(x):\n    print('working on', x)\n    return [i * i for i in x] if isinstance(x, list) else x * x",
    "main guard": "def f(x): return [i * i for i in x] if isinstance(x, list) else x * x\nif __name__ == '__main__':\n    print(f(int(input())))",
    "own files": "import os\ndef f(x):\n    with open('scratch', 'w') as file: file.write('x')\n    os.remove('scratch')\n"
    "    return [i * i for i in x] if isinstance(x, list) else x * x",
    "own thread": "import threading\ndef f(x):\n    out = []\n    t = threading.Thread(target=lambda: out.append([i * i for i in x] if isinstance(x, list) else x * x))\n"
    "    t.start(); t.join()\n    return out[0]",
    "float result": "def f(x): return [i * i for i in x] if isinstance(x, list) else float(x * x)",
    "imports": "import collections, decimal, functools, heapq, itertools, re, statistics, typing, unittest\n"
    "@functools.cache\ndef g(x): return x * x\ndef f(x): return list(map(g, x)) if isinstance(x, list) else g(x)",
    "generators": "def g(x):\n    for i in x: yield i * i\ndef f(x): return list(g(x)) if isinstance(x, list) else next(g([x]))",
}


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\n"


@pytest.mark.parametrize("program", STYLES.values(), ids=STYLES.keys())
def test_a_right_program_earns_the_reward_in_any_style(pool: RewardPool, program: str) -> None:
    verdict = pool.score("code", fenced(program), SQUARES)
    assert verdict.outcome is Outcome.CORRECT, verdict.detail
    assert verdict.parts == {"format": 1.0, "accuracy": 1.0, "tests_passed": 3.0, "tests_total": 3.0}


def test_a_program_without_a_fence_counts_and_prose_does_not(pool: RewardPool) -> None:
    assert pool.score("code", STYLES["lambda"], SQUARES).outcome is Outcome.CORRECT
    prose = pool.score("code", "I would square each number.", SQUARES)
    assert (prose.outcome, prose.parts["format"]) == (Outcome.NO_ANSWER, 0.0)
    broken = pool.score("code", fenced("def f(x:"), SQUARES)
    assert (broken.outcome, broken.parts["format"]) == (Outcome.WRONG, 0.0)


def test_each_test_counts_for_itself(pool: RewardPool) -> None:
    """f(2) is 4 and f([1, 2]) raises and f(-3) is 9: two of three."""
    verdict = pool.score("code", fenced("def f(x):\n    return x * x"), SQUARES)
    assert (verdict.reward, verdict.outcome, verdict.parts["tests_passed"]) == (0.0, Outcome.WRONG, 2.0)
    assert "f([1, 2]) raised" in verdict.detail


SHAPES: dict[str, tuple[dict[str, object], str, str]] = {
    "isclose": ({"tests": ["assert math.isclose(f(2), 0.5, rel_tol=0.001)"], "setup": "import math"}, "1 / x", "0.6"),
    "set of result": ({"tests": ["assert set(f((1, 2), (2, 3))) == set((2,))"]}, "(set(x) & set(y))", "[1]"),
    "lazy result": ({"tests": ["assert sorted(f([3, 1])) == [1, 3]"]}, "(i for i in x)", "(i + 1 for i in x)"),
    "membership": ({"tests": ["assert f(2) in (3, 4)"]}, "4", "5"),
    "expected is computed": ({"tests": ["assert f(3) == sys.getsizeof(3)"]}, "__import__('sys').getsizeof(x)", "1"),
    "exception": (
        {"tests": ["try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"]},
        "1 / x",
        "0",
    ),
    "method": ({"tests": ["s = Solution()\nassert s.twice(2) == 4"]}, "x", ""),
    "wrapped in int": ({"tests": ["assert int(f(2)) == 4"]}, "4.2", "'5'"),
    "chained": ({"tests": ["assert 1 < f(2) < 3"]}, "2", "3"),
}


@pytest.mark.parametrize("shape", SHAPES.keys())
def test_tests_of_other_shapes_are_judged_in_a_clean_process(pool: RewardPool, shape: str) -> None:
    reference, right, wrong = SHAPES[shape]
    program = "def f(x, y=None):\n    return {}\nclass Solution:\n    def twice(self, x): return 2 * {} if '{}' else 1"
    for body, outcome in ((right, Outcome.CORRECT), (wrong, Outcome.WRONG)):
        verdict = pool.score("code", fenced(program.format(body or "0", body or "0", body.replace("'", ""))), reference)
        assert verdict.outcome is outcome, (body, verdict.detail)


def test_a_candidate_cannot_redefine_what_the_test_itself_uses(pool: RewardPool) -> None:
    """`abs`, `set` and `math` of the test are the judge's own, and a prelude's helper is the data set's."""
    cheat = "abs = set = lambda *a: 0\nclass math: isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 7\ndef helper(x): return 7"
    for test in ("assert abs(f(2) - 4) < 1", "assert set(f(2)) == set((1,))", "assert math.isclose(f(2), 4)"):
        assert pool.score("code", fenced(cheat), {"tests": [test]}).reward == 0.0
    reference = {"tests": ["assert f(2) == helper(2)"], "entry_point": "f"}
    prelude = "def helper(x):\n    return 4\n\ndef f(x):\n    pass\n"
    assert pool.score("code", fenced(cheat), reference | {"prelude": prelude}).reward == 0.0


def test_tests_that_do_not_run_are_the_datas_fault(pool: RewardPool) -> None:
    reference = {"tests": ["assert f(2) == y"], "setup": "y = 1 / 0"}
    assert pool.score("code", fenced("def f(x): return 2"), reference).outcome is Outcome.VERIFIER_ERROR


def test_scripts_are_judged_by_what_they_write(pool: RewardPool) -> None:
    reference = {"tests": [{"input": "2 3\n", "output": "5 \n"}, {"input": "1 1\n", "output": "2"}]}
    assert pool.score("code", fenced("a, b = map(int, input().split())\nprint(a + b)"), reference).reward == 1.0
    wrong = pool.score("code", fenced("print(5)"), reference)
    assert (wrong.outcome, wrong.parts["tests_passed"]) == (Outcome.WRONG, 1.0)
    exits = "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)"
    assert pool.score("code", fenced(exits), reference).reward == 1.0
    endless = pool.score("code", fenced("while True: print('x' * 1000)"), reference)
    assert endless.reward == 0.0


def test_a_pool_serves_many_threads_and_keeps_order() -> None:
    items: list[tuple[str, str, dict[str, object]]] = [
        ("code", fenced(f"def f(x): return {i}"), {"tests": [f"assert f(0) == {i % 3}"]}) for i in range(30)
    ]
    items[7] = ("math", r"\boxed{7}", {"answer": "7"})
    with RewardPool(code=TaskLimits(workers=2, deadline_s=10.0)) as pool, ThreadPoolExecutor(4) as threads:
        runs = list(threads.map(pool.score_many, [items] * 3))
    expected = [float(i < 3 or i == 7) for i in range(30)]
    assert [[verdict.reward for verdict in run] for run in runs] == [expected] * 3


def test_a_file_of_responses_is_scored_from_the_command_line(tmp_path: Path) -> None:
    rows = [
        {"task": "math", "response": r"\boxed{2}", "reference": {"answer": "2"}},
        {"task": "code", "response": "def f(x): return 3", "reference": {"tests": ["assert f(1) == 4"]}},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "reward", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    verdicts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(v["reward"], v["outcome"]) for v in verdicts] == [(1.0, "correct"), (0.0, "wrong")]
    file.write_text('{"task": "math", "response": "", "reference": {}}\n')
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert refused.returncode == 2 and "line 1" in refused.stderr
