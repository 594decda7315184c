"""Objectives over sampled tokens, one function and one equation each. Axes: B rows, T positions.

Four policies meet here and are never mixed up; each gives its own log-probs of the same tokens:
pi, the policy being trained, carries the gradient; p, the proximal policy, is the centre of the trust region; b, the
sampler's, drew the tokens; the reference (`core.kl`) is what the policy must not leave.

Every loss is a *sum* over the micro-batch. The step's denominator (`core.objective.step_denominator`) divides the
accumulated gradient once, when the step is complete, so no gradient depends on how the batch was cut into
micro-batches, ranks or arrivals.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Level = Literal["token", "sequence"]


class Surrogate(NamedTuple):
    """What each token asks of the policy, and where a bound acted."""

    values_BT: Tensor
    """To be maximized; carries the gradient."""
    clipped_low_BT: Tensor
    """bool: the lower bound changed the token's gradient."""
    clipped_high_BT: Tensor
    """bool: the upper bound did."""
    clipped_dual_BT: Tensor
    """bool: the dual clip did."""


def masked_log_ratio(logprobs_BT: Tensor, other_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(pi / other) on the mask, 0 off it.

    Masked before anything is done to it: an infinite log-prob off the mask would turn the gradient into NaN.
    """
    assert logprobs_BT.shape == other_logprobs_BT.shape == mask_BT.shape
    return torch.where(mask_BT, logprobs_BT - other_logprobs_BT, 0.0)


def policy_ratio(logprobs_BT: Tensor, proximal_logprobs_BT: Tensor, mask_BT: Tensor, *, level: Level) -> Tensor:
    """r = pi / p, differentiable in pi alone.

    token: each token's own (PPO, https://arxiv.org/abs/1707.06347). sequence: every token carries its row's geometric
    mean, s = exp(mean_t log r_t) (GSPO, https://arxiv.org/abs/2507.18071), with the gradient s x grad log pi_t
    (its token form), so that a row's mean over tokens has the gradient of s itself.
    """
    log_ratio_BT = masked_log_ratio(logprobs_BT, proximal_logprobs_BT.detach(), mask_BT)
    if level == "sequence":
        num_tokens_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
        mean_B1 = log_ratio_BT.detach().sum(-1, keepdim=True) / num_tokens_B1
        log_ratio_BT = mean_B1 + (log_ratio_BT - log_ratio_BT.detach())
    return log_ratio_BT.exp()


def importance_ratio(
    proximal_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor, *, level: Level
) -> Tensor:
    """p / b without gradient: how much likelier than the sampler the proximal policy finds a token, or (sequence) the
    whole response up to its last token on the mask."""
    log_ratio_BT = masked_log_ratio(proximal_logprobs_BT.detach(), sampler_logprobs_BT, mask_BT)
    if level == "sequence":
        log_ratio_BT = log_ratio_BT.sum(-1, keepdim=True).expand_as(log_ratio_BT)
    return log_ratio_BT.exp()


def importance_weight(ratio_BT: Tensor, *, form: Literal["truncated", "masked"], low: float, high: float) -> Tensor:
    """What corrects for tokens that another policy drew, kept from exploding.

    truncated: the ratio, cut to [low, high]; low = 0 is truncated importance sampling (Ionides 2008, doi
    10.1198/106186008X320456). masked: the ratio inside [low, high], 0 outside, so that a token the two policies disagree
    about is not trained at all (IcePop, "Every Step Evolves", https://arxiv.org/abs/2510.18855).
    """
    if form == "truncated":
        return ratio_BT.clamp(low, high)
    return torch.where(outside(ratio_BT, low=low, high=high), 0.0, ratio_BT)


def outside(ratio_BT: Tensor, *, low: float, high: float) -> Tensor:
    return (ratio_BT < low) | (ratio_BT > high)


def clipped_surrogate(
    ratio_BT: Tensor, advantages_BT: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> Surrogate:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 not below dual_clip x A.

    PPO, eq. 7 of https://arxiv.org/abs/1707.06347; clip_high > clip_low is DAPO's clip-higher
    (https://arxiv.org/abs/2503.14476); the dual clip bounds how hard an unwanted token that has become much likelier is
    pushed (https://arxiv.org/abs/1912.09729).
    """
    assert ratio_BT.shape == advantages_BT.shape
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    values_BT = torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    clipped_dual_BT = torch.zeros_like(ratio_BT, dtype=torch.bool)
    if dual_clip is not None:
        clipped_dual_BT = (ratio_BT > dual_clip) & (advantages_BT < 0)
        values_BT = torch.where(clipped_dual_BT, dual_clip * advantages_BT, values_BT)
    return Surrogate(
        values_BT,
        clipped_low_BT=(ratio_BT < 1 - clip_low) & (advantages_BT < 0),
        clipped_high_BT=(ratio_BT > 1 + clip_high) & (advantages_BT > 0),
        clipped_dual_BT=clipped_dual_BT,
    )


def cispo_surrogate(
    ratio_BT: Tensor,
    logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """clip(r, 1 - clip_low, 1 + clip_high) A log pi, the clipped ratio a mere weight: no token loses its gradient.

    CISPO, "MiniMax-M1" (https://arxiv.org/abs/2506.13585), which leaves the lower end open: clip_low = 1.
    """
    assert ratio_BT.shape == logprobs_BT.shape == advantages_BT.shape == mask_BT.shape
    ratio_BT = ratio_BT.detach()
    weight_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(
        weight_BT * advantages_BT * torch.where(mask_BT, logprobs_BT, 0.0),
        clipped_low_BT=ratio_BT < 1 - clip_low,
        clipped_high_BT=ratio_BT > 1 + clip_high,
        clipped_dual_BT=torch.zeros_like(mask_BT),
    )


def weighted_sum(values_BT: Tensor, weights_B: Tensor, mask_BT: Tensor) -> Tensor:
    """sum_i w_i sum_t values over the mask: a micro-batch's share of the step's sum."""
    assert values_BT.shape == mask_BT.shape and weights_B.shape == mask_BT.shape[:1]
    return (torch.where(mask_BT, values_BT, 0.0).sum(-1) * weights_B).sum()


def negative_log_likelihood(logprobs_BT: Tensor, weights_B: Tensor, mask_BT: Tensor) -> Tensor:
    """-sum w_i log pi(token): the supervised loss on demonstrations."""
    return -weighted_sum(logprobs_BT, weights_B, mask_BT)


def rollout_weight(num_tokens: int, *, aggregation: str) -> float:
    """Weight of every token of one rollout before the step's denominator divides.

    token_mean (DAPO: each token counts the same) and constant (Dr. GRPO): 1. sequence_mean (GRPO as published: each
    rollout counts the same, its tokens share it): 1 / its length.
    """
    if aggregation == "sequence_mean":
        return 1.0 / max(num_tokens, 1)
    assert aggregation in ("token_mean", "constant"), aggregation
    return 1.0


def denominator(num_tokens: int, num_rollouts: int, *, aggregation: str, max_response_tokens: int) -> float:
    """What divides the summed loss of one optimizer step, from the totals of the whole step.

    token_mean: its loss tokens; sequence_mean: its rollouts; constant: rollouts x the longest response allowed
    (Dr. GRPO, https://arxiv.org/abs/2503.20783, so that length does not change the scale).
    """
    if aggregation == "token_mean":
        return float(max(num_tokens, 1))
    if aggregation == "sequence_mean":
        return float(max(num_rollouts, 1))
    assert aggregation == "constant", aggregation
    return float(max(num_rollouts, 1) * max_response_tokens)
