"""Numbers that add up: what a micro-batch reports, so that a step's figures do not depend on how it was cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlpost.types import TrainingBatch

MISMATCH_EDGES = torch.logspace(-4, 1, 51)
"""Bin edges of the |sampler - learner| log-prob histogram; its percentiles are read off these."""
AGE_BUCKETS = 4
"""Ages 0, 1, 2 and "3 or more" are told apart."""
ZERO_VARIANCE = 1e-9
"""Of a step's returns: less is the rounding of sums."""
OPTIONAL_SHARES = {
    "clipped": "actor/pg_clipfrac",
    "clipped_low": "actor/pg_clipfrac_lower",
    "clipped_dual": "actor/pg_clipfrac_dual",
    "weight_truncated": "mismatch/weight_truncated_share",
    "weight_masked": "mismatch/weight_masked_share",
}
"""Sums that only some objectives report, and the share of tokens each becomes."""


@dataclass(slots=True)
class Tally:
    """Sums and maxima that merge exactly over micro-batches and ranks."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    mismatch_histogram: Tensor = field(default_factory=lambda: torch.zeros(len(MISMATCH_EDGES) + 1))

    def add(self, **sums: float | Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    @classmethod
    def merge(cls, tallies: Iterable[Tally]) -> Tally:
        merged = cls()
        for tally in tallies:
            merged.add(**tally.sums)
            for name, value in tally.maxima.items():
                merged.maxima[name] = max(value, merged.maxima.get(name, value))
            merged.mismatch_histogram = merged.mismatch_histogram + tally.mismatch_histogram
        return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step."""

    grad_norm: float
    """Of the step's mean gradient, before clipping."""
    tally: Tally
    critic_grad_norm: float | None = None
    """The same of the critic; None without one."""


def tally_policy(batch: TrainingBatch, logprobs_BT: Tensor, entropies_BT: Tensor) -> Tally:
    """Entropy of the policy and its mismatch with the sampler in one micro-batch, by age.

    What the objective clipped or cut is counted where it does so (`core.objective`).
    """
    mask_BT = batch.loss_mask_BT
    log_ratios = (logprobs_BT.detach() - batch.sampler_logprobs_BT)[mask_BT]
    ages = batch.ages_BT[mask_BT].clamp(max=AGE_BUCKETS - 1)
    tally = Tally()
    if not len(log_ratios):
        return tally
    ratios, gaps = log_ratios.exp(), log_ratios.abs()
    tally.add(
        tokens=len(log_ratios),
        entropy=entropies_BT[mask_BT].sum(),
        kl_k3=(ratios - 1 - log_ratios).sum(),
        gap=gaps.sum(),
        ratio_out=((ratios < 0.9) | (ratios > 1.1)).sum(),
    )
    for age in ages.unique().tolist():
        tally.add(**{f"tokens_age_{age}": (ages == age).sum(), f"gap_age_{age}": gaps[ages == age].sum()})
    tally.maxima = {"gap": float(gaps.max()), "ratio": float(ratios.max()), "age": float(batch.ages_BT[mask_BT].max())}
    tally.mismatch_histogram = torch.bincount(
        torch.bucketize(gaps, MISMATCH_EDGES), minlength=len(MISMATCH_EDGES) + 1
    ).float()
    return tally


def policy_metrics(tally: Tally) -> dict[str, float]:
    """The figures of a whole step, from the merged tally of its micro-batches. Keys as in docs/metrics.md."""
    tokens = tally.sums.get("tokens", 0.0)
    if not tokens:
        return {}
    quantiles = tally.mismatch_histogram.cumsum(0) / tally.mismatch_histogram.sum()
    p95_bin = int((quantiles < 0.95).sum())
    metrics = {
        "actor/entropy": tally.sums["entropy"] / tokens,
        "actor/ppo_kl": tally.sums["kl_k3"] / tokens,
        "mismatch/logprob_gap_mean": tally.sums["gap"] / tokens,
        "mismatch/logprob_gap_p95": float(MISMATCH_EDGES[min(p95_bin, len(MISMATCH_EDGES) - 1)]),
        "mismatch/logprob_gap_max": tally.maxima["gap"],
        "mismatch/ratio_max": tally.maxima["ratio"],
        "mismatch/ratio_outside_10pct": tally.sums["ratio_out"] / tokens,
        "staleness/token_max": tally.maxima["age"],
    }
    for name, key in OPTIONAL_SHARES.items():
        if name in tally.sums:
            metrics[key] = tally.sums[name] / tokens
    for age in range(AGE_BUCKETS):
        if count := tally.sums.get(f"tokens_age_{age}"):
            metrics[f"staleness/token_share_age_{age}"] = count / tokens
            metrics[f"mismatch/logprob_gap_mean_age_{age}"] = tally.sums[f"gap_age_{age}"] / count
    return metrics


def critic_metrics(tally: Tally) -> dict[str, float]:
    """The figures of a whole step of the critic; none without one. Keys as in docs/metrics.md.

    Explained variance is 1 - Var(return - value) / Var(return), population's; absent where all returns are equal.
    """
    if not tally.sums.get("return_count"):
        return {}
    sums, count = tally.sums, tally.sums["return_count"]
    metrics = {"critic/loss": sums["critic_loss"] / count, "critic/value_mean": sums["value"] / count}
    variance, unexplained = (
        sums[f"{of}_squared"] / count - (sums[of] / count) ** 2 for of in ("return", "return_error")
    )
    if variance > ZERO_VARIANCE:
        metrics["critic/explained_variance"] = 1 - unexplained / variance
    return metrics


def preference_metrics(tally: Tally) -> dict[str, float]:
    """The figures of a whole step of a preference objective; none for others. Keys as in docs/metrics.md."""
    sums = tally.sums
    if "responses" in sums:
        return _unpaired_metrics(sums)
    if "pairs" not in sums:
        return {}
    pairs = max(sums["pairs"], 1.0)
    return {
        "preference/loss": sums["loss"] / pairs,
        "preference/accuracy": sums["pairs_right"] / pairs,
        "preference/margin": sums["margin"] / pairs,
        "preference/chosen_logprob": sums["chosen_logprob"] / pairs,
        "preference/rejected_logprob": sums["rejected_logprob"] / pairs,
        "preference/pairs": sums["pairs"],
        "preference/pairs_skipped": sums["pairs_skipped"],
    }


def _unpaired_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    responses, desirable = max(sums["responses"], 1.0), sums["desirable"]
    metrics = {
        "preference/loss": sums["loss"] / responses,
        "preference/accuracy": sums["responses_right"] / responses,
        "preference/desirable_share": desirable / responses,
        "preference/responses": sums["responses"],
        "preference/responses_skipped": sums["responses_skipped"],
    }
    if desirable:
        metrics["preference/desirable_score"] = sums["desirable_score"] / desirable
    if undesirable := sums["responses"] - desirable:
        metrics["preference/undesirable_score"] = sums["undesirable_score"] / undesirable
    return metrics
