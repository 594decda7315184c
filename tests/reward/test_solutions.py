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
    "deep recursion": "import sys\nsys.setrecursionlimit(10**6)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def f(x):\n    assert g(20_000) == 20_000\n    return [i * i for i in x] if isinstance(x, list) else x * x",
    "recursion in a thread of a large stack": "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
    "def g(n): return 0 if n == 0 else 1 + g(n - 1)\ndef f(x):\n    out = []\n"
    "    def run(): assert g(50_000) == 50_000; out.append([i * i for i in x] if isinstance(x, list) else x * x)\n"
    "    t = threading.Thread(target=run); t.start(); t.join()\n    return out[0]",
    "slow but in time": "import time\ndef f(x):\n    end = time.monotonic() + 0.4\n    while time.monotonic() < end: pass\n"
    "    return [i * i for i in x] if isinstance(x, list) else x * x",
    "a quarter of a gigabyte": "def f(x):\n    big = bytearray(2**28)\n    return [i * i for i in x] if isinstance(x, list) else x * x",
    "temporary files": "import tempfile, shutil, os\ndef f(x):\n    with tempfile.TemporaryDirectory() as d, tempfile.NamedTemporaryFile('w') as n:\n"
    "        open(os.path.join(d, 'a'), 'w').write('x'); shutil.copy(os.path.join(d, 'a'), os.path.join(d, 'b'))\n"
    "        n.write('x'); n.flush()\n    return [i * i for i in x] if isinstance(x, list) else x * x",
    "asyncio": "import asyncio\nasync def g(x):\n    await asyncio.sleep(0.001)\n    return x * x\n"
    "async def h(x): return await asyncio.gather(*map(g, x))\ndef f(x): return asyncio.run(h(x) if isinstance(x, list) else g(x))",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor\ndef f(x):\n    with ThreadPoolExecutor(4) as p:\n"
    "        return list(p.map(lambda i: i * i, x)) if isinstance(x, list) else p.submit(pow, x, 2).result()",
    "match and walrus": "def f(x):\n    match x:\n        case [*items]: return [(j := i) * j for i in items]\n        case int(n): return n * n",
    "metaclass and property": "class M(type):\n    def __call__(c, x):\n        o = super().__call__()\n        o.x = x\n        return o.square\n"
    "class S(metaclass=M):\n    @property\n    def square(self): return [i * i for i in self.x] if isinstance(self.x, list) else self.x ** 2\nf = S",
    "decorators and globals": "import functools\nCOUNT = 0\ndef count(g):\n    @functools.wraps(g)\n    def h(*a):\n        global COUNT\n        COUNT += 1\n        return g(*a)\n"
    "    return h\n@count\ndef f(x): return [i * i for i in x] if isinstance(x, list) else x * x",
    "exact arithmetic": "from fractions import Fraction\nfrom decimal import Decimal\ndef f(x): return [Fraction(i * i) for i in x] if isinstance(x, list) else Decimal(x) ** 2",
    "its own exceptions": "class Scalar(Exception): pass\ndef g(x):\n    if not isinstance(x, list): raise Scalar(x)\n    return [i * i for i in x]\n"
    "def f(x):\n    try: return g(x)\n    except Scalar as e: return e.args[0] ** 2",
    "writes to standard error": "import sys, logging, warnings\ndef f(x):\n    print('x' * 100_000, file=sys.stderr); logging.warning('x'); warnings.warn('x')\n"
    "    return [i * i for i in x] if isinstance(x, list) else x * x",
    "many standard modules": "import argparse, array, ast, base64, calendar, csv, dis, difflib, email, enum, hashlib, html, inspect, ipaddress, json, pickle, platform\n"
    "import pprint, secrets, sqlite3, ssl, tokenize, urllib.parse, uuid, xml.etree.ElementTree, zlib, zoneinfo\n"
    "def f(x):\n    db = sqlite3.connect(':memory:')\n    one = lambda i: db.execute('select ? * ?', (i, i)).fetchone()[0]\n"
    "    return list(map(one, x)) if isinstance(x, list) else one(x)",
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


SCRIPTS = {
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "standard input": "import sys\nprint(sum(map(int, sys.stdin.readline().split())))",
    "bytes": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))",
    "open(0)": "print(sum(int(t) for t in open(0).read().split()), end='')",
    "file input": "import fileinput\nfor line in fileinput.input(): print(sum(map(int, line.split())))",
    "main guard": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "exits": "print(sum(map(int, input().split())))\nexit()",
    "exits in a try": "try:\n    print(sum(map(int, input().split())))\n    exit(3)\nexcept NameError:\n    print('no exit')",
    "raises at the end": "print(sum(map(int, input().split())))\nraise ValueError",
    "leaves at once": "import os\nos.write(1, b'%d' % sum(map(int, input().split())))\nos._exit(7)",
    "fast input": "import io, os\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nprint(sum(map(int, input().split())))",
    "deep recursion": "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(2**27)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)\n"
    "def main(): print(sum(map(int, input().split())) + g(10**4) - 10**4)\nt = threading.Thread(target=main); t.start(); t.join()",
}


@pytest.mark.parametrize("program", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_right_script_earns_the_reward_in_any_style(pool: RewardPool, program: str) -> None:
    reference = {"tests": [{"input": "2 3\n", "output": "5\n"}, {"input": "20 30", "output": "50"}]}
    verdict = pool.score("code", fenced(program), reference)
    assert verdict.outcome is Outcome.CORRECT, verdict.detail


TWO_SUM = {
    "entry_point": "Solution.twoSum",
    "tests": [{"input": "[2, 7, 11, 15]\n9", "output": "[0, 1]"}, {"input": "[3, 3]\n6\n", "output": "[0, 1]"}],
}
STARTED = {
    "as the starter code has it": "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n"
    "        for i, n in enumerate(nums):\n            if target - n in seen: return [seen[target - n], i]\n            seen[n] = i",
    "a tuple, and helpers": "class Solution:\n    def __init__(self): self.seen = defaultdict(list)\n    def twoSum(self, nums, target):\n"
    "        return next((i, j) for i, j in combinations(range(len(nums)), 2) if self.sums(nums[i], nums[j], target))\n"
    "    def sums(self, a, b, target): return a + b == target",
    "class methods and a main": "class Solution:\n    @staticmethod\n    def twoSum(nums, target):\n        d = {}\n        return [[d[target - n], i] for i, n in enumerate(nums)\n"
    "            if target - n in d or d.__setitem__(n, i)][0]\nif __name__ == '__main__':\n    print(Solution().twoSum([1, 2], 3))",
}


@pytest.mark.parametrize("program", STARTED.values(), ids=STARTED.keys())
def test_a_class_from_starter_code_is_judged_by_what_its_method_returns(pool: RewardPool, program: str) -> None:
    verdict = pool.score("code", fenced(program), TWO_SUM)
    assert verdict.outcome is Outcome.CORRECT, verdict.detail
    assert verdict.parts["tests_total"] == 2.0


WRONG_STARTS = {
    "wrong": ("class Solution:\n    def twoSum(self, nums, target): return [1, 0]", 0.0),
    "right once": (
        "class Solution:\n    def twoSum(self, nums, target): return [0, len(nums) - 3] if len(nums) > 2 else [0, 1]",
        2.0,
    ),
    "no class": ("def twoSum(nums, target): return [0, 1]", 0.0),
    "another name": ("class Solution:\n    def two_sum(self, nums, target): return [0, 1]", 0.0),
    "compares as it likes": (
        "class L(list):\n    def __eq__(s, o): return True\nclass Solution:\n    def twoSum(self, nums, target): return L()",
        0.0,
    ),
    "prints": ("class Solution:\n    def twoSum(self, nums, target): print([0, 1])", 0.0),
    "lazy": ("class Solution:\n    def twoSum(self, nums, target): return iter([0, 1])", 0.0),
}


@pytest.mark.parametrize(("program", "passed"), WRONG_STARTS.values(), ids=WRONG_STARTS.keys())
def test_wrong_classes_earn_nothing(pool: RewardPool, program: str, passed: float) -> None:
    reference = {
        "entry_point": "Solution.twoSum",
        "tests": [*TWO_SUM["tests"], {"input": "[1, 1, 1, 1]\n5", "output": "[0, 0]"}],
    }
    verdict = pool.score("code", fenced(program), reference)
    assert (verdict.outcome, verdict.parts["tests_passed"]) == (Outcome.WRONG, passed), verdict.detail


def test_each_test_has_an_object_of_its_own_and_floats_are_compared_within_a_tolerance(pool: RewardPool) -> None:
    counts = "class Solution:\n    def __init__(self): self.n = 0\n    def count(self):\n        self.n += 1\n        return self.n"
    twice = {"entry_point": "Solution.count", "tests": [{"input": "", "output": "1"}] * 2}
    assert pool.score("code", fenced(counts), twice).outcome is Outcome.CORRECT
    half: dict[str, object] = {
        "entry_point": "half",
        "tests": [{"input": "1", "output": "0.5"}, {"input": '{"a": 1}', "output": "[0.50000]"}],
    }
    nearly = fenced("def half(x): return 0.5000001 if x == 1 else [x['a'] / 2]")
    assert pool.score("code", nearly, half).outcome is Outcome.CORRECT
    assert pool.score("code", nearly, half | {"float_tolerance": 1e-9}).outcome is Outcome.WRONG


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
