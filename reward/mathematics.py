"""The math verifier: what plain comparison decides, decided here; the rest in a child process per answer."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reward.answers import same_for_certain
from reward.child import wire
from reward.extraction import MAX_ANSWER_CHARS, final_answer
from reward.sandbox import ForkServer, Limits
from reward.verdict import Outcome, Verdict

_QUESTIONS_PER_CHILD = 500
_LIMITS = Limits(cpu_s=600)


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers that plain comparison cannot tell apart or identify."""

    gold: str
    answer: str


def check_reference(reference: Mapping[str, Any]) -> None:
    """Raise ValueError unless `reference["answer"]` is a text that can be an answer."""
    answer = reference.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"reference['answer'] must be a text that is not empty, got {answer!r}")
    if final_answer(f"\\boxed{{{answer}}}") is None and len(answer) <= MAX_ANSWER_CHARS:
        raise ValueError(f"reference['answer'] has unbalanced braces: {answer[:80]!r}")
    if len(answer) > MAX_ANSWER_CHARS:
        raise ValueError(
            f"reference['answer'] has {len(answer)} characters; at most {MAX_ANSWER_CHARS} can be compared"
        )


def quick(response: str, gold: str) -> Verdict | Question:
    """The verdict where there is no answer or a plain comparison decides, else the question for `judge`."""
    answer = final_answer(response)
    if answer is None:
        parts = {"format": 0.0, "accuracy": 0.0}
        return Verdict(reward=0.0, outcome=Outcome.NO_ANSWER, parts=parts, detail="no final answer")
    same = same_for_certain(gold, answer)
    return Question(gold, answer) if same is None else _verdict(same, answer)


class Comparer:
    """Compares answers in a jailed child process (child/algebra.py), symmetrically. Not thread safe.

    A child reads one question after another, because reading is parsing and arithmetic and leaves nothing behind. What
    reading does not decide goes to math-verify, which evaluates text, so that question is the last of its child, whatever
    the child then says. A question past its deadline ends the child too, and so do `_QUESTIONS_PER_CHILD` questions.
    """

    def __init__(self, server: ForkServer) -> None:
        self.server = server
        self._session: contextlib.ExitStack | None = None
        self._channel: wire.Channel | None = None
        self._owner = 0
        self._asked = 0

    def judge(self, question: Question, deadline_s: float, *, reading: bool = True) -> Verdict:
        """Compare by reading, and by math-verify where that decides nothing, or from the start with `reading` off.

        Raises:
            SandboxError: the sandbox fails; what an answer does is an outcome.
        """
        try:
            reply = self._reply(question, deadline_s, reading)
        except TimeoutError:
            self._end_child()
            return _verdict(False, question.answer, Outcome.TIMEOUT, f"no verdict in {deadline_s:g} s")
        except wire.WireError as error:
            self._end_child()
            return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, f"the comparison ended: {error}")
        if "broken" in reply:
            detail = f"the comparison failed: {reply['broken']}"
            return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, detail)
        if not reply["gold_parsed"]:
            detail = f"neither we nor math-verify can read the reference answer {question.gold[:80]!r}"
            return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, detail)
        return _verdict(reply["equal"] is True, question.answer)

    def _reply(self, question: Question, deadline_s: float, reading: bool) -> dict[str, Any]:
        try:
            channel = self._child()
            deadline = time.monotonic() + deadline_s
            reply = _ask(channel, "reading", question, deadline)
        except wire.ChannelClosedError:
            # It may have ended before this question; a fresh child has no such excuse.
            self._end_child()
            channel = self._child()
            deadline = time.monotonic() + deadline_s
            reply = _ask(channel, "reading", question, deadline)
        if "broken" not in reply and reply["equal"] is not None and reading:
            return reply
        try:
            return reply if "broken" in reply else _ask(channel, "math-verify", question, deadline)
        finally:
            self._end_child()

    def close(self) -> None:
        """End the child and its server. Safe to call twice."""
        if self._owner != os.getpid():
            # In a fork of the owner the child is the owner's to end; without a server nothing is swept.
            self.server.close()
        self._end_child()
        self.server.close()

    def _child(self) -> wire.Channel:
        if self._owner != os.getpid():
            self.close()
        if self._channel is None or self._asked >= _QUESTIONS_PER_CHILD:
            self._end_child()
            self._session = contextlib.ExitStack()
            self._owner = os.getpid()
            self._channel = wire.Channel(self._session.enter_context(self.server.run(_LIMITS)))
            self._asked = 0
        self._asked += 1
        return self._channel

    def _end_child(self) -> None:
        session, self._session, self._channel = self._session, None, None
        if session is not None:
            session.close()


def _ask(channel: wire.Channel, by: str, question: Question, deadline: float) -> dict[str, Any]:
    nonce = os.urandom(wire.NONCE_BYTES)
    request = {"by": by, "gold": question.gold, "answer": question.answer}
    channel.send(nonce, json.dumps(request).encode(), deadline)
    echoed, payload = channel.recv(deadline)
    reply = wire.loads(payload)
    if echoed != nonce or not isinstance(reply, dict):
        raise wire.WireError("a reply to another request")
    return reply


def _verdict(correct: bool, answer: str, outcome: Outcome | None = None, detail: str = "") -> Verdict:
    return Verdict(
        reward=float(correct),
        outcome=outcome or (Outcome.CORRECT if correct else Outcome.WRONG),
        parts={"format": 1.0, "accuracy": float(correct)},
        detail=f"answered {answer[:80]}" + (f"; {detail}" if detail else ""),
    )
