"""Verdicts, by workers that can be killed. Thread safe; every child process belongs to a worker and ends with the pool."""

from __future__ import annotations

import json
import queue
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from reward.answers import final_answer, same_for_certain
from reward.child import codec
from reward.programs import TestPlan, check_code_reference, extract_program, plan_tests
from reward.sandbox import Run, RunEndedError, RunTimeoutError, Sandbox, SandboxError
from reward.verdict import Outcome, Verdict

TASKS = ("math", "code")
MAX_VALUE_CHARS = 10_000
"""Return values longer than this (and 16 times what was expected) are wrong without being decoded."""


def check_reference(task: str, reference: Mapping[str, Any]) -> None:
    """Raises ValueError when `reference` cannot judge anything."""
    if task == "code":
        check_code_reference(reference)
    elif task == "math":
        answer = reference.get("answer")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"reference['answer'] must be a text that is not empty, got {answer!r}")
    else:
        raise ValueError(f"no verifier for task {task!r}; there are {TASKS}")


def gold_response(task: str, record: Mapping[str, Any]) -> str:
    """The response that must be judged correct: the answer in a box, or the reference solution in a fence."""
    if task == "math":
        return f"\\boxed{{{record['answer']}}}"
    return f"```python\n{record['reference_solution']}\n```"


class RewardPool:
    """Judges responses with `num_workers` workers, each with its own fork server.

    Args:
        num_workers: runs at a time.
        deadline_s: wall-clock seconds of one response; past it the run is killed and the outcome is TIMEOUT.

    Example:
        with RewardPool(num_workers=2) as pool: verdicts = pool.score_many([("math", "\\\\boxed{2}", {"answer": "2"})])
    """

    def __init__(self, *, num_workers: int = 1, deadline_s: float = 5.0) -> None:
        if num_workers < 1 or deadline_s <= 0:
            raise ValueError(f"num_workers = {num_workers}, deadline_s = {deadline_s}: both must be positive")
        self._workers = [_Worker(deadline_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="reward") if num_workers > 1 else None

    def score(self, task: str, response: str, reference: Mapping[str, Any]) -> Verdict:
        """The verdict on one response. Raises ValueError for a reference that `check_reference` refuses."""
        if task == "math":
            verdict = _quick_math(response, reference)
            if verdict is not None:
                return verdict
        elif task != "code":
            check_reference(task, reference)
        worker = self._idle.get()
        try:
            return worker.math(response, reference) if task == "math" else worker.code(response, reference)
        except SandboxError as error:
            return Verdict(reward=0.0, outcome=Outcome.VERIFIER_ERROR, parts={}, detail=str(error))
        finally:
            self._idle.put(worker)

    def score_many(self, items: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Verdict]:
        """Verdicts in the order of `items`. The same response to the same problem is judged once."""
        keys = [(task, response, id(reference)) for task, response, reference in items]
        distinct = dict(zip(keys, items, strict=True))
        score = lambda item: self.score(*item)  # noqa: E731
        run = self._threads.map if self._threads is not None else map
        verdicts = dict(zip(distinct, run(score, distinct.values()), strict=True))
        return [verdicts[key] for key in keys]

    def close(self) -> None:
        """End every child process. Call it once nobody scores any more."""
        for worker in self._workers:
            worker.close()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _math_verdict(correct: bool, detail: str = "") -> Verdict:
    return Verdict(
        reward=float(correct),
        outcome=Outcome.CORRECT if correct else Outcome.WRONG,
        parts={"format": 1.0, "accuracy": float(correct)},
        detail=detail,
    )


def _quick_math(response: str, reference: Mapping[str, Any]) -> Verdict | None:
    """What plain comparison decides: no answer, the same text, the same or another number."""
    answer = final_answer(response)
    if answer is None:
        return Verdict(
            reward=0.0, outcome=Outcome.NO_ANSWER, parts={"format": 0.0, "accuracy": 0.0}, detail="no final answer"
        )
    same = same_for_certain(str(reference["answer"]), answer)
    return None if same is None else _math_verdict(same, f"answered {answer[:80]}")


class _Worker:
    """One thread's worth of child processes: a fork server for programs and one with math-verify, each when needed."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        cpu_s = int(deadline_s) + 1
        self._programs = Sandbox(cpu_s=cpu_s)
        self._math = Sandbox(preload="math", cpu_s=cpu_s)

    def close(self) -> None:
        self._programs.close()
        self._math.close()

    def math(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        answer = final_answer(response)
        assert answer is not None
        run = self._math.spawn()
        deadline = time.monotonic() + self._deadline_s
        try:
            run.send({"kind": "math", "gold": str(reference["answer"]), "answer": answer}, deadline)
            _expect(run, "ready", deadline)
            result = _expect(run, "math", deadline)
        except RunTimeoutError:
            return Verdict(
                reward=0.0, outcome=Outcome.TIMEOUT, parts={"format": 1.0, "accuracy": 0.0}, detail=answer[:80]
            )
        except RunEndedError as error:
            # Parsing the answer exhausted the child's memory or stack: no gold does, so no such answer is right.
            return _math_verdict(False, f"could not be compared ({error}): {answer[:80]}")
        finally:
            self._math.kill(run)
        return _math_verdict(result["equal"] is True, f"answered {answer[:80]}")

    def code(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        setup = reference.get("setup") or ""
        plan = plan_tests(tuple(reference["tests"]), setup, reference.get("entry_point"))
        program = extract_program(response)
        parts = {"format": 1.0, "accuracy": 0.0, "tests_passed": 0.0, "tests_total": float(plan.num_tests)}
        if program is None:
            return Verdict(reward=0.0, outcome=Outcome.NO_ANSWER, parts=parts | {"format": 0.0}, detail="no program")
        passed: list[bool] = []
        try:
            detail = self._run_tests(program, setup, plan, passed)
        except RunTimeoutError:
            parts["tests_passed"] = float(sum(passed))
            return Verdict(
                reward=0.0, outcome=Outcome.TIMEOUT, parts=parts, detail=f"no result in {self._deadline_s:g} s"
            )
        correct = len(passed) == plan.num_tests and all(passed)
        parts |= {"accuracy": float(correct), "tests_passed": float(sum(passed))}
        return Verdict(
            reward=float(correct), outcome=Outcome.CORRECT if correct else Outcome.WRONG, parts=parts, detail=detail
        )

    def _run_tests(self, program: str, setup: str, plan: TestPlan, passed: list[bool]) -> str:
        """Fills `passed` with one entry per test that was decided; returns a line about the first that failed."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            run = self._programs.spawn(*([theirs.fileno()] if plan.judged else []))
            theirs.close()
            deadline = time.monotonic() + self._deadline_s
            try:
                job = {"solution": program, "setup": setup, "calls": plan.calls, "serve": bool(plan.judged)}
                run.send({"kind": "candidate", **job}, deadline)
                _expect(run, "ready", deadline)
                detail = _compare_values(run, plan, deadline, passed)
                if plan.judged and all(passed):
                    detail = self._judge(ours, setup, plan, deadline, passed)
                return detail
            except RunEndedError as error:
                return str(error)
            finally:
                self._programs.kill(run)

    def _judge(self, channel: socket.socket, setup: str, plan: TestPlan, deadline: float, passed: list[bool]) -> str:
        judge = self._programs.spawn(channel.fileno())
        channel.close()
        try:
            job = {
                "prelude": "",
                "setup": setup,
                "proxies": plan.proxies,
                "modules": plan.modules,
                "tests": plan.judged,
            }
            judge.send({"kind": "judge", **job}, deadline)
            _expect(judge, "ready", deadline)
            for index in range(len(plan.judged)):
                result = _expect(judge, "judged", deadline)
                passed.append(result.get("index") == index and result.get("passed") is True)
                if not passed[-1]:
                    return f"a test failed: {result.get('detail', '')}"
            return ""
        finally:
            self._programs.kill(judge)


def _compare_values(run: Run, plan: TestPlan, deadline: float, passed: list[bool]) -> str:
    """Compare what each call returned with what was expected, here, where the candidate's code has never been."""
    for index, expected in enumerate(plan.expected):
        result = run.receive(deadline)
        if result.get("kind") != "value" or result.get("index") != index or "value" not in result:
            passed.append(False)
            return str(result.get("error") or result.get("detail") or "no value")[:200]
        passed.append(_equals(result["value"], expected))
        if not passed[-1]:
            return f"{plan.calls[index][:80]} returned something else"
    return ""


def _equals(tagged: Any, expected: Any) -> bool:
    """Python's equality of plain values; a malformed or oversized claim equals nothing and costs next to nothing."""
    limit = MAX_VALUE_CHARS + 16 * len(repr(expected))
    if len(json.dumps(tagged)) > limit:
        return False
    try:
        return bool(codec.decode(tagged) == expected)
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError):
        return False


def _expect(run: Run, kind: str, deadline: float) -> dict[str, Any]:
    frame = run.receive(deadline)
    if frame.get("kind") != kind:
        raise RunEndedError(str(frame.get("detail") or f"unexpected {frame.get('kind')!r}")[:200])
    return frame
