"""Programs: right ones score, tricks do not, and nothing is left behind."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward import Outcome, RewardPool, Verdict, check_reference, gold_response
from reward.programs import extract_program, plan_tests

REFERENCE = {
    "tests": ["assert f(2) == 4", "assert f(-3) == -6", "assert f([1]) == [1, 1]"],
    "setup": "",
    "entry_point": "f",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(deadline_s=2.0) as pool:
        yield pool


def judge(pool: RewardPool, program: str, reference: dict[str, Any] = REFERENCE) -> Verdict:
    return pool.score("code", f"```python\n{program}\n```", reference)


RIGHT = {
    "plain": "def f(x):\n    return 2 * x",
    "lambda": "f = lambda x: x + x",
    "imports": "import math, collections\ndef f(x):\n    return x * int(math.sqrt(4))",
    "prints": "def f(x):\n    print('thinking', x)\n    return x * 2",
    "class": "class A:\n    def __call__(self, x):\n        return x * 2\nf = A()",
    "main guard": "def f(x):\n    return x * 2\nif __name__ == '__main__':\n    print(f(input()))",
}
TRICKS = {
    "wrong": "def f(x):\n    return x",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "raise SystemExit": "raise SystemExit",
    "prints PASSED": "print('PASSED 3 of 3')\nprint('4\\n-6\\n[1, 1]')",
    "always equal": "class E:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
    "int that is equal": "class E(int):\n    def __eq__(self, other):\n        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return E(9)",
    "str subclass": "class S(str):\n    pass\ndef f(x):\n    return S('4')",
    "no builtins": "import builtins\nbuiltins.eval = builtins.compile = lambda *a, **k: 4\ndef f(x):\n    return x",
    "json patched": "import json\njson.dumps = lambda *a, **k: '{\"kind\": \"value\"}'\ndef f(x):\n    return x",
    "atexit": "import atexit\natexit.register(lambda: print('PASSED'))\ndef f(x):\n    return x",
    "writes to every descriptor": "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'\\0\\0\\0\\x02{}' * 9)\n    except OSError:\n        pass\ndef f(x):\n    return x",
    "kills its parent": "import os, signal\ntry:\n    os.kill(os.getppid(), 9)\nexcept OSError:\n    pass\ndef f(x):\n    return x",
    "kills everything": "import os\ntry:\n    os.kill(-1, 9)\nexcept OSError:\n    pass\ndef f(x):\n    return x",
    "10 GB": "x = bytearray(10 ** 10)\ndef f(x):\n    return 2 * x",
    "endless value": "def f(x):\n    return [0] * 10 ** 7",
    "deep value": "def f(x):\n    v = []\n    for _ in range(10 ** 5):\n        v = [v]\n    return v",
    "syntax error": "def f(x:\n    return 2 * x",
    "reads the tests": "import gc\ndef f(x):\n    return [o for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o]",
    "reads the disk": "def f(x):\n    return open('/etc/passwd').read()",
    "opens a socket": "import socket\ndef f(x):\n    s = socket.create_connection(('127.0.0.1', 22), 1)\n    return 2 * x",
}  # fmt: skip
HANGS = {
    "busy loop": "while True:\n    pass",
    "sleep": "import time\ndef f(x):\n    time.sleep(60)",
    "thread that ignores exit": "import threading, time\nthreading.Thread(target=lambda: time.sleep(60)).start()\ndef f(x):\n    while True: pass",
    "infinite output": "def f(x):\n    while True:\n        print('x' * 10 ** 6)",
    "masked signals": "import signal\nfor s in range(1, 30):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
}  # fmt: skip


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT.keys())
def test_a_right_program_scores_in_any_style(pool: RewardPool, program: str) -> None:
    verdict = judge(pool, program)
    assert verdict.reward == 1.0 and verdict.parts["tests_passed"] == 3, verdict


@pytest.mark.parametrize("program", TRICKS.values(), ids=TRICKS.keys())
def test_a_trick_scores_nothing_and_is_the_candidates_fault(pool: RewardPool, program: str) -> None:
    verdict = judge(pool, program)
    assert verdict.reward == 0.0 and verdict.outcome in (Outcome.WRONG, Outcome.TIMEOUT), verdict


@pytest.mark.parametrize("program", HANGS.values(), ids=HANGS.keys())
def test_a_program_that_does_not_end_is_killed_at_its_deadline(pool: RewardPool, program: str) -> None:
    started = time.monotonic()
    verdict = judge(pool, program)
    assert verdict.outcome is Outcome.TIMEOUT and time.monotonic() - started < 6, verdict


ESCAPES = {
    "fork": "import os\ndef f(x):\n    if os.fork() == 0:\n        import time; time.sleep(60)\n    return 2 * x",
    "setsid, double fork": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\ndef f(x):\n    return 2 * x",
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
}  # fmt: skip


@pytest.mark.parametrize("program", ESCAPES.values(), ids=ESCAPES.keys())
def test_no_process_outlives_its_run(pool: RewardPool, program: str) -> None:
    judge(pool, RIGHT["plain"])
    before = len(psutil.Process().children(recursive=True))
    judge(pool, program)
    deadline = time.monotonic() + 5
    while len(psutil.Process().children(recursive=True)) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(psutil.Process().children(recursive=True)) == before
    assert judge(pool, RIGHT["plain"]).reward == 1.0


def test_five_hundred_runs_leave_descriptors_and_processes_as_they_were(pool: RewardPool) -> None:
    judge(pool, RIGHT["plain"])
    process = psutil.Process()
    before = process.num_fds(), len(process.children(recursive=True))
    for index in range(500):
        judge(pool, f"def f(x):\n    return {index} and 2 * x")
    assert (process.num_fds(), len(process.children(recursive=True))) == before


def test_close_ends_every_process_and_descriptor() -> None:
    before = psutil.Process().num_fds(), len(psutil.Process().children(recursive=True))
    with RewardPool(num_workers=2, deadline_s=2.0) as pool:
        items = [
            ("code", f"```python\ndef f(x):\n    return 2 * x if {i} == 0 else x\n```", REFERENCE) for i in range(6)
        ]
        assert [v.reward for v in pool.score_many(items)] == [1.0, 0, 0, 0, 0, 0]
    assert (psutil.Process().num_fds(), len(psutil.Process().children(recursive=True))) == before


def test_tests_of_other_shapes_run_in_a_judge_that_only_asks_the_candidate() -> None:
    tests = [
        "import math\nassert math.isclose(f(2), 4.0)",
        "assert f(1) in (2, 3)",
        "assert set(f([1])) == {1}",
        "def check(candidate):\n    assert candidate(5) == 10\n    assert not candidate(0)\n\ncheck(f)",
    ]
    reference = {"tests": tests, "setup": "", "entry_point": "f"}
    with RewardPool(deadline_s=3.0) as pool:
        assert judge(pool, RIGHT["plain"], reference).parts["tests_passed"] == 4
        assert judge(pool, "def f(x):\n    return 3 * x", reference).reward == 0.0
        assert judge(pool, TRICKS["always equal"], reference).reward == 0.0


def test_the_candidate_never_sees_what_is_expected() -> None:
    plan = plan_tests(("assert f(2) == 4", "assert f('a') == 'secret'"), "")
    assert plan.calls == ("f(2)", "f('a')") and plan.expected == (4, "secret")


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("text\n```python\na = 1\n```\nmore\n```python\nb = 2\n```", "b = 2\n"),
        ("```\nc = 3\n```", "c = 3\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("<think>```python\na = 1\n```</think>", None),
        ("```python\ndef f(x", None),
        ("I cannot do that.", None),
        ("", None),
    ],
)
def test_the_last_fenced_block_is_the_program(response: str, program: str | None) -> None:
    assert extract_program(response) == program


@pytest.mark.parametrize(
    "reference",
    [{}, {"tests": []}, {"tests": "assert f()"}, {"tests": ["assert f( == 1"]}, {"tests": [{"input": "1"}]}],
)
def test_tests_that_cannot_be_run_are_refused(reference: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tests|not Python|Python snippet"):
        check_reference("code", reference)


@pytest.mark.data
@pytest.mark.parametrize(("name", "exceptions"), [("mbpp_sanitized", {"mbpp-sanitized/123"}), ("humaneval", set())])
def test_every_reference_solution_passes_its_own_tests(data_dir: Path, name: str, exceptions: set[str]) -> None:
    """mbpp/123 sums amicable numbers below 9999 by trial division: seconds of honest work, past this deadline."""
    with gzip.open(data_dir / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with RewardPool(num_workers=os.cpu_count() or 1, deadline_s=15.0) as pool:
        items = [("code", gold_response("code", r), {"tests": r["tests"], "setup": r["setup"] or ""}) for r in rows]
        verdicts = pool.score_many(items)
    rejected = {r["id"] for r, v in zip(rows, verdicts, strict=True) if v.outcome is not Outcome.CORRECT}
    assert rejected <= exceptions


CLAIMS = {
    "signalling NaN": "import decimal\ndef f(x):\n    return decimal.Decimal('sNaN')",
    "huge fraction": "import fractions\ndef f(x):\n    return fractions.Fraction(3 ** 10 ** 6, 2 ** 10 ** 6)",
    "colliding set": "def f(x):\n    return {k * (2 ** 61 - 1) for k in range(6000)}",
}


@pytest.mark.parametrize("program", CLAIMS.values(), ids=CLAIMS.keys())
def test_no_returned_value_can_harm_the_one_who_compares_it(pool: RewardPool, program: str) -> None:
    started = time.monotonic()
    assert judge(pool, program).reward == 0.0
    assert time.monotonic() - started < 5


def test_a_candidate_named_like_a_module_is_still_the_candidate() -> None:
    reference = {"tests": ["assert copy(2) in (4, 5)"], "setup": "", "entry_point": "copy"}
    with RewardPool(deadline_s=3.0) as pool:
        assert judge(pool, "def copy(x):\n    return 2 * x", reference).reward == 1.0


def test_a_package_folder_ahead_of_its_parent_on_the_path_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Ray puts a folder inside site-packages ahead of site-packages itself; math-verify must still be found."""
    import sys
    import sysconfig

    from reward.sandbox import _readable_paths

    site = sysconfig.get_paths()["purelib"]
    monkeypatch.setattr(sys, "path", [f"{site}/pip", *sys.path])
    _readable_paths.cache_clear()
    try:
        with RewardPool(deadline_s=5.0) as pool:
            assert pool.score("math", r"\boxed{1+x}", {"answer": "x+1"}).reward == 1.0
    finally:
        _readable_paths.cache_clear()
