"""The math verifier: what plain comparison decides, decided here; the rest by math-verify in a child process."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reward.answers import MAX_ANSWER_CHARS, final_answer, same_for_certain, unwrap_equation
from reward.child import wire
from reward.sandbox import ForkServer, Limits, SandboxError
from reward.verdict import Outcome, Verdict


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


def judge(question: Question, server: ForkServer, deadline_s: float) -> Verdict:
    """Compare by math-verify, symmetrically. Raise SandboxError when the sandbox fails, not when an answer does."""
    nonce = os.urandom(wire.NONCE_BYTES)
    gold = unwrap_equation(question.gold, question.answer)
    answer = unwrap_equation(question.answer, question.gold)
    request = json.dumps({"gold": gold, "answer": answer}).encode()
    with server.run(Limits(cpu_s=math.ceil(deadline_s) + 1)) as ours:
        deadline = time.monotonic() + deadline_s
        channel = wire.Channel(ours)
        try:
            channel.send(nonce, request, deadline)
            echoed, payload = channel.recv(deadline)
            reply = wire.loads(payload)
        except TimeoutError:
            return _verdict(False, question.answer, Outcome.TIMEOUT, f"no verdict in {deadline_s:g} s")
        except wire.WireError as error:
            return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, f"math-verify ended: {error}")
    if echoed != nonce or not isinstance(reply, dict):
        raise SandboxError("a reply to another request")
    if "broken" in reply:
        return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, f"math-verify failed: {reply['broken']}")
    if not reply["gold_parsed"]:
        detail = f"math-verify cannot parse the reference answer {question.gold[:80]!r}"
        return _verdict(False, question.answer, Outcome.VERIFIER_ERROR, detail)
    return _verdict(reply["equal"] is True, question.answer)


def _verdict(correct: bool, answer: str, outcome: Outcome | None = None, detail: str = "") -> Verdict:
    return Verdict(
        reward=float(correct),
        outcome=outcome or (Outcome.CORRECT if correct else Outcome.WRONG),
        parts={"format": 1.0, "accuracy": float(correct)},
        detail=f"answered {answer[:80]}" + (f"; {detail}" if detail else ""),
    )
