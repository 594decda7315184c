"""Accuracy of one version on held-out prompts, by the same samplers and verifiers that training uses."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlpost.pipeline.deadlines import within
from rlpost.pipeline.fleet import Fleet, Limits
from rlpost.pipeline.ports import GroupRequest, Verifier
from rlpost.pipeline.seeds import derive_seed
from rlpost.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    name: str
    prompts: Sequence[Prompt]
    num_samples: int
    temperature: float
    max_tokens: int


class Settings(Protocol):
    @property
    def seed(self) -> int: ...

    @property
    def limits(self) -> Limits: ...


async def evaluate(eval_set: EvalSet, fleet: Fleet, verifier: Verifier, settings: Settings) -> dict[str, Any]:
    """pass@1: the mean reward over all samples, with the standard error of the mean over prompts.

    Seeds depend on the run's seed and the prompt, not on the version: two versions answer under the same draws.
    """

    async def one(prompt: Prompt) -> tuple[list[float], list[str], list[int], list[str]]:
        seeds = tuple(derive_seed(settings.seed, "eval", prompt.id, i) for i in range(eval_set.num_samples))
        request = GroupRequest(
            prompt=prompt, seeds_G=seeds, temperature=eval_set.temperature, max_tokens=eval_set.max_tokens
        )
        handle, summary = await fleet.sample(request)
        judgements = await within(
            settings.limits.judge_s, verifier.judge(handle), worker=verifier.name, phase=f"judging {prompt.id}"
        )
        rewards = [j.reward for j in judgements]
        return rewards, [j.outcome for j in judgements], list(summary.num_tokens_G), list(summary.finish_reasons_G)

    results = await asyncio.gather(*(one(prompt) for prompt in eval_set.prompts))
    means = [sum(rewards) / len(rewards) for rewards, *_ in results]
    accuracy = sum(means) / len(means)
    variance = sum((mean - accuracy) ** 2 for mean in means) / max(len(means) - 1, 1)
    outcomes = Counter(outcome for _, outcomes, *_ in results for outcome in outcomes)
    lengths = [length for *_, lengths, _ in results for length in lengths]
    reasons = [reason for *_, reasons in results for reason in reasons]
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(variance / len(means)),
        "num_prompts": len(means),
        "num_samples": eval_set.num_samples,
        "temperature": eval_set.temperature,
        "outcomes": dict(outcomes),
        "response_length_mean": sum(lengths) / len(lengths),
        "truncated_share": sum(reason == "length" for reason in reasons) / len(reasons),
    }
