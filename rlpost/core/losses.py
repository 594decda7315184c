"""Objectives, one function and one equation each. Axes: B rows, T positions.

Every loss is a *sum* over the micro-batch. The step's denominator (`denominator`) divides the accumulated gradient
once, when the step is complete, so no gradient depends on how the batch was cut into micro-batches, ranks or arrivals.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decoupled_surrogate(
    logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    sampler_logprobs_BT: Tensor,
    advantages_B: Tensor,
    weights_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
) -> Tensor:
    """-sum w_i min(c, p/b) min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with r = pi/p.

    pi is the policy being trained, p the proximal policy the trust region is drawn around, b the policy that sampled.
    "AReaL", decoupled PPO objective (https://arxiv.org/abs/2505.24298); clip_high > clip_low is DAPO's clip-higher
    (https://arxiv.org/abs/2503.14476); the weight min(c, p/b) is truncated importance sampling, token by token.
    With p = b the weight is 1 and this is PPO's clipped surrogate, eq. 7 of https://arxiv.org/abs/1707.06347.

    Args:
        logprobs_BT: of the sampled tokens under the policy being trained; carries the gradient.
        proximal_logprobs_BT, sampler_logprobs_BT: the same tokens under p and b; no gradient.
        advantages_B: one per rollout.
        weights_B: `rollout_weight` of each rollout.
        mask_BT: True on the tokens that count.

    Returns:
        Scalar sum over the micro-batch.
    """
    assert logprobs_BT.shape == proximal_logprobs_BT.shape == sampler_logprobs_BT.shape == mask_BT.shape
    assert advantages_B.shape == weights_B.shape == mask_BT.shape[:1]
    # Mask before exp: an infinite log-prob off the mask would turn the gradient into NaN.
    log_ratio_BT = torch.where(mask_BT, logprobs_BT - proximal_logprobs_BT.detach(), 0.0)
    log_weight_BT = torch.where(mask_BT, proximal_logprobs_BT.detach() - sampler_logprobs_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    advantages_B1 = advantages_B[:, None]
    surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    correction_BT = log_weight_BT.exp().clamp(max=tis_cap)
    return -(torch.where(mask_BT, correction_BT * surrogate_BT, 0.0).sum(-1) * weights_B).sum()


def kl_k3(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, weights_B: Tensor, mask_BT: Tensor) -> Tensor:
    """sum w_i (exp(q - p) - (q - p) - 1) with p the policy's and q the reference's log-prob of the sampled token.

    Estimator k3 of KL(policy || reference), non-negative term by term (http://joschu.net/blog/kl-approx.html);
    as GRPO uses it in the loss, eq. 4 of https://arxiv.org/abs/2402.03300.
    """
    assert logprobs_BT.shape == reference_logprobs_BT.shape == mask_BT.shape
    log_ratio_BT = torch.where(mask_BT, reference_logprobs_BT.detach() - logprobs_BT, 0.0)
    return ((log_ratio_BT.exp() - log_ratio_BT - 1).sum(-1) * weights_B).sum()


def negative_log_likelihood(logprobs_BT: Tensor, weights_B: Tensor, mask_BT: Tensor) -> Tensor:
    """-sum w_i log pi(token): the supervised loss on demonstrations."""
    assert logprobs_BT.shape == mask_BT.shape
    return -(torch.where(mask_BT, logprobs_BT, 0.0).sum(-1) * weights_B).sum()


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
