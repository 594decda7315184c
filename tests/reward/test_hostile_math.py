"""Math answers made to hang, crash or take over the verifier."""

from __future__ import annotations

import threading
import time

import pytest

from reward import Outcome, RewardPool, Verdict
from reward.child import wire
from reward.sandbox import ForkServer, Limits

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
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_end_by_the_deadline_from_any_thread(
    hasty_pool: RewardPool, pool: RewardPool, answer: str
) -> None:
    hasty_pool.score("math", r"\boxed{\sqrt{3}}", {"answer": r"\sqrt{2}"})  # the server is warm
    verdicts: list[Verdict] = []
    start = time.monotonic()
    thread = threading.Thread(
        target=lambda: verdicts.append(hasty_pool.score("math", f"\\boxed{{{answer}}}", {"answer": r"\sqrt{2}"}))
    )
    thread.start()
    thread.join(20)
    assert verdicts and time.monotonic() - start < 1.0 + 3.0, "deadline 1 s, and slack for a busy machine"
    assert verdicts[0].reward == 0.0
    assert verdicts[0].outcome in (Outcome.WRONG, Outcome.TIMEOUT, Outcome.NO_ANSWER), verdicts[0].detail
    assert pool.score("math", r"\boxed{\sqrt{4}/\sqrt{2}}", {"answer": r"\sqrt{2}"}).outcome is Outcome.CORRECT


def test_a_verifier_that_breaks_is_counted_as_broken(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reply of a broken math-verify the verdict is neither right nor wrong."""
    broken = b'{"broken": "TypeError: sympy has a bad day"}'
    received = wire.Channel.recv
    monkeypatch.setattr(wire.Channel, "recv", lambda self, deadline: (received(self, deadline)[0], broken))
    verdict = pool.score("math", r"\boxed{\sqrt{3}}", {"answer": r"\sqrt{2}"})
    assert verdict.outcome is Outcome.VERIFIER_ERROR
    assert "bad day" in verdict.detail


def test_a_fork_server_that_dies_is_replaced(pool: RewardPool) -> None:
    worker = pool._workers[0]
    assert pool.score("math", r"\boxed{\sqrt{9}}", {"answer": "3"}).reward == 1.0
    assert worker._algebra._process is not None
    worker._algebra._process.kill()
    worker._algebra._process.wait()
    assert pool.score("math", r"\boxed{\sqrt{9}}", {"answer": "3"}).reward == 1.0


def test_no_answer_can_change_the_verdict_on_the_next(pool: RewardPool) -> None:
    """Every comparison has a process of its own: what one leaves in memory, none inherits."""
    server = ForkServer("algebra")
    try:
        ids = set()
        for _ in range(3):
            with server.run(Limits(cpu_s=5)) as channel:
                channel.settimeout(10)
                nonce = bytes(wire.NONCE_BYTES)
                wire.Channel(channel).send(nonce, b'{"gold": "x", "answer": "y"}')
                ids.add(wire.Channel(channel).recv())
        assert len(ids) == 1
    finally:
        server.close()
