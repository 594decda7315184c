"""Math answers made to hang, crash or take over the verifier."""

from __future__ import annotations

import threading
import time

import pytest

from reward import Outcome, RewardPool, Verdict
from reward.child import wire

HOSTILE = {
    "tower of powers": r"9^{9^{9^{9^{9}}}}",
    "tower in ascii": "9**9**9**9",
    "factorials": "((((10!)!)!)!)!",
    "deep braces": "{" * 400 + "1" + "}" * 400,
    "deep fractions": r"\frac{1}{" * 90 + "2" + "}" * 90,
    "deep parentheses": "(" * 450 + "x" + ")" * 450,
    "huge exponent": "10^{10^{10}}",
    "long sum": "+".join(["x^{17}"] * 110),
    "product": "".join(f"(x+{i})" for i in range(140)),
    "code": "__import__('os').system('touch /tmp/forged')",
    "megabyte of latex": r"\frac{1}{2}+" * 80_000,
    "tower with symbols": r"x^{x^{x^{99^{99^{99}}}}}",
    "huge factorial": "99999999!",
    "huge binomial": r"\binom{99999999}{33333333}",
    "small numbers": "0." + "0" * 380 + "1^{99999}",
    "many digits": "9" * 390 + "^{" + "9" * 390 + "}",
    "exponential of a million": r"\exp(\exp(\exp(1000000)))",
    "sine of a tower": r"\sin(10^{10^{10}})",
    "long list": ",".join(str(number) for number in range(250)),
    "many signs": r"\pm 1" * 60,
    "bars": "|" * 300,
    "base of nothing": "9" * 300 + "_{36}",
    "sum by math-verify": r"\sum_{k=1}^{10^{10}} \frac{1}{k!}",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_end_by_the_deadline_from_any_thread(
    hasty_pool: RewardPool, pool: RewardPool, answer: str
) -> None:
    hasty_pool.score("math", r"\boxed{\sqrt{3}+x}", {"answer": r"\sqrt{2}+x"})  # the server is warm
    verdicts: list[Verdict] = []
    start = time.monotonic()
    thread = threading.Thread(
        target=lambda: verdicts.append(hasty_pool.score("math", f"\\boxed{{{answer}}}", {"answer": r"\sqrt{2}"}))
    )
    thread.start()
    thread.join(20)
    assert verdicts and time.monotonic() - start < 1.0 + 10.0, "deadline 1 s, and slack for a busy machine"
    assert verdicts[0].reward == 0.0
    assert verdicts[0].outcome in (Outcome.WRONG, Outcome.TIMEOUT, Outcome.NO_ANSWER), verdicts[0].detail
    assert pool.score("math", r"\boxed{\sqrt{4}/\sqrt{2}}", {"answer": r"\sqrt{2}"}).outcome is Outcome.CORRECT


def test_a_verifier_that_breaks_is_counted_as_broken(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reply of a broken math-verify the verdict is neither right nor wrong."""
    broken = b'{"broken": "TypeError: sympy has a bad day"}'
    received = wire.Channel.recv
    monkeypatch.setattr(wire.Channel, "recv", lambda self, deadline: (received(self, deadline)[0], broken))
    verdict = pool.score("math", r"\boxed{\sqrt{3}+x}", {"answer": r"\sqrt{2}"})
    assert verdict.outcome is Outcome.VERIFIER_ERROR
    assert "bad day" in verdict.detail


def test_a_fork_server_that_dies_is_replaced(pool: RewardPool) -> None:
    worker = pool._math[0]
    assert pool.score("math", r"\boxed{\sqrt{9}+x}", {"answer": "3+x"}).reward == 1.0
    assert worker._algebra.server._process is not None
    worker._algebra.server._process.kill()
    worker._algebra.server._process.wait()
    assert pool.score("math", r"\boxed{\sqrt{9}+x}", {"answer": "3+x"}).reward == 1.0


# All by reading: under load a second is little for math-verify.
REMEMBERED = [
    (r"\sqrt{8}+x", r"2\sqrt{2}+x"),
    (r"\sqrt{8}+x", r"3\sqrt{2}+x"),
    ("[1, 2)", r"1 \le x < 2"),
    ("3:30 PM", "15:31"),
]


@pytest.mark.parametrize("answer", [*HOSTILE.values(), r"\sum_{k=1}^{3} k", "__import__('sys').exit(3)"])
def test_an_answer_leaves_later_verdicts_unchanged(hasty_pool: RewardPool, answer: str) -> None:
    def verdicts() -> list[tuple[Outcome, float]]:
        found = [hasty_pool.score("math", f"\\boxed{{{stated}}}", {"answer": gold}) for gold, stated in REMEMBERED]
        return [(verdict.outcome, verdict.reward) for verdict in found]

    before = verdicts()
    assert before[:2] == [(Outcome.CORRECT, 1.0), (Outcome.WRONG, 0.0)]
    hasty_pool.score("math", f"\\boxed{{{answer}}}", {"answer": r"\sqrt{2}+x"})
    assert verdicts() == before


def test_a_child_that_ran_math_verify_answers_no_further_question(pool: RewardPool) -> None:
    """math-verify evaluates text, so what it leaves behind must not meet the next answer; reading leaves nothing."""
    comparer = pool._math[0]._algebra
    pool.score("math", r"\boxed{\sqrt{3}+x}", {"answer": r"\sqrt{2}+x"})
    child = comparer._channel
    assert child is not None
    pool.score("math", r"\boxed{\sqrt{5}+x}", {"answer": r"\sqrt{2}+x"})
    assert comparer._channel is child
    pool.score("math", r"\boxed{\sum_{k=1}^{3} k}", {"answer": r"\sum_{j=1}^{4} j"})
    assert comparer._channel is None


def test_a_reply_that_was_waiting_before_the_question_is_refused(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forged "equal" carries no nonce of the question it would answer."""
    monkeypatch.setattr(
        wire.Channel, "recv", lambda self, deadline: (bytes(wire.NONCE_BYTES), b'{"equal": true, "gold_parsed": true}')
    )
    assert pool.score("math", r"\boxed{\sqrt{3}+x}", {"answer": r"\sqrt{2}+x"}).outcome is Outcome.VERIFIER_ERROR
