"""Verdicts, by workers that can be killed. Thread safe; every child process belongs to a worker and ends with the pool."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from reward import coding, mathematics
from reward.programs import plan_reference
from reward.sandbox import ForkServer, SandboxError
from reward.verdict import Outcome, Verdict

TASKS = ("math", "code")


def check_reference(task: str, reference: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is wrong, for a reference that can judge nothing. Starts no process."""
    if task == "code":
        plan_reference(reference)
    elif task == "math":
        mathematics.check_reference(reference)
    else:
        raise ValueError(f"no verifier for task {task!r}; there are {TASKS}")


def gold_response(task: str, record: Mapping[str, Any]) -> str:
    """The response that must be judged correct: the answer in a box, or the reference solution in a fence."""
    if task == "math":
        return f"\\boxed{{{record['answer']}}}"
    return f"```python\n{record['reference_solution']}\n```"


class RewardPool:
    """Judges responses with `num_workers` workers, each with fork servers of its own, started when first needed.

    Args:
        num_workers: runs at a time.
        deadline_s: wall-clock seconds of one response; past it the run is killed and the outcome is TIMEOUT.

    Example:
        with RewardPool(num_workers=2) as pool:
            verdicts = pool.score_many([("math", "\\\\boxed{2}", {"answer": "2"})])
    """

    def __init__(self, *, num_workers: int = 1, deadline_s: float = 5.0) -> None:
        if num_workers < 1 or deadline_s <= 0:
            raise ValueError(f"num_workers = {num_workers}, deadline_s = {deadline_s}: both must be positive")
        self._workers = [_Worker(deadline_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def score(self, task: str, response: str, reference: Mapping[str, Any]) -> Verdict:
        """The verdict on one response. Raise ValueError for a reference that `check_reference` refuses."""
        check_reference(task, reference)
        quick = (
            mathematics.quick(response, reference["answer"]) if task == "math" else coding.quick(response, reference)
        )
        if isinstance(quick, Verdict):
            return quick
        worker = self._idle.get()
        try:
            return worker.judge(quick)
        finally:
            self._idle.put(worker)

    def score_many(self, items: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Verdict]:
        """Verdicts in the order of `items`, from all workers at once."""
        if len(self._workers) == 1:
            return [self.score(*item) for item in items]
        with ThreadPoolExecutor(len(self._workers), thread_name_prefix="reward") as threads:
            return list(threads.map(lambda item: self.score(*item), items))

    def close(self) -> None:
        """End every child process, waiting for runs in progress. The pool can be used again; it then starts new ones."""
        taken = [self._idle.get() for _ in self._workers]
        for worker in taken:
            worker.close()
            self._idle.put(worker)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One run at a time, in the fork server of its kind. Candidate and judge never share one."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._candidate = ForkServer("candidate")
        self._judge = ForkServer("judge")
        self._algebra = ForkServer("algebra")

    def judge(self, question: mathematics.Question | coding.Question) -> Verdict:
        """Raises nothing for what the response does; a sandbox that fails twice is a VERIFIER_ERROR."""
        for attempt in (1, 2):
            try:
                if isinstance(question, mathematics.Question):
                    return mathematics.judge(question, self._algebra, self._deadline_s)
                return coding.judge(question, self._candidate, self._judge, self._deadline_s)
            except SandboxError as error:
                if attempt == 2:
                    return Verdict(reward=0.0, outcome=Outcome.VERIFIER_ERROR, parts={}, detail=str(error)[:500])
        raise AssertionError("unreachable")

    def close(self) -> None:
        for server in (self._candidate, self._judge, self._algebra):
            server.close()
