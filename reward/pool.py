"""Verdicts, by workers that can be killed. Thread safe; every child process belongs to a worker and ends with the pool.

Each task has workers, a queue and a deadline of its own: code is a hundred times slower than math, and none of it stands
before a math answer. What needs no child process is decided at once, in the thread that asks.
"""

from __future__ import annotations

import dataclasses
import queue
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from reward import coding, mathematics
from reward.programs import plan_reference
from reward.sandbox import ForkServer, SandboxError, Tier, choose_tier
from reward.verdict import Outcome, Verdict, printable

TASKS = ("math", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """What one task may use."""

    workers: int = 1
    """Responses judged at a time."""
    deadline_s: float
    """Wall-clock seconds of one response; past it the run is killed and the outcome is TIMEOUT."""
    runs_per_server: int = 2000
    """Runs after which a fork server is replaced by a fresh one."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.deadline_s <= 0 or self.runs_per_server < 1:
            raise ValueError(f"{self}: all must be positive")


_SILENT = (Outcome.TIMEOUT, Outcome.VERIFIER_ERROR)
"""Who ran out of time or broke has no opinion on the other path's."""
MATH_LIMITS = TaskLimits(deadline_s=1.0)
CODE_LIMITS = TaskLimits(deadline_s=10.0)


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
    """Judges responses, each task with workers of its own, whose fork servers start when first needed.

    Args:
        math, code: concurrency and deadline of each task.
        min_tier: the least isolation to run in; see `reward.sandbox.Tier`.
        unsafe_allow_rlimits_only: accept a machine without isolation: model-written code can then read its files.
        regrade_share: share of responses, chosen by their text, that a second, independent path judges as well; the first
            verdict stands, and `Verdict.second_opinion` says whether they agree.

    Raises:
        TierError: the machine offers less isolation than `min_tier`.

    Example:
        with RewardPool() as pool:
            verdicts = pool.score_many([("math", "\\\\boxed{2}", {"answer": "2"})])
    """

    def __init__(
        self,
        *,
        math: TaskLimits = MATH_LIMITS,
        code: TaskLimits = CODE_LIMITS,
        min_tier: str = Tier.LANDLOCK,
        unsafe_allow_rlimits_only: bool = False,
        regrade_share: float = 0.0,
    ) -> None:
        if not 0 <= regrade_share <= 1:
            raise ValueError(f"regrade_share = {regrade_share} is not a share")
        self.tier = choose_tier(Tier(min_tier), unsafe_allow_rlimits_only=unsafe_allow_rlimits_only)
        self._regrade_share = regrade_share
        self._math = [_MathWorker(math, self.tier) for _ in range(math.workers)]
        self._code = [_CodeWorker(code, self.tier) for _ in range(code.workers)]
        self._idle: dict[str, queue.SimpleQueue[_Worker]] = {task: queue.SimpleQueue() for task in TASKS}
        self._threads = {
            task: ThreadPoolExecutor(limits.workers, thread_name_prefix=f"reward-{task}")
            for task, limits in (("math", math), ("code", code))
        }
        for task, workers in (("math", self._math), ("code", self._code)):
            for worker in workers:
                self._idle[task].put(worker)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> RewardPool:
        """From a plain table such as a recipe's [verifier], whose entries "math" and "code" are tables of TaskLimits."""
        limits = {task: TaskLimits(**table[task]) for task in TASKS if task in table}
        return cls(**{**table, **limits})

    def score(self, task: str, response: str, reference: Mapping[str, Any]) -> Verdict:
        """The verdict on one response. Raise ValueError for a reference that `check_reference` refuses."""
        decided = self._decide_here(task, response, reference)
        return decided if isinstance(decided, Verdict) else self._decide_in_child(task, decided, time.monotonic())

    def submit(self, task: str, response: str, reference: Mapping[str, Any]) -> Future[Verdict]:
        """As `score`, without waiting."""
        decided = self._decide_here(task, response, reference)
        if not isinstance(decided, Verdict):
            return self._threads[task].submit(self._decide_in_child, task, decided, time.monotonic())
        done: Future[Verdict] = Future()
        done.set_result(decided)
        return done

    def score_many(self, items: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Verdict]:
        """Verdicts in the order of `items`, from all workers at once."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def close(self) -> None:
        """End every child process, waiting for runs in progress, whose deadlines bound the wait. The pool is then used up."""
        for threads in self._threads.values():
            threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    @property
    def _workers(self) -> list[_Worker]:
        return [*self._math, *self._code]

    def _decide_here(self, task: str, response: str, reference: Mapping[str, Any]) -> Verdict | _Case:
        started = time.monotonic()
        check_reference(task, reference)
        if task == "math":
            quick: Verdict | Any = mathematics.quick(response, reference["answer"])
        else:
            quick = coding.quick(response, reference)
        second = self._regrade_share > 0 and _share_of(response) < self._regrade_share
        if isinstance(quick, Verdict):
            quick = dataclasses.replace(quick, seconds=time.monotonic() - started)
            if not second or quick.outcome is Outcome.NO_ANSWER:
                return quick
        return _Case(response=response, reference=reference, first=quick, second=second)

    def _decide_in_child(self, task: str, case: _Case, submitted: float) -> Verdict:
        worker = self._idle[task].get()
        started = time.monotonic()
        try:
            verdict = case.first
            if not isinstance(verdict, Verdict):
                verdict = _twice(lambda: worker.judge(case.first))
                verdict = dataclasses.replace(verdict, tier=self.tier.value, seconds=time.monotonic() - started)
            if case.second and verdict.outcome not in _SILENT:
                verdict = _compare(verdict, _twice(lambda: worker.judge_again(case.response, case.reference)))
        finally:
            self._idle[task].put(worker)
        return dataclasses.replace(verdict, queued_s=started - submitted)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A response that needs a child process."""

    response: str
    reference: Mapping[str, Any]
    first: Any
    """The first path's question, or its verdict where it needed no child."""
    second: bool


class _Worker(Protocol):
    """One run at a time, in fork servers of its own."""

    def judge(self, question: Any) -> Verdict:
        """Raise SandboxError when the sandbox fails, not when the response does."""
        ...

    def judge_again(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """By a second path that shares as little as possible with the first. Raise SandboxError."""
        ...

    def close(self) -> None: ...


class _MathWorker:
    def __init__(self, limits: TaskLimits, tier: Tier) -> None:
        self._deadline_s = limits.deadline_s
        self._algebra = mathematics.Comparer(ForkServer("algebra", tier, max_runs=limits.runs_per_server))

    def judge(self, question: mathematics.Question) -> Verdict:
        return self._algebra.judge(question, self._deadline_s)

    def judge_again(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """By math-verify alone, also where plain comparison or our own reading has decided."""
        answer = mathematics.final_answer(response)
        assert answer is not None, "a response without an answer is not judged twice"
        return self._algebra.judge(mathematics.Question(reference["answer"], answer), self._deadline_s, reading=False)

    def close(self) -> None:
        self._algebra.close()


class _CodeWorker:
    """Candidate and judge never share a fork server."""

    def __init__(self, limits: TaskLimits, tier: Tier) -> None:
        self._deadline_s = limits.deadline_s
        self._tier = tier
        self._candidate = ForkServer("candidate", tier, max_runs=limits.runs_per_server)
        self._judge = ForkServer("judge", tier, max_runs=limits.runs_per_server)

    def judge(self, question: coding.Question) -> Verdict:
        return coding.judge(question, self._candidate, self._judge, self._deadline_s)

    def judge_again(self, response: str, reference: Mapping[str, Any]) -> Verdict:
        """In fresh servers that serve nothing else, and by Python's own `==` in the judge instead of canonical texts."""
        question = coding.quick(response, reference, compare_in_parent=False)
        assert isinstance(question, coding.Question), "a response without a program is not judged twice"
        candidate, judge = ForkServer("candidate", self._tier), ForkServer("judge", self._tier)
        try:
            return coding.judge(question, candidate, judge, self._deadline_s)
        finally:
            candidate.close()
            judge.close()

    def close(self) -> None:
        self._candidate.close()
        self._judge.close()


def _twice(judge: Any) -> Verdict:
    """A sandbox that fails is replaced and tried once more; one that fails twice is a VERIFIER_ERROR."""
    try:
        return judge()
    except SandboxError:
        try:
            return judge()
        except SandboxError as error:
            return Verdict(reward=0.0, outcome=Outcome.VERIFIER_ERROR, parts={}, detail=printable(str(error), 500))


def _compare(first: Verdict, second: Verdict) -> Verdict:
    """The first verdict with the second opinion noted."""
    if second.outcome in _SILENT:
        return first
    agree = first.reward == second.reward
    detail = first.detail if agree else f"{first.detail}; a second path says {second.outcome}: {second.detail}"
    return dataclasses.replace(first, second_opinion=agree, detail=detail)


def _share_of(response: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that a run and its resume judge the same responses twice."""
    return zlib.crc32(response.encode(errors="surrogatepass")) / 2**32
