"""Accuracy of one version on held-out prompts, by the same samplers and verifiers that training uses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlpost.core.pass_at_k import clustered_mean
from rlpost.pipeline.deadlines import within
from rlpost.pipeline.fleet import Limits
from rlpost.pipeline.ports import GroupRequest, Handle, Verifier
from rlpost.pipeline.seeds import derive_seed
from rlpost.types import GroupSummary, Judgement, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    name: str
    prompts: Sequence[Prompt]
    num_samples: int
    temperature: float
    max_tokens: int
    every: int | None = None
    """Steps from one evaluation to the next within a stage; None: it is judged between stages alone."""


class Settings(Protocol):
    @property
    def seed(self) -> int: ...

    @property
    def limits(self) -> Limits: ...


class Samplers(Protocol):
    """Whoever has a group sampled: a run's `Fleet`, or samplers that nothing is published to."""

    async def sample(self, request: GroupRequest) -> tuple[Handle, GroupSummary]: ...


async def draw(
    eval_set: EvalSet,
    prompt: Prompt,
    numbers: Sequence[int],
    samplers: Samplers,
    verifier: Verifier,
    settings: Settings,
) -> tuple[Handle, GroupSummary, tuple[Judgement, ...]]:
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
    judging = verifier.judge(handle)
    judgements = await within(settings.limits.judge_s, judging, worker=verifier.name, phase=f"judging {prompt.id}")
    return handle, summary, judgements


async def evaluate(
    eval_set: EvalSet, samplers: Samplers, verifier: Verifier, settings: Settings, *, version: int
) -> dict[str, Any]:
    """pass@1 of the version that all samplers hold: the mean reward over all samples, with the standard error of the mean over
    prompts."""
    numbers = range(eval_set.num_samples)
    results = await asyncio.gather(
        *(draw(eval_set, prompt, numbers, samplers, verifier, settings) for prompt in eval_set.prompts)
    )
    summaries = [summary for _, summary, _ in results]
    drawn_from = {v for summary in summaries for v in (summary.oldest_version, summary.newest_version)} - {None}
    assert drawn_from <= {version}, (
        f"{eval_set.name} was to be judged of version {version}, and was drawn from {drawn_from}"
    )
    judged = [judgements for *_, judgements in results]
    accuracy, error = clustered_mean(
        [sum(j.reward for j in group) for group in judged], [len(group) for group in judged]
    )
    lengths = [length for summary in summaries for length in summary.num_tokens_G]
    reasons = [reason for summary in summaries for reason in summary.finish_reasons_G]
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "num_prompts": len(judged),
        "num_samples": eval_set.num_samples,
        "temperature": eval_set.temperature,
        "outcomes": dict(Counter(j.outcome for group in judged for j in group)),
        "response_length_mean": sum(lengths) / len(lengths),
        "truncated_share": sum(reason == "length" for reason in reasons) / len(reasons),
    }
