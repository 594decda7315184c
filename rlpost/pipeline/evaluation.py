"""Versions on held-out prompts, by the same samplers and verifiers that training uses, and beside it.

An evaluation is of one version, which nobody changes meanwhile: either training's samplers keep theirs until it has ended, or
evaluators, which train nothing, are brought to it. One goes on at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlpost.core.pass_at_k import budgets, clustered_mean, estimate, pass_at_k, voted_at_k
from rlpost.pipeline.deadlines import task_group, within
from rlpost.pipeline.fleet import Fleet, Limits
from rlpost.pipeline.ledger import Ledger
from rlpost.pipeline.ports import Export, GroupRequest, Handle, Serving
from rlpost.pipeline.seeds import derive_seed
from rlpost.types import GroupSummary, Prompt

START, RESUME, STEP = "start", "resume", "step"
"""When an evaluation is made, unless it is after a stage, by whose name it then goes."""

Scores = Mapping[str, float]
"""Share of right samples by prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    name: str
    prompts: Sequence[Prompt]
    num_samples: int
    temperature: float
    max_tokens: int
    every: int | None = None
    """Steps from one evaluation to the next within a stage; None: it is judged between stages alone."""
    vote: Callable[[Prompt, str], str | None] | None = None
    """A response's answer as it votes; None: there is no majority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response to a prompt, and its verdict."""

    number: int
    outcome: str
    answer: str | None
    """As it votes."""
    num_tokens: int
    finish_reason: str
    response: str

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class Settings(Protocol):
    @property
    def seed(self) -> int: ...

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def limits(self) -> Limits: ...


class Samplers(Protocol):
    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]: ...


async def draw(
    eval_set: EvalSet,
    prompt: Prompt,
    numbers: Sequence[int],
    samplers: Samplers,
    serving: Serving,
    settings: Settings,
) -> list[Sample]:
    """The samples of a prompt that have these numbers, judged.

    Seeds depend on the run's seed, the prompt and the number, not on the version: two versions answer under the same draws.
    """
    request = GroupRequest(
        prompt=prompt,
        seeds_G=tuple(derive_seed(settings.seed, "eval", prompt.id, number) for number in numbers),
        temperature=eval_set.temperature,
        max_tokens=eval_set.max_tokens,
    )
    handle, summary = await samplers.sample(request)
    verifier = serving.verifier
    judging = verifier.judge(handle)
    judgements = await within(settings.limits.judge_s, judging, worker=verifier.name, phase=f"judging {prompt.id}")
    group = await serving.fetch(handle)
    return [
        Sample(
            number=number,
            outcome=judgement.outcome,
            answer=eval_set.vote(prompt, rollout.text) if eval_set.vote else None,
            num_tokens=num_tokens,
            finish_reason=reason,
            response=rollout.text,
        )
        for number, judgement, rollout, num_tokens, reason in zip(
            numbers, judgements, group.rollouts, summary.num_tokens_G, summary.finish_reasons_G, strict=True
        )
    ]


def room(eval_set: EvalSet, num_samplers: int, settings: Settings) -> asyncio.Semaphore:
    """For the prompts that are asked at a time: twice what samplers decode at once, so that they never wait for a verdict, and no
    request waits past its deadline in a queue."""
    return asyncio.Semaphore(max(1, 2 * num_samplers * settings.max_num_seqs // eval_set.num_samples))


async def evaluate(
    eval_set: EvalSet, samplers: Samplers, serving: Serving, settings: Settings, *, num_samplers: int
) -> dict[str, list[Sample]]:
    """All samples of the set, by prompt."""
    numbers, asked = range(eval_set.num_samples), room(eval_set, num_samplers, settings)

    async def drawn_of(prompt: Prompt) -> list[Sample]:
        async with asked:
            return await draw(eval_set, prompt, numbers, samplers, serving, settings)

    prompts = {prompt.id: prompt for prompt in eval_set.prompts}  # one that the data has twice is drawn once
    async with task_group() as tasks:
        drawn = {name: tasks.create_task(drawn_of(prompt)) for name, prompt in prompts.items()}
    return {name: task.result() for name, task in drawn.items()}


def figures(eval_set: EvalSet, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """What an evaluation comes to; docs/metrics.md says what each key is."""
    groups, num = list(samples.values()), eval_set.num_samples
    every = [sample for group in groups for sample in group]
    right_P = [sum(sample.correct for sample in group) for group in groups]
    accuracy, error = clustered_mean(right_P, [len(group) for group in groups])
    row: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_se": error,
        "num_prompts": len(groups),
        "num_samples": num,
        "temperature": eval_set.temperature,
        "outcomes": dict(Counter(sample.outcome for sample in every)),
        "response_length_mean": sum(sample.num_tokens for sample in every) / len(every),
        "truncated_share": sum(sample.finish_reason == "length" for sample in every) / len(every),
    }
    if num > 1:
        row["pass_at"] = {k: estimate([pass_at_k(num, right, k) for right in right_P]) for k in budgets(num)[1:]}
    if num > 2 and any(sample.answer is not None for sample in every):
        votes_P = [[(sample.correct, sample.answer) for sample in group] for group in groups]
        row["majority_at"] = {num: estimate([voted_at_k(votes, num) for votes in votes_P])}
    return row


def difference(before: Scores, after: Scores) -> dict[str, float] | None:
    """after - before, prompt by prompt, so that what the prompts have in common cancels; None unless they are the same.

    "Adding Error Bars to Evals", section 4.2 (https://arxiv.org/abs/2411.00640).
    """
    if before.keys() != after.keys():
        return None
    return estimate([after[prompt] - before[prompt] for prompt in after])


def scores_after_stages(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Scores]]:
    """What `Evaluations` compares with, from the samples that the run has kept: by eval set and version."""
    right: dict[str, dict[int, dict[str, dict[int, bool]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for row in rows:
        if row["when"] not in (RESUME, STEP):
            right[row["eval"]][row["step"]][row["prompt_id"]][row["number"]] = row["outcome"] == "correct"
    return {
        name: {
            version: {prompt: sum(of_prompt.values()) / len(of_prompt) for prompt, of_prompt in prompts.items()}
            for version, prompts in versions.items()
        }
        for name, versions in right.items()
    }


class Evaluations:
    """Those of one run, each beside training; which version a row names is checked on every sample of it."""

    def __init__(
        self,
        sets: Sequence[EvalSet],
        workers: Serving,
        settings: Settings,
        log: Callable[[str, Mapping[str, Any]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        *,
        fleet: Fleet,
        holding: asyncio.Lock,
        evaluators: Fleet | None,
        complete: Callable[[], Awaitable[Export]],
        earlier: Mapping[str, Mapping[int, Scores]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            fleet: training's samplers, which keep their version while `holding` is held.
            evaluators: samplers of the evaluations' own; None: they take place on `fleet`.
            complete: the version exported last, whole.
            earlier: `scores_after_stages` of what a resumed run had evaluated before.
        """
        self._sets, self._workers, self._settings, self._log, self._spawn = sets, workers, settings, log, spawn
        self._fleet, self._holding, self._evaluators, self._complete = fleet, holding, evaluators, complete
        self._scores = {each.name: dict(earlier.get(each.name, {})) for each in sets}
        self._judged = 0
        """The version that was judged last, or would have been."""
        self._turn = asyncio.Lock()
        self._running: dict[asyncio.Task[None], tuple[str, int]] = {}
        self._sharing = Ledger("train", clock)

    def due(self, step: int) -> list[EvalSet]:
        """Sets to judge within a stage: those of which a multiple of `every` has passed. None while an evaluation goes on."""
        due = [each for each in self._sets if each.every and step // each.every > self._judged // each.every]
        if due and (going_on := [version for task, (_, version) in self._running.items() if not task.done()]):
            skipped = {"step": step, "evals": [each.name for each in due], "running": going_on[0]}
            self._log("event", {"event": "evaluation_skipped", **skipped})
            self._judged = step
            return []
        return due

    def begin(self, when: str, sets: Sequence[EvalSet], version: int, published: asyncio.Task[Export]) -> None:
        """Judge `version`, of which `published` is the publishing; call before the next one is exported."""
        self._judged = version
        self._running = {task: of for task, of in self._running.items() if not task.done()}
        if sets:
            self._running[self._spawn(self._run(sets, when, version, published))] = when, version

    async def vouched(self) -> None:
        """Returns once all have ended that a checkpoint of a later version vouches for: those that would not be made again.

        On evaluators, none that is due every few steps: training waits for no such one.
        """
        await asyncio.gather(*(t for t, (when, _) in self._running.items() if when != STEP or self._evaluators is None))

    async def ended(self) -> None:
        await asyncio.gather(*self._running)

    @property
    def evaluators(self) -> list[Any]:
        return self._evaluators.samplers if self._evaluators else []

    def shared_s(self) -> float:
        """Since the last call, how long training's samplers had an evaluation beside it."""
        return self._sharing.collect().get("evaluate", 0.0)

    async def _run(self, sets: Sequence[EvalSet], when: str, version: int, published: asyncio.Task[Export]) -> None:
        try:
            await self._judge_published(sets, when, version, published)
        except asyncio.CancelledError:
            self._log("event", {"event": "evaluation_cut", "step": version, "when": when})
            raise

    async def _judge_published(
        self, sets: Sequence[EvalSet], when: str, version: int, published: asyncio.Task[Export]
    ) -> None:
        export = await published
        async with self._holding:
            if self._evaluators is None:
                with self._sharing.state("evaluate"):
                    await self._judge(sets, when, version, self._fleet)
                return
            # Taken before the learner exports the next one, so that it is this one, whoever is lost meanwhile.
            export = await self._complete() if export.base is not None else export
        assert export.version == version
        async with self._turn:
            await self._evaluators.publish(export)
            await self._judge(sets, when, version, self._evaluators)

    async def _judge(self, sets: Sequence[EvalSet], when: str, version: int, fleet: Fleet) -> None:
        for eval_set in sets:
            holders = _Holders(fleet, version)
            samples = await evaluate(eval_set, holders, self._workers, self._settings, num_samplers=len(fleet))
            place = {"eval": eval_set.name, "when": when, "step": version}
            problems = {prompt.id: prompt.problem for prompt in eval_set.prompts}
            for name, of_prompt in samples.items():
                asked = {"prompt_id": name, "problem": problems[name]}
                for sample in of_prompt:
                    self._log("eval_sample", {**place, **asked, **dataclasses.asdict(sample)})
                await asyncio.sleep(0)  # training goes on between two prompts
            scores = {prompt: sum(s.correct for s in group) / len(group) for prompt, group in samples.items()}
            self._log("eval", {**place, **figures(eval_set, samples), **self._gains(eval_set.name, version, scores)})
            if when not in (RESUME, STEP):
                self._scores[eval_set.name][version] = scores

    def _gains(self, name: str, version: int, scores: Scores) -> dict[str, Any]:
        """Since training began, and since the last stage that had ended before this version."""
        ended = {earlier: before for earlier, before in self._scores[name].items() if earlier < version}
        if not ended:
            return {}
        compared = {"since_start": ended.get(0, {}), "since_stage": ended[max(ended)]}
        found = {key: difference(before, scores) for key, before in compared.items()}
        return {key: gain for key, gain in found.items() if gain is not None}


class _Holders:
    """Samplers that are to hold one version.

    Raises:
        RuntimeError: when a token was drawn from another.
    """

    def __init__(self, fleet: Fleet, version: int) -> None:
        self._fleet, self._version = fleet, version

    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]:
        handle, summary = await self._fleet.sample(request)
        drawn_from = {summary.oldest_version, summary.newest_version}
        if not drawn_from <= {None, self._version}:
            raise RuntimeError(f"{request.prompt.id} was to be judged of version {self._version}, not of {drawn_from}")
        return handle, summary
