"""One row per optimizer step, from what the controller saw. Pure; every key is described in docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, mean, pstdev
from typing import Any, Protocol

from rlpost.core.metrics import StepReport, critic_metrics, policy_metrics, preference_metrics
from rlpost.core.temperature import sampled_entropy
from rlpost.pipeline.ports import Export
from rlpost.types import GroupSummary, Judgement, Prompt

WAIT = "wait"
"""The ledger state of a worker that has nothing to do."""
JUDGE = "judge"
"""That of a verifier with at least one response in hand."""


class FinishedGroup(Protocol):
    @property
    def prompt(self) -> Prompt: ...
    @property
    def summary(self) -> GroupSummary: ...
    @property
    def judgements(self) -> tuple[Judgement, ...]: ...
    @property
    def advantages_G(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One version on its way from the learner to the last sampler's proof."""

    export: Export
    export_s: float
    """Reading, comparing and encoding the weights."""
    update_s: float
    """From then on until the last sampler has proved it; the first time that includes their start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything known about one optimizer step."""

    step: int
    """Steps completed, this one included: the version it produced."""
    stage: str
    sampled: bool
    lr: float
    report: StepReport
    groups: Sequence[FinishedGroup]
    seconds: float
    waited_s: float
    """Of `seconds`, how long the train loop waited for groups."""
    evaluating_s: float
    """Since the previous record, how long the samplers served an evaluation beside training."""
    buffer: Mapping[str, int]
    published: Published | None
    """The latest version that has arrived at every sampler."""
    worker_seconds: Mapping[str, Mapping[str, float]]


def step_metrics(record: StepRecord) -> dict[str, Any]:
    """The row of `metrics.jsonl` for this step."""
    lengths = [n for group in record.groups for n in group.summary.num_tokens_G]
    tally = record.report.tally
    row: dict[str, Any] = {
        "step": record.step,
        "stage": record.stage,
        "actor/lr": record.lr,
        "actor/grad_norm": record.report.grad_norm,
        "actor/pg_loss": tally.sums.get("loss", 0.0) / max(tally.sums.get("tokens", 0.0), 1.0),
        "response_length/mean": fmean(lengths),
        "response_length/max": max(lengths),
        "timing_s/step": record.seconds,
        "timing_s/wait_for_rollouts": record.waited_s,
        "timing_s/evaluation": record.evaluating_s,
        "perf/rollouts_per_s": len(lengths) / record.seconds,
        "perf/tokens_per_s": sum(lengths) / record.seconds,
        **{f"queue/{name}": count for name, count in record.buffer.items()},
        **_worker_times(record.worker_seconds),
    }
    if preference := preference_metrics(tally):
        row |= preference
        row["actor/pg_loss"] = row["preference/loss"]
    if record.sampled:
        row |= _rollout_metrics(record)
        row |= policy_metrics(tally)
        if record.report.critic_grad_norm is not None:
            row |= critic_metrics(tally)
            row["critic/grad_norm"] = record.report.critic_grad_norm
            del row["reward/frac_zero_std"]  # with a critic, a group of equal rewards has something to teach
        if "reference_kl" in tally.sums:
            row["actor/kl_loss"] = tally.sums["reference_kl"] / max(tally.sums.get("tokens", 0.0), 1.0)
        row["wait/verdict"] = verdict(record)
    if record.published is not None:
        export = record.published.export
        row |= {
            "publish/version": export.version,
            "publish/bytes": export.num_bytes,
            "publish/full_bytes": export.full_bytes,
            "publish/export_seconds": record.published.export_s,
            "publish/update_seconds": record.published.update_s,
        }
        if export.unchanged_fraction is not None:
            row["publish/unchanged_fraction"] = export.unchanged_fraction
    return row


def _rollout_metrics(record: StepRecord) -> dict[str, Any]:
    groups = record.groups
    judgements = [j for group in groups for j in group.judgements]
    rewards = [j.reward for j in judgements]
    reasons = [reason for group in groups for reason in group.summary.finish_reasons_G]
    ages = Counter(record.step - 1 - (group.summary.oldest_version or 0) for group in groups)
    row: dict[str, Any] = {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "reward/frac_zero_std": sum(not any(group.advantages_G) for group in groups) / len(groups),
        "response_length/clip_ratio": reasons.count("length") / len(reasons),
        "sampling/entropy": sampled_entropy([group.summary for group in groups]),
        "sampling/temperature": mean(group.summary.temperature for group in groups),
        "staleness/group_mean": sum(age * count for age, count in ages.items()) / len(groups),
        "staleness/group_max": max(ages),
        **{f"staleness/groups_age_{age}": count for age, count in sorted(ages.items())},
    }
    for outcome, count in Counter(j.outcome for j in judgements).items():
        row[f"outcome/{outcome}"] = count / len(judgements)
    for part in sorted({part for j in judgements for part in j.parts}):
        row[f"reward/{part}/mean"] = fmean(j.parts[part] for j in judgements if part in j.parts)
    for flag, count in sorted(Counter(flag for j in judgements for flag in j.flags).items()):
        row[f"flag/{flag}"] = count / len(judgements)
    for task in sorted({group.prompt.task for group in groups}):
        of_task = [j for group in groups if group.prompt.task == task for j in group.judgements]
        row[f"reward/{task}/mean"] = fmean(j.reward for j in of_task)
        row |= {f"verifier/{task}/{name}": value for name, value in _verifier_metrics(of_task).items()}
    return row


def _verifier_metrics(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How one task's verdicts came about."""
    seconds, queued = [j.seconds for j in judgements], [j.queued_s for j in judgements]
    row: dict[str, Any] = {
        "seconds_p50": percentile(seconds, 50),
        "seconds_p95": percentile(seconds, 95),
        "queued_s_p95": percentile(queued, 95),
    }
    if tiers := {j.tier for j in judgements if j.tier is not None}:
        row["tier"] = ", ".join(sorted(tiers))
    if opinions := [j.second_opinion for j in judgements if j.second_opinion is not None]:
        row["num_regraded"] = len(opinions)
        row["disagreement"] = opinions.count(False) / len(opinions)
    return row


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` % of them do not exceed (nearest rank)."""
    return sorted(values)[max(-(-percent * len(values) // 100) - 1, 0)]


def _worker_times(worker_seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"time/{worker}/{state}": s for worker, states in worker_seconds.items() for state, s in states.items()}


def _share(seconds: Mapping[str, float], state: str) -> float:
    return seconds.get(state, 0.0) / (sum(seconds.values()) or 1.0)


def verdict(record: StepRecord) -> str:
    """Who waited for whom during this step, and what would help, in one line."""
    learner_share = record.waited_s / record.seconds
    waits = [_share(s, WAIT) for worker, s in record.worker_seconds.items() if worker.startswith("sampler")]
    sampler_share = fmean(waits) if waits else 0.0
    if min(learner_share, sampler_share) > 0.3 and _share(record.worker_seconds.get("verifier", {}), JUDGE) > 0.5:
        tasks = sorted({group.prompt.task for group in record.groups})
        which = " and ".join(f"verifier.{task}.workers" for task in tasks)
        return (
            f"all waited for the verifier, learner {learner_share:.0%} and samplers {sampler_share:.0%}: raise {which}"
        )
    if max(learner_share, sampler_share) < 0.1:
        return f"balanced: learner waited {learner_share:.0%}, samplers {sampler_share:.0%}"
    if learner_share >= sampler_share and record.evaluating_s > record.waited_s / 2:
        return (
            f"learner waited {learner_share:.0%} while an evaluation had the samplers: evaluate less, or add samplers"
        )
    if learner_share >= sampler_share:
        return f"learner waited {learner_share:.0%} for rollouts: add samplers or raise max_staleness"
    return f"samplers waited {sampler_share:.0%} for the learner: add learner ranks or raise max_staleness"
