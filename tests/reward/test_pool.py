"""The pool: tasks do not wait for each other, servers are replaced, and a second path notices a first one that lies."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from reward import Outcome, RewardPool, TaskLimits, mathematics
from reward.child import wire
from reward.pool import CODE_LIMITS, MATH_LIMITS
from tests.reward.test_exploits import JUDGED, REFERENCE, response

RIGHT = response("def f(x): return 48271 if x == 2 else 16807")
WRONG = response("def f(x): return 48271")


def test_a_slow_program_delays_no_math_verdict() -> None:
    """One worker a task: while a program sleeps out its deadline, math is judged, by comparison and by mathematics."""
    with RewardPool(math=TaskLimits(deadline_s=30.0), code=TaskLimits(deadline_s=4.0)) as pool:
        pool.score("math", r"\boxed{\sqrt{12}}", {"answer": r"2\sqrt{3}"})  # the server is warm
        slow = [pool.submit("code", response("import time\ndef f(x): time.sleep(99)"), REFERENCE) for _ in range(2)]
        for answer in (r"\boxed{5}", r"\boxed{\sqrt{25}}"):
            assert pool.submit("math", answer, {"answer": "5"}).result().outcome is Outcome.CORRECT
        assert not any(future.done() for future in slow)
        verdicts = [future.result() for future in slow]
    assert [verdict.outcome for verdict in verdicts] == [Outcome.TIMEOUT] * 2
    assert verdicts[0].queued_s < 2.0 and verdicts[1].queued_s >= 3.9, "the second waited for the first one's deadline"
    assert all(4.0 <= verdict.seconds < 8.0 for verdict in verdicts)


def test_each_task_has_a_deadline_of_its_own() -> None:
    assert (MATH_LIMITS.deadline_s, CODE_LIMITS.deadline_s) == (1.0, 10.0)
    table = {"math": {"workers": 2, "deadline_s": 0.5}, "code": {"deadline_s": 3.0}, "regrade_share": 0.25}
    with RewardPool.from_table(table) as pool:
        assert [worker._deadline_s for worker in (*pool._math, *pool._code)] == [0.5, 0.5, 3.0]


@pytest.mark.parametrize(
    "table", [{"math": {"workers": 0, "deadline_s": 1.0}}, {"code": {"deadline_s": 0}}, {"regrade_share": 2}]
)
def test_limits_that_make_no_sense_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RewardPool.from_table(table)


def test_fork_servers_are_replaced_after_their_runs() -> None:
    with RewardPool(code=TaskLimits(deadline_s=5.0, runs_per_server=3)) as pool:
        server = pool._code[0]._candidate
        pids = []
        for _ in range(7):
            assert pool.score("code", RIGHT, REFERENCE).outcome is Outcome.CORRECT
            assert server._process is not None
            pids.append(server._process.pid)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


@pytest.mark.parametrize("reference", [REFERENCE, JUDGED, {"tests": [{"input": "", "output": "1"}]}])
def test_two_paths_agree_on_honest_verdicts(reference: dict[str, object]) -> None:
    with RewardPool(math=TaskLimits(deadline_s=5.0), code=TaskLimits(deadline_s=2.0), regrade_share=1.0) as pool:
        for text in (RIGHT, WRONG, response("print(1)"), response("def f(x): 1 / 0")):
            verdict = pool.score("code", text, reference)
            assert verdict.second_opinion is True, verdict.detail
        for answer, gold in (("5", "5"), ("5", "6"), (r"\frac{1}{2}", "0.5")):
            assert pool.score("math", rf"\boxed{{{answer}}}", {"answer": gold}).second_opinion is True
        assert pool.score("code", "no program here, I fear", reference).second_opinion in (None, True)
        assert pool.score("math", "no answer", {"answer": "5"}).second_opinion is None
        assert pool.score("code", response("while True: pass"), reference).second_opinion is None


def test_a_comparison_that_always_says_yes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first path's comparison broken in the parent: the judge, a process of its own, does not share it."""
    monkeypatch.setattr(wire, "canonical", lambda tree, depth=0: "n1")
    reference = {"tests": ["assert f(5) == 123123", "assert f(6) == 321321"]}
    with RewardPool(regrade_share=1.0) as pool:
        verdict = pool.score("code", response("def f(x): return 0"), reference)
    assert (verdict.outcome, verdict.second_opinion) == (Outcome.CORRECT, False)
    assert "a second path says wrong" in verdict.detail


def test_a_math_shortcut_that_always_says_yes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "same_for_certain", lambda gold, answer: True)
    with RewardPool(regrade_share=1.0) as pool:
        verdict = pool.score("math", r"\boxed{5}", {"answer": "6"})
    assert (verdict.reward, verdict.second_opinion) == (1.0, False)


def test_the_share_judged_twice_depends_on_the_text_alone() -> None:
    """Of 4,000 texts about a tenth (400, standard deviation 19), the same ones each time."""
    from reward.pool import _share_of

    texts = [f"response {i} \ud800" for i in range(4000)]
    chosen = [text for text in texts if _share_of(text) < 0.1]
    assert 320 < len(chosen) < 480
    assert chosen == [text for text in texts if _share_of(text) < 0.1]


def test_closing_waits_for_runs_in_progress_and_drops_those_in_the_queue() -> None:
    pool = RewardPool(code=TaskLimits(deadline_s=1.0))
    futures = [pool.submit("code", response("while True: pass"), REFERENCE) for _ in range(3)]
    while not futures[0].running():
        time.sleep(0.01)
    closing = threading.Thread(target=pool.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert futures[0].result().outcome is Outcome.TIMEOUT
    assert all(future.cancelled() for future in futures[1:])
