"""The code verifier: runs a response's program against a problem's tests, and judges from outside its process."""

from __future__ import annotations

import json
import math
import os
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward.child import wire
from reward.comparison import same_json, same_output
from reward.fences import extract_program
from reward.plans import Case, JsonValue, TestPlan
from reward.programs import plan_reference
from reward.sandbox import ForkServer, Limits, SandboxError
from reward.suspicion import flags
from reward.verdict import Outcome, Verdict, printable

MAX_OUTPUT_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Question:
    """A program and the tests it is to pass."""

    program: str
    fenced: bool
    plan: TestPlan


@dataclass(slots=True)
class _Findings:
    """What is known so far, so that a run cut short still counts the tests it passed."""

    compiled: bool = False
    passed: list[bool] = field(default_factory=list)
    detail: str = ""
    outcome: Outcome | None = None

    def record(self, passed: bool, detail: str) -> None:
        self.passed.append(passed)
        if not passed and not self.detail:
            self.detail = detail


class _ProgramFailedError(Exception):
    """The program did not get as far as its tests."""


def quick(response: str, reference: Mapping[str, Any], *, compare_in_parent: bool = True) -> Verdict | Question:
    """NO_ANSWER where there is no program, else the question for `judge`; see `plan_reference` for the flag."""
    plan = plan_reference(reference, compare_in_parent=compare_in_parent)
    found = extract_program(response)
    if found is None:
        return _verdict(_Findings(outcome=Outcome.NO_ANSWER, detail="no program"), plan)
    return Question(*found, plan)


def judge(question: Question, candidates: ForkServer, judges: ForkServer, deadline_s: float) -> Verdict:
    """Run all tests within one deadline. Raise SandboxError when the sandbox fails, not when the program does."""
    findings = _Findings()
    limits = Limits(cpu_s=math.ceil(deadline_s) + 1)
    try:
        if question.plan.scripts:
            _run_scripts(question, candidates, limits, deadline_s, findings)
        elif question.plan.snippets:
            _run_snippets(question, candidates, judges, limits, deadline_s, findings)
        else:
            _run_cases(question, candidates, limits, deadline_s, findings)
    except TimeoutError:
        findings.outcome, findings.detail = Outcome.TIMEOUT, f"not done in {deadline_s:g} s"
    except (_ProgramFailedError, wire.WireError) as error:
        findings.detail = findings.detail or str(error)
    if not findings.compiled and not question.fenced:
        findings.outcome, findings.detail = Outcome.NO_ANSWER, "no fenced block, and the text is not a program"
    return _verdict(findings, question.plan, flags(question.program, question.plan.expected_texts))


def _verdict(findings: _Findings, plan: TestPlan, suspicions: tuple[str, ...] = ()) -> Verdict:
    correct = findings.outcome is None and len(findings.passed) == plan.num_tests and all(findings.passed)
    return Verdict(
        reward=float(correct),
        outcome=findings.outcome or (Outcome.CORRECT if correct else Outcome.WRONG),
        parts={
            "format": float(findings.compiled),
            "accuracy": float(correct),
            "tests_passed": float(sum(findings.passed)),
            "tests_total": float(plan.num_tests),
        },
        detail=printable(findings.detail),
        flags=suspicions,
    )


class _Candidate:
    """Questions to a candidate's process, each under a nonce of its own."""

    def __init__(self, ours: socket.socket, deadline: float) -> None:
        self._channel = wire.Channel(ours)
        self._deadline = deadline

    def load(self, request: dict[str, str], findings: _Findings) -> None:
        """Compile and execute the program. Raise _ProgramFailedError with its own words."""
        nonce = self._send(json.dumps(request).encode())
        for step in ("compiled", "loaded"):
            reply = self._recv(nonce)
            if reply.get(step) is not True:
                raise _ProgramFailedError(str(reply.get("error")))
            findings.compiled = True

    def ask(self, request: bytes) -> dict[str, Any]:
        return self._recv(self._send(request))

    def _send(self, request: bytes) -> bytes:
        nonce = os.urandom(wire.NONCE_BYTES)
        self._channel.send(nonce, request, self._deadline)
        return nonce

    def _recv(self, nonce: bytes) -> dict[str, Any]:
        echoed, payload = self._channel.recv(self._deadline)
        reply = wire.loads(payload)
        if echoed != nonce or not isinstance(reply, dict):
            raise wire.WireError("an answer to no question")
        return reply


def _run_cases(question: Question, server: ForkServer, limits: Limits, deadline_s: float, findings: _Findings) -> None:
    with server.run(limits) as ours:
        candidate = _Candidate(ours, time.monotonic() + deadline_s)
        candidate.load(_load_request(question), findings)
        for cases in question.plan.cases:
            held = [_holds(case, candidate, findings) for case in cases]
            findings.record(all(held), "")


def _holds(case: Case, candidate: _Candidate, findings: _Findings) -> bool:
    """Whether the value that the candidate returned is the expected one; decided here."""
    reply = candidate.ask(case.request)
    if "value" not in reply:
        raised = reply.get("raised")
        findings.detail = findings.detail or f"{case.source[:100]} raised {str(raised)[:180]}"
        return False
    if isinstance(case.expected, bool):
        holds = wire.truth(reply["value"]) is case.expected
    elif isinstance(case.expected, JsonValue):
        holds = same_json(reply["value"], case.expected.value, case.expected.tolerance)
    else:
        returned = wire.canonical(reply["value"])
        holds = returned == case.expected and not wire.equals_nothing(returned)
    if not holds:
        findings.detail = findings.detail or f"{case.source[:100]} returned {json.dumps(reply['value'])[:150]}"
    return holds


def _run_snippets(
    question: Question,
    candidates: ForkServer,
    judges: ForkServer,
    limits: Limits,
    deadline_s: float,
    findings: _Findings,
) -> None:
    plan = question.plan
    request = {"prelude": plan.prelude, "setup": plan.judge_setup, "tests": plan.snippets}
    request |= {"remote": plan.remote, "modules": plan.modules}
    with candidates.run(limits) as to_candidate:
        deadline = time.monotonic() + deadline_s
        _Candidate(to_candidate, deadline).load(_load_request(question), findings)
        to_candidate.settimeout(None)
        with judges.run(limits, to_candidate) as to_judge:
            # The judge holds the only copy, so that the end of either process is seen by the other.
            to_candidate.close()
            channel = wire.Channel(to_judge)
            nonce = os.urandom(wire.NONCE_BYTES)
            channel.send(nonce, json.dumps(request).encode(), deadline)
            for index in range(len(plan.snippets)):
                try:
                    echoed, payload = channel.recv(deadline)
                except wire.WireError as error:
                    raise SandboxError(f"the judge ended before its verdict: {error}") from error
                reply = wire.loads(payload)
                if echoed != nonce or "broken" in reply or reply.get("test") != index:
                    findings.outcome = Outcome.VERIFIER_ERROR
                    findings.detail = f"the tests do not run: {reply.get('broken', 'an answer out of turn')}"[:300]
                    return
                findings.record(reply["passed"] is True, f"test {index + 1}: {reply['detail']}")


def _run_scripts(
    question: Question, server: ForkServer, limits: Limits, deadline_s: float, findings: _Findings
) -> None:
    deadline = time.monotonic() + deadline_s
    for index, (given, expected) in enumerate(question.plan.scripts):
        ours_out, theirs_out = socket.socketpair()
        with ours_out, theirs_out, server.run(limits, theirs_out) as ours:
            theirs_out.close()
            channel = wire.Channel(ours)
            nonce = os.urandom(wire.NONCE_BYTES)
            request = _load_request(question) | {"name": "__main__", "stdin": given}
            channel.send(nonce, json.dumps(request).encode(), deadline)
            echoed, payload = channel.recv(deadline)
            reply = wire.loads(payload)
            if echoed != nonce or not isinstance(reply, dict) or reply.get("compiled") is not True:
                raise _ProgramFailedError(str(reply.get("error") if isinstance(reply, dict) else "malformed"))
            findings.compiled = True
            written = _read_output(ours_out, ours, deadline)
        same = same_output(written, expected, question.plan.tolerance)
        findings.record(same, f"test {index + 1}: wrote {written[:150]!r}")


def _read_output(output: socket.socket, life: socket.socket, deadline: float) -> str:
    """What the program wrote until it ended, at most MAX_OUTPUT_BYTES. Raise TimeoutError at the deadline."""
    written = bytearray()
    output.setblocking(False)
    while len(written) <= MAX_OUTPUT_BYTES:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the deadline has passed")
        ready, _, _ = select.select([output, life], [], [], remaining_s)
        if output in ready:
            chunk = output.recv(1 << 16)
            if not chunk:
                break
            written += chunk
        # The main process has ended when its channel closes, even if a child it left holds on to the output.
        elif life in ready and not life.recv(1 << 16):
            break
    return bytes(written[:MAX_OUTPUT_BYTES]).decode(errors="replace")


def _load_request(question: Question) -> dict[str, str]:
    plan = question.plan
    return {
        "provided": plan.provided,
        "program": question.program,
        "setup": plan.candidate_setup,
        "name": "solution",
    }
